"""TensorBoard: an event file in the work directory for each start of a run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from diht_jax.records.format import frame_footer, frame_header
from diht_jax.training.monitoring.growing_file import GrowingFile
from diht_jax.training.monitoring.trackers.base import TrackedRun, Tracker

DIRECTORY = "tensorboard"


class TensorBoard(Tracker):
    """Writes TFRecord files of `Event` messages.

    TensorBoard's own writer is not used: it writes in a thread that dies with the first error, and
    then blocks the run. Pictures are left out, since a file in an object store is written anew for
    each line.
    """

    title = "TensorBoard"
    takes_pictures = False
    has_runs = False

    def __init__(self, run: TrackedRun):
        """Begins a file; TensorBoard hides what earlier files hold of later steps."""
        from tensorboard.compat.proto import event_pb2

        # Seconds alone would let a quick restart overwrite the file.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = _frame(file_version="brain.Event:2") + _frame(
            step=run.start_step + 1, session_log=start
        )
        self._events = GrowingFile(run.workdir / DIRECTORY / name, first)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends an event; one that cannot be written now is kept."""
        from tensorboard.compat.proto import summary_pb2

        values = [summary_pb2.Summary.Value(tag=n, simple_value=v) for n, v in scalars.items()]
        self._events.append(_frame(step=step, summary=summary_pb2.Summary(value=values)))

    def close(self, failed: bool) -> None:
        """Writes what was kept."""
        self._events.sync()


def _frame(**fields: Any) -> bytes:
    """The record of an event in a file."""
    from tensorboard.compat.proto import event_pb2

    data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    return frame_header(len(data)) + data + frame_footer(data)
