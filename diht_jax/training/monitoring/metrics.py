"""Writes and reads the metrics of a run: `metrics.jsonl`, TensorBoard and a picture of curves.

Only the first process of a job writes.
"""

from __future__ import annotations

import contextlib
import io
import json
import numbers
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2

from diht_jax.records.format import frame_footer, frame_header
from diht_jax.storage.files import write_bytes
from diht_jax.storage.stores import is_remote

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"


class MetricWriter:
    """Writes scalars by step. On other processes than the first it does nothing.

    TensorBoard's event file is a TFRecord file of `Event` messages. Its own writer is not used: it
    writes in a thread that dies with the first error, and then blocks the run.
    """

    def __init__(self, workdir: str | epath.Path, start_step: int):
        """Opens the files of a run that starts or goes on after `start_step` steps.

        Lines of later steps, and half a line, both left by a killed run, are dropped: those steps
        will be trained again. TensorBoard hides what earlier files hold of later steps.
        """
        self._lines = self._events = None
        if jax.process_index() != 0:
            return
        workdir = epath.Path(workdir)
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        data = "".join(json.dumps(row) + "\n" for row in kept).encode()
        # At once: a kill here must not cost the lines of weeks.
        self._lines = _GrowingFile(workdir / METRICS_FILE, data)
        # Seconds alone would let a quick restart overwrite the file.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = _frame(file_version="brain.Event:2") + _frame(
            step=start_step + 1, session_log=start
        )
        folder = workdir / TENSORBOARD_DIRECTORY
        try:
            self._events = _GrowingFile(folder / name, first)
        except Exception as error:  # few errors of stores are an OSError
            logging.warning(
                "%s cannot be written (%s): the run goes on without TensorBoard, metrics.jsonl "
                "holds the same numbers",
                folder,
                error,
            )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line and the same scalars to TensorBoard.

        A line for which there is no room, or that a store does not take, is kept, and written
        before the next one.
        """
        row = {name: float(value) for name, value in scalars.items()}
        if self._lines is not None:
            self._lines.append((json.dumps({"step": step, **row}) + "\n").encode())
        if self._events is not None:
            values = [summary_pb2.Summary.Value(tag=n, simple_value=v) for n, v in row.items()]
            self._events.append(_frame(step=step, summary=summary_pb2.Summary(value=values)))

    def sync(self) -> None:
        """Makes the lines so far outlive a crash of the machine."""
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        """Writes what was kept; a warning where that cannot be written now either."""
        for file in filter(None, (self._lines, self._events)):
            file.sync()


def _frame(**fields: Any) -> bytes:
    """The record of an event in a file."""
    data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    return frame_header(len(data)) + data + frame_footer(data)


class _GrowingFile:
    """Appends to a file. A kill leaves whole records, and what cannot be written is kept.

    Nothing can be appended to an object of a store: it is written anew whenever it grows.
    """

    def __init__(self, path: epath.Path, data: bytes):
        """Writes the file at once.

        Raises:
            Exception: it cannot be written; which one depends on the storage.
        """
        self._path, self._data, self._waiting = path, data, b""
        self._is_remote = is_remote(os.fspath(path))
        if self._is_remote:
            path.write_bytes(data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(os.fspath(path), data)

    def append(self, data: bytes) -> None:
        """Adds to the end, after what was kept; a warning where that cannot be written now."""
        self._waiting += data
        try:
            if self._is_remote:
                self._path.write_bytes(self._data + self._waiting)
            else:
                with open(self._path, "r+b") as file:
                    file.seek(len(self._data))
                    file.truncate()  # a part of what could not be written before
                    file.write(self._waiting)
            self._data, self._waiting = self._data + self._waiting, b""
        except Exception as error:  # few errors of stores are an OSError
            logging.warning(
                "%s: a line is kept for later, it cannot be written: %s",
                self._path,
                str(error) or type(error).__name__,
            )

    def sync(self) -> None:
        """Writes what was kept, and makes the file outlive a crash of the machine."""
        if self._waiting:
            self.append(b"")
        if not self._is_remote:
            with contextlib.suppress(OSError), open(self._path, "rb") as file:
                os.fsync(file.fileno())


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


def plot_curves(workdir: str | epath.Path) -> None:
    """Draws `curves.png`: loss, batch accuracy, logit scale and evaluation results by step.

    Where that fails, a warning is logged.
    """
    if jax.process_index() != 0:
        return
    path = epath.Path(workdir) / "curves.png"
    try:
        path.write_bytes(_draw_curves(read_metrics(workdir)))
    except Exception as error:  # what it is depends on the store
        logging.warning("%s cannot be written: %s", path, str(error) or type(error).__name__)


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
