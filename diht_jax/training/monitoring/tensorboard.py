"""Writes TensorBoard's event files; a failure does no harm to the run.

`metrics.jsonl` holds the same numbers: where events cannot be written to disk, one warning is
logged and the run goes on without them. What an object store does not take is written later.

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
from diht_jax.storage.stores import is_remote
from diht_jax.training.monitoring.growing_object import GrowingObject

TENSORBOARD_DIRECTORY = "tensorboard"
# A file in an object store is written anew for each step that is logged: a new one is begun soon.
_LONGEST_OBJECT_BYTES = 2**18


class EventWriter:
    """Scalars as TensorBoard events."""

    def __init__(self, workdir: epath.Path, start_step: int):
        """Opens a new event file.

        Args:
            workdir: of the run; the files go into `tensorboard/`.
            start_step: TensorBoard hides what earlier files hold of later steps.
        """
        self._directory = workdir / TENSORBOARD_DIRECTORY
        self._file: _LocalEvents | _RemoteEvents | None = None
        # Seconds alone would let a quick restart overwrite the file.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        try:
            remote = is_remote(os.fspath(workdir))
            self._file = (_RemoteEvents if remote else _LocalEvents)(self._directory / name)
            self._file.append(_frame(step=start_step + 1, session_log=start))
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of one step; they can be read when it returns."""
        if self._file is None:
            return
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=float(value))
            for name, value in scalars.items()
        ]
        try:
            self._file.append(_frame(step=step, summary=summary_pb2.Summary(value=values)))
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

    def _give_up(self, error: OSError) -> None:
        self._file = None
        logging.warning(
            "%s cannot be written (%s): the run goes on without TensorBoard, metrics.jsonl holds "
            "the same numbers",
            self._directory,
            error,
        )


class _LocalEvents:
    """An event file on disk."""

    def __init__(self, path: epath.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self.append(_first_frame())

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _RemoteEvents:
    """Event files in an object store, which TensorBoard reads in the order of their names.

    None is begun before the store has all of the one before, behind which TensorBoard does not
    look again.
    """

    def __init__(self, path: epath.Path):
        self._path, self._number = path, 0
        self._object = self._begin()

    def append(self, data: bytes) -> None:
        if self._object.append(data) and self._object.num_bytes >= _LONGEST_OBJECT_BYTES:
            self._number += 1
            self._object = self._begin()

    def close(self) -> None:
        self._object.close()

    def _begin(self) -> GrowingObject:
        path = self._path.with_name(f"{self._path.name}.{self._number:05d}")
        return GrowingObject(path, _first_frame())


def _first_frame() -> bytes:
    """What an event file begins with."""
    return _frame(file_version="brain.Event:2")


def _frame(**fields: Any) -> bytes:
    """One event, as its record in a file."""
    data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    return frame_header(len(data)) + data + frame_footer(data)
