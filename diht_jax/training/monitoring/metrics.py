"""Metrics of a run: `metrics.jsonl`, trackers, a plot of curves, and accounting of wall time.

Only the first process of a job writes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import io
import json
import numbers
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from diht_jax.storage.files import add_checksum, parse_checked_object
from diht_jax.training.monitoring.trackers import (
    METRICS_FILE,
    TRACKERS,
    GrowingFile,
    TrackedRun,
    Tracker,
    replace_file,
    tracker_names,
    warn_without,
)

_SHOWN_RESULTS = re.compile("evaluation/(.*/)?(top1|t2i_r1|i2t_r1)")
WALL_TIME_FILE = "wall_time.json"
USES = ("start", "compile", "step", "input", "evaluation", "checkpoint", "lost")
_WALL_SECS = "wall_secs/"


class MetricWriter:
    """Writes scalars by step; does nothing except on the first process."""

    def __init__(
        self, workdir: str | epath.Path, start_step: int, config: ml_collections.ConfigDict
    ):
        """Opens the files of a run that starts, or resumes after `start_step` steps.

        Drops the lines of later steps and an incomplete line, which a killed run leaves: those
        steps are trained again.

        Args:
            config: the whole training config, for the trackers.
        """
        self._lines: GrowingFile | None = None
        self._trackers: list[Tracker] = []  # failing ones are removed
        self.has_failed = False  # whether an error ends the run
        if jax.process_index() != 0:
            return
        workdir = epath.Path(workdir)
        kept = ""
        for row in read_metrics(workdir):
            if row["step"] <= start_step:
                kept += json.dumps(row) + "\n"
        # Written at once: a kill here must not cost the lines of weeks.
        self._lines = GrowingFile(workdir / METRICS_FILE, kept.encode())
        run = TrackedRun(workdir, start_step, json.loads(config.to_json_best_effort()))
        for name in tracker_names(config.trackers):
            try:
                self._trackers.append(TRACKERS[name](run))
            except Exception as error:  # each client has its own types
                warn_without(TRACKERS[name], error)

    @property
    def takes_pictures(self) -> bool:
        """Whether `write_picture` has an effect."""
        return any(tracker.takes_pictures for tracker in self._trackers)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line, and passes the same scalars to the trackers.

        A line that cannot be written (a full disk, a failing store) is kept and written before the
        next one.
        """
        row = dict(zip(scalars, map(float, scalars.values()), strict=True))
        if self._lines is not None:
            self._lines.append((json.dumps({"step": step, **row}) + "\n").encode())
        self._call_trackers("write", step, row)

    def write_picture(self, step: int, name: str, picture: bytes) -> None:
        """Passes a PNG picture to the trackers that take pictures."""
        self._call_trackers("write_picture", step, name, picture)

    def sync(self) -> None:
        """Makes the lines so far durable against a crash of the machine."""
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        """Writes pending lines; logs a warning if that fails again."""
        self.sync()
        self._call_trackers("close", self.has_failed)

    def _call_trackers(self, method: str, *arguments: Any) -> None:
        for tracker in tuple(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # each client has its own types
                self._trackers.remove(tracker)
                warn_without(type(tracker), error)


def read_metrics(workdir: str | epath.Path) -> list[dict[str, float]]:
    """Reads the rows of a run's `metrics.jsonl`; empty if there is none.

    Skips, with a warning, a half-written last line, which a killed run may leave, and any line that
    is no row of numbers with a step.
    """
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), numbers.Real):
            rows.append(row)
        else:
            logging.warning("%s: line %d is no JSON row and is skipped", path, number)
    return rows


def plot_curves(workdir: str | epath.Path) -> bytes | None:
    """Draws `curves.png`: loss, batch accuracy, logit scale and evaluation results by step.

    Returns:
        The picture. None on processes other than the first, and if drawing fails, which is logged
        as a warning.
    """
    if jax.process_index() != 0:
        return None
    path = epath.Path(workdir) / "curves.png"
    try:
        picture = _draw_curves(read_metrics(workdir))
        path.write_bytes(picture)
        return picture
    except Exception as error:  # the type depends on the store
        logging.warning("%s cannot be written: %s", path, str(error) or type(error).__name__)
        return None


def _draw_curves(rows: Sequence[Mapping[str, float]]) -> bytes:
    from matplotlib.figure import Figure

    panels = [
        ("loss", ["loss"]),
        ("accuracy within the batch", ["i2t_accuracy", "t2i_accuracy"]),
        ("logit scale", ["logit_scale"]),
        ("gradient norm", ["grad_norm"]),
    ]
    shown = sorted(filter(_SHOWN_RESULTS.fullmatch, set().union(*rows)))
    if shown:
        panels.append(("evaluation", shown))
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, (title, names) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True) if points else ([], []), label=name)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    return picture.getvalue()


@dataclasses.dataclass(eq=False)
class WallTime:
    """Accounts for the wall time of a run by use, over all starts in the same work directory.

    docs/guides/train/metrics.md lists the uses. "start" is the time of the first process until its
    first step: imports, peers, data, parameters. Time between two starts, in which no process ran,
    is unknown. Only the first process reads earlier records from the work directory, and
    writes.
    """

    workdir: str | epath.Path  # of the run, before lines of later steps leave its metrics
    start_step: int  # step of the checkpoint that the run resumes from
    # Time of `clock` at the start of this process; now by default.
    began: float | None = dataclasses.field(default=None, kw_only=True)
    clock: Callable[[], float] = dataclasses.field(default=time.monotonic, kw_only=True)

    def __post_init__(self):
        """Continues from the records of earlier starts."""
        self._path = epath.Path(self.workdir) / WALL_TIME_FILE
        self._marked = self.clock() if self.began is None else self.began
        self._secs, self._starts = dict.fromkeys(USES, 0.0), 1
        if jax.process_index() == 0:
            self._add_earlier()
        self._use = "start" if self._starts == 1 else "lost"
        self.save()

    def _add_earlier(self) -> None:
        """Adds the time of earlier starts, counting the steps after `start_step` as lost."""
        rows = [row for row in read_metrics(self.workdir) if _WALL_SECS + "step" in row]
        found = None
        with contextlib.suppress(Exception):  # each store has its own types
            found = parse_checked_object(self._path.read_bytes(), needs_checksum=True)
        if found:
            self._secs, self._starts = _known(found["secs"]), found["starts"] + 1
        elif rows:
            logging.warning(
                "%s is missing, damaged or cannot be read: times go on from the last line of "
                "metrics.jsonl",
                self._path,
            )
            self._secs, self._starts = _known(rows[-1], _WALL_SECS), 2
        else:
            return
        before = [row for row in rows if row["step"] <= self.start_step]
        at_start = _known(before[-1] if before else {}, _WALL_SECS)
        for use in ("step", "input"):
            again = max(0.0, self._secs[use] - at_start[use])
            self._secs[use] -= again
            self._secs["lost"] += again

    @contextlib.contextmanager
    def during(self, use: str) -> Generator[None]:
        """Attributes the time of its context to one use; compiling again at a restart is lost."""
        before = self._use
        self.switch("lost" if (use, before) == ("compile", "lost") else use)
        try:
            yield
        finally:
            self.switch(before)

    def count_hidden(self, secs: float) -> None:
        """Moves time in which the devices ran a step from waits for batches to training."""
        secs = min(max(0.0, secs), self._secs["input"])
        self._secs["input"] -= secs
        self._secs["step"] += secs

    def scalars(self) -> dict[str, float]:
        """Returns `goodput`, the share of time spent on steps that count, and the seconds."""
        self.switch(self._use)
        total = sum(self._secs.values())
        scalars = {"goodput": self._secs["step"] / total if total else 0.0}
        for use, secs in self._secs.items():
            scalars[_WALL_SECS + use] = secs
        return scalars

    def save(self) -> None:
        """Writes the file; logs a warning if that fails."""
        if jax.process_index() != 0:
            return
        self.switch(self._use)
        secs = {use: round(secs, 3) for use, secs in self._secs.items()}
        data = json.dumps(add_checksum({"starts": self._starts, "secs": secs}), indent=1) + "\n"
        try:
            replace_file(self._path, data.encode())
        except Exception as error:  # errors of stores are rarely an OSError
            logging.warning("%s cannot be written: %s", self._path, error)

    def close(self) -> None:
        """Logs what the time was spent on, and saves it for the next start."""
        self.save()
        total = sum(self._secs.values())
        shares = collections.Counter(self._secs).most_common()
        logging.info(
            "wall time %s in %d start%s: %s",
            datetime.timedelta(seconds=round(total)),
            self._starts,
            "s" * (self._starts > 1),
            ", ".join(f"{use} {secs / total:.1%}" for use, secs in shares if secs),
        )

    def switch(self, use: str) -> None:
        """Attributes the time from here on to a use, except within `during`."""
        now = self.clock()
        self._secs[self._use] += now - self._marked
        self._marked, self._use = now, use


def _known(secs: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Returns the seconds of each use in a file or a row; zeros for missing ones."""
    return {use: float(secs.get(prefix + use, 0.0)) for use in USES}
