"""Files that appear whole or not at all: a temporary name, a sync, a rename."""

from __future__ import annotations

import os
import pathlib


def temporary_path(path: pathlib.Path) -> pathlib.Path:
    """A hidden name in the same folder, which no other process takes and no search finds."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a whole file; an old one is replaced.

    Args:
        path: of the file; its folder must exist.
        data: its contents.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
