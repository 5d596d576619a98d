"""TensorBoard's event files; a failure does no harm to the run.

`metrics.jsonl` holds the same numbers: where no event file can be begun, one warning is logged and
the run goes on without.

An event file is a TFRecord file of `Event` messages, whose classes are TensorBoard's. Its writer is
not used: it writes in a thread that dies with the first error, and then blocks the run.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2

from diht_jax.records.format import frame_footer, frame_header
from diht_jax.training.monitoring.growing_file import GrowingFile

TENSORBOARD_DIRECTORY = "tensorboard"


class EventWriter:
    """Writes scalars as TensorBoard events."""

    def __init__(self, workdir: epath.Path, start_step: int):
        """Begins a new event file.

        Args:
            workdir: of the run; the files go into `tensorboard/`.
            start_step: TensorBoard hides what earlier files hold of later steps.
        """
        folder = workdir / TENSORBOARD_DIRECTORY
        # Seconds alone would let a quick restart overwrite the file.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = _frame(file_version="brain.Event:2") + _frame(
            step=start_step + 1, session_log=start
        )
        self._file: GrowingFile | None = None
        try:
            self._file = GrowingFile(folder / name, first)
        except Exception as error:  # few errors of stores are an OSError
            logging.warning(
                "%s cannot be written (%s): the run goes on without TensorBoard, metrics.jsonl "
                "holds the same numbers",
                folder,
                error,
            )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of one step; they can be read when it returns."""
        if self._file is not None:
            values = [
                summary_pb2.Summary.Value(tag=name, simple_value=float(value))
                for name, value in scalars.items()
            ]
            self._file.append(_frame(step=step, summary=summary_pb2.Summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _frame(**fields: Any) -> bytes:
    """The record of an event in a file."""
    data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    return frame_header(len(data)) + data + frame_footer(data)
