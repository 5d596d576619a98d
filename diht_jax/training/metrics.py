"""Where measurements go: `metrics.jsonl`, TensorBoard and the curve's picture.

Used by the training loop, on the first process only.
"""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Writes scalars by step. On other processes than the first it does nothing."""

    def __init__(self, workdir: str | epath.Path, start_step: int):
        """Opens the files of a run that starts or goes on after `start_step` steps.

        Lines of later steps, which a killed run has left, are dropped: those steps will be
        trained again.
        """
        self._file = self._tensorboard = None
        if jax.process_index() != 0:
            return
        # Not at the top: tensorboardX imports torch where it finds it.
        from tensorboardX import SummaryWriter

        path = epath.Path(workdir) / METRICS_FILE
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(
            str(epath.Path(workdir) / "tensorboard"), purge_step=start_step + 1
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line and the same scalars to TensorBoard.

        Args:
            step: optimiser steps done.
            scalars: by name; names with a slash are grouped by TensorBoard.
        """
        if self._file is None:
            return
        row = {"step": step, **{name: float(value) for name, value in scalars.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, float(value), step)
        self._tensorboard.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()


def read_metrics(workdir: str | epath.Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`; empty where there is none.

    A half-written last line, which a killed run may leave, is passed over with a warning.
    """
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            logging.warning("%s: line %d is no JSON and is passed over", path, number)
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


def plot_curves(workdir: str | epath.Path) -> None:
    """Draws `curves.png`: loss, batch accuracy, logit scale and evaluation results by step."""
    if jax.process_index() != 0:
        return
    from matplotlib.figure import Figure

    rows = read_metrics(workdir)
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
    figure.savefig(str(epath.Path(workdir) / "curves.png"), dpi=110)


_SHOWN_RESULTS = ("top1", "t2i_r1", "i2t_r1")
