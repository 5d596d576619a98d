"""Writes and reads the metrics of a run: `metrics.jsonl`, trackers and a picture of curves.

Only the first process of a job writes.
"""

from __future__ import annotations

import io
import json
import numbers
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from diht_jax.training.monitoring.growing_file import GrowingFile
from diht_jax.training.monitoring.trackers import METRICS_FILE, OpenTrackers


class MetricWriter:
    """Writes scalars by step. On other processes than the first it does nothing."""

    def __init__(
        self,
        workdir: str | epath.Path,
        start_step: int,
        config: ml_collections.ConfigDict | None = None,
    ):
        """Opens the files of a run that starts or goes on after `start_step` steps.

        Lines of later steps, and half a line, both left by a killed run, are dropped: those steps
        will be trained again.

        Args:
            config: the whole training config, for the trackers; None takes TensorBoard alone.
        """
        self._lines = self._trackers = None
        self.has_failed = False  # an error ends the run
        if jax.process_index() != 0:
            return
        workdir = epath.Path(workdir)
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        data = "".join(json.dumps(row) + "\n" for row in kept).encode()
        # At once: a kill here must not cost the lines of weeks.
        self._lines = GrowingFile(workdir / METRICS_FILE, data)
        self._trackers = OpenTrackers(workdir, start_step, config)

    @property
    def takes_pictures(self) -> bool:
        """True if `write_picture` does something."""
        return self._trackers is not None and self._trackers.takes_pictures

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line, and gives the same scalars to the trackers.

        A line for which there is no room, or that a store does not take, is kept, and written
        before the next one.
        """
        row = {name: float(value) for name, value in scalars.items()}
        if self._lines is not None:
            self._lines.append((json.dumps({"step": step, **row}) + "\n").encode())
        if self._trackers is not None:
            self._trackers.each(lambda tracker: tracker.write(step, row))

    def write_picture(self, step: int, name: str, picture: bytes) -> None:
        """Gives a picture, encoded as PNG, to the trackers that take any."""
        if self._trackers is not None:
            self._trackers.each(lambda tracker: tracker.write_picture(step, name, picture))

    def sync(self) -> None:
        """Makes the lines so far outlive a crash of the machine."""
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        """Writes what was kept; a warning where that cannot be written now either."""
        if self._lines is not None:
            self._lines.sync()
        if self._trackers is not None:
            self._trackers.each(lambda tracker: tracker.close(self.has_failed))


def read_metrics(workdir: str | epath.Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`; empty where there is none.

    A half-written last line, which a killed run may leave, is skipped with a warning, and so is a
    line that is no row of numbers with a step.
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


def mean_scalars(measured: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Means over steps of the step's metrics; waits for the device."""
    rows = jax.device_get(list(measured))
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def flatten_results(results: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """Nested evaluation results -> `{"task/metric": value}`; what is no number is left out."""
    flat = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            flat.update(flatten_results(value, f"{prefix}{name}/"))
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def plot_curves(workdir: str | epath.Path) -> bytes | None:
    """Draws `curves.png`: loss, batch accuracy, logit scale and evaluation results by step.

    Returns:
        The picture; None where that fails, of which a warning is logged, and on other processes
        than the first.
    """
    if jax.process_index() != 0:
        return None
    path = epath.Path(workdir) / "curves.png"
    try:
        picture = _draw_curves(read_metrics(workdir))
        path.write_bytes(picture)
        return picture
    except Exception as error:  # what it is depends on the store
        logging.warning("%s cannot be written: %s", path, str(error) or type(error).__name__)
        return None


def _draw_curves(rows: Sequence[Mapping[str, float]]) -> bytes:
    from matplotlib.figure import Figure

    evaluated = sorted({name for row in rows for name in row if name.startswith("evaluation/")})
    panels = [
        ("loss", ["loss"]),
        ("accuracy within the batch", ["i2t_accuracy", "t2i_accuracy"]),
        ("logit scale", ["logit_scale"]),
        ("gradient norm", ["grad_norm"]),
    ]
    shown = [name for name in evaluated if name.rsplit("/", 1)[-1] in _SHOWN_RESULTS]
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


_SHOWN_RESULTS = ("top1", "t2i_r1", "i2t_r1")
