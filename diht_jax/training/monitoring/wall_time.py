"""Wall time of a run by its use, over all starts in the same work directory.

    start       of the first process, up to its first step: imports, peers, data, parameters
    compile     of the step
    step        training
    input       devices that waited for a batch
    evaluation  and the curves at the end
    checkpoint  the loop's waits for one; what is written in the background costs nothing
    lost        to restarts: steps that were made again, and the time up to the first new step

The time between two starts, in which no process ran, is not known here.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from diht_jax.storage.files import add_checksum, parse_object
from diht_jax.training.monitoring.growing_file import replace_file
from diht_jax.training.monitoring.metrics import read_metrics

FILE = "wall_time.json"
USES = ("start", "compile", "step", "input", "evaluation", "checkpoint", "lost")
_PREFIX = "wall_secs/"


class WallTime:
    """Seconds of each use. What they add up to before is read from the work directory.

    The first process alone reads and writes.
    """

    def __init__(
        self,
        workdir: str | epath.Path,
        start_step: int,
        *,
        began: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Goes on from what the earlier starts have left.

        Args:
            workdir: of the run, before lines of later steps are removed from its metrics.
            start_step: of the checkpoint that the run goes on from.
            began: the clock's time at the start of this process; now by default.
        """
        self._path = epath.Path(workdir) / FILE
        self._clock = clock
        self._marked = clock() if began is None else began
        self._secs, self._starts = dict.fromkeys(USES, 0.0), 1
        if jax.process_index() == 0:
            self._add_earlier(workdir, start_step)
        self._use = "start" if self._starts == 1 else "lost"
        self.save()

    def _add_earlier(self, workdir: str | epath.Path, start_step: int) -> None:
        """Takes over what was, with the steps after `start_step` as lost."""
        rows = [row for row in read_metrics(workdir) if _PREFIX + "step" in row]
        found = self._read()
        if found is not None:
            self._secs, self._starts = _known(found["secs"]), found["starts"] + 1
        elif rows:
            self._secs, self._starts = _known(rows[-1], _PREFIX), 2
        before = [row for row in rows if row["step"] <= start_step]
        at_start = _known(before[-1] if before else {}, _PREFIX)
        for use in ("step", "input"):
            again = max(0.0, self._secs[use] - at_start[use])
            self._secs[use] -= again
            self._secs["lost"] += again

    def _read(self) -> dict[str, Any] | None:
        """The file's contents; None where there is none that can be read."""
        try:
            found = parse_object(self._path.read_bytes(), needs_checksum=True)
            problem = None if found else "it is damaged"
        except FileNotFoundError:
            return None
        except Exception as error:  # of a store
            found, problem = None, str(error)
        if problem:
            logging.warning(
                "%s cannot be read (%s): times are counted on from the last line of metrics.jsonl",
                self._path,
                problem,
            )
        return found

    @contextlib.contextmanager
    def during(self, use: str) -> Generator[None]:
        """Counts what is done within as one use; compiling once more, at a restart, is lost."""
        before = self._use
        self._switch("lost" if (use, before) == ("compile", "lost") else use)
        try:
            yield
        finally:
            self._switch(before)

    def begin_steps(self) -> None:
        """Counts as training from here on what is nothing else."""
        self._switch("step")

    def count_hidden(self, secs: float) -> None:
        """Takes from the waits for batches what the devices spent on a step meanwhile."""
        secs = min(max(0.0, secs), self._secs["input"])
        self._secs["input"] -= secs
        self._secs["step"] += secs

    def scalars(self) -> dict[str, float]:
        """`goodput`, the share of the time that was spent on steps which count, and the seconds."""
        self._switch(self._use)
        total = sum(self._secs.values())
        return {
            "goodput": self._secs["step"] / total if total else 0.0,
            **{_PREFIX + use: secs for use, secs in self._secs.items()},
        }

    def save(self) -> None:
        """Writes the file; a warning where that fails."""
        if jax.process_index() != 0:
            return
        self._switch(self._use)
        secs = {use: round(secs, 3) for use, secs in self._secs.items()}
        data = json.dumps(add_checksum({"starts": self._starts, "secs": secs}), indent=1) + "\n"
        try:
            replace_file(self._path, data.encode())
        except Exception as error:  # few errors of stores are an OSError
            logging.warning("%s cannot be written: %s", self._path, error)

    def close(self) -> None:
        """Says what the time was spent on, and keeps it for the next start."""
        self.save()
        total = sum(self._secs.values())
        shares = sorted(self._secs.items(), key=lambda item: -item[1])
        logging.info(
            "wall time %s in %d start%s: %s",
            datetime.timedelta(seconds=round(total)),
            self._starts,
            "s" * (self._starts > 1),
            ", ".join(f"{use} {secs / total:.1%}" for use, secs in shares if secs),
        )

    def _switch(self, use: str) -> None:
        now = self._clock()
        self._secs[self._use] += now - self._marked
        self._marked, self._use = now, use


def _known(secs: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """The seconds of each use in a file or a row; zeros for those that it lacks."""
    return {use: float(secs.get(prefix + use, 0.0)) for use in USES}
