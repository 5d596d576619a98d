"""TensorBoard's event files, written so that they can fail without harm to the run.

Used by `metrics.MetricWriter` only. `metrics.jsonl` holds the same numbers: where events cannot be
written, the run says so once and goes on without them.

An event file is a TFRecord file of `Event` messages (tensorflow/core/util/event.proto). Three kinds
of them are needed, and their few fields are encoded here: the packages that could do it import
torch where they find it, which costs every start of a run two seconds.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping

import numpy as np
from absl import logging
from etils import epath

from diht_jax.data.tfrecord_format import frame_footer, frame_header

TENSORBOARD_DIRECTORY = "tensorboard"

# Fields of Event, Summary, Summary.Value and SessionLog, with their wire types: 0 is a varint, 1 a
# double, 2 bytes with their length, 5 a float.
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY, _SESSION_LOG = (1, 1), (2, 0), (3, 2), (5, 2), (7, 2)
_VALUE = (1, 2)
_TAG, _SIMPLE_VALUE = (1, 2), (2, 5)
_STATUS = (1, 0)
_SESSION_START = 1


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
            self._write(_field(_FILE_VERSION, b"brain.Event:2"))
            session = _field(_STATUS, _SESSION_START)
            self._write(_field(_STEP, start_step + 1) + _field(_SESSION_LOG, session))
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of one step and flushes them."""
        if self._file is None:
            return
        values = b"".join(
            _field(_VALUE, _field(_TAG, name.encode()) + _field(_SIMPLE_VALUE, float(value)))
            for name, value in scalars.items()
        )
        try:
            self._write(_field(_STEP, step) + _field(_SUMMARY, values))
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

    def _write(self, event: bytes) -> None:
        data = _field(_WALL_TIME, time.time()) + event
        self._file.write(frame_header(len(data)) + data + frame_footer(data))

    def _give_up(self, error: OSError) -> None:
        self._file = None
        logging.warning(
            "%s cannot be written (%s): the run goes on without TensorBoard, metrics.jsonl holds "
            "the same numbers",
            self._directory,
            error,
        )


def _field(kind: tuple[int, int], value: int | float | bytes) -> bytes:
    """One field of a protocol buffer message; see the wire types above."""
    number, wire_type = kind
    key = bytes([number << 3 | wire_type])
    if wire_type == 1:
        return key + struct.pack("<d", value)
    if wire_type == 5:
        return key + struct.pack("<f", np.float32(value))  # what is too large becomes infinite
    if wire_type == 2:
        return key + _varint(len(value)) + value
    return key + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
