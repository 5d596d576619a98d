"""Writes TensorBoard's event files; a failure does no harm to the run.

`metrics.jsonl` holds the same numbers: where events cannot be written, one warning is logged and
the run goes on without them.

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

from diht_jax.data.records.format import frame_footer, frame_header

TENSORBOARD_DIRECTORY = "tensorboard"


class EventWriter:
    """Scalars as TensorBoard events."""

    def __init__(self, workdir: epath.Path, start_step: int):
        """Opens a new event file.

        Args:
            workdir: of the run; the files go into `tensorboard/`.
            start_step: TensorBoard hides what earlier files hold of later steps.
        """
        self._directory = workdir / TENSORBOARD_DIRECTORY
        self._file = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # Seconds alone would let a quick restart overwrite the file.
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
            self._file = (self._directory / f"{name}.{os.getpid()}").open("wb")
            self._write(file_version="brain.Event:2")
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=start_step + 1, session_log=start)
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of one step and flushes them."""
        if self._file is None:
            return
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=float(value))
            for name, value in scalars.items()
        ]
        try:
            self._write(step=step, summary=summary_pb2.Summary(value=values))
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Closes the file."""
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)

    def _write(self, **fields: Any) -> None:
        data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        self._file.write(frame_header(len(data)) + data + frame_footer(data))

    def _give_up(self, error: OSError) -> None:
        self._file = None
        logging.warning(
            "%s cannot be written (%s): the run goes on without TensorBoard, metrics.jsonl holds "
            "the same numbers",
            self._directory,
            error,
        )
