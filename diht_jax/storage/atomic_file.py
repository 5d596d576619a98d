"""Files that appear whole or not at all: a temporary name, a sync, a rename."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO


def temporary_path(path: pathlib.Path) -> pathlib.Path:
    """A hidden name in the same folder, which no other process takes and no search finds."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a whole file; an old one is replaced.

    Args:
        path: of the file; its folder must exist.
        data: its contents.
    """
    with open_atomically(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_atomically(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A new file that has its name once the block has ended well; an old one is replaced then.

    Args:
        path: of the file; its folder must exist.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_file(path: pathlib.Path) -> None:
    """Waits until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
