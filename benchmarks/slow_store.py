"""Object store with a fixed latency per request, for fsspec: `slow:///FOLDER`.

It reads local files, sleeps before each answer, and counts requests and bytes in files, because
several processes read. Concurrent requests of several threads are answered at the same time.
"""

from __future__ import annotations

import collections
import os
import pathlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import fsspec

from diht_jax.records.formats import TFRecordSource

# Environment variables, because these reach all reading processes: latency in seconds, folder for
# the counts, and N, where every N-th read of a process fails.
LATENCY_SECS, COUNTS, FAIL_EVERY = (
    "SLOW_STORE_LATENCY_SECS",
    "SLOW_STORE_COUNTS",
    "SLOW_STORE_FAIL_EVERY",
)


class SlowStore(fsspec.AbstractFileSystem):
    """Local files with latency."""

    protocol = "slow"

    def __init__(self, **options: Any):
        super().__init__(use_listings_cache=False, **options)
        self._answers = 0
        self._lock = threading.Lock()

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Lists a folder with one request."""
        names = [os.path.join(path, name) for name in sorted(os.listdir(path))]
        answer("list", 0)
        return [self._info_of(name) for name in names] if detail else names

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Returns size and kind of a file with one request."""
        path = self._strip_protocol(path)
        answer("info", 0)
        return self._info_of(path)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Reads some bytes of a file with one request."""
        with open(self._strip_protocol(path), "rb") as file:
            file.seek(start or 0)
            data = file.read(-1 if end is None else end - (start or 0))
        answer("bytes", len(data))
        with self._lock:
            self._answers += 1
            fails = int(os.environ.get(FAIL_EVERY, 0))
            if fails and self._answers % fails == 0:
                raise OSError("503 Service Unavailable")
        return data

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        answer("open", 0)
        return open(path, mode)

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        """Writes a file with one request."""
        answer("write", len(value))
        pathlib.Path(self._strip_protocol(path)).write_bytes(value)

    def _info_of(self, path: str) -> dict[str, Any]:
        stats = os.stat(path)
        kind = "directory" if os.path.isdir(path) else "file"
        return {"name": path, "size": stats.st_size, "type": kind, "mtime": stats.st_mtime_ns}


def answer(kind: str, size: int) -> None:
    """Sleeps for the latency, and counts the request."""
    time.sleep(float(os.environ.get(LATENCY_SECS, 0)))
    folder = os.environ.get(COUNTS)
    if folder:
        # One short write to a file of this process: a kill loses no line.
        with open(os.path.join(folder, str(os.getpid())), "ab", buffering=0) as file:
            file.write(f"{kind} {size}\n".encode())


class SlowRecords(TFRecordSource):
    """Records in the store; unpickling registers the store in the new process."""


class SlowSequence(Sequence[bytes]):
    """Records of a local source with one request per record, as on a mounted bucket."""

    def __init__(self, records: Sequence[bytes]):
        """Wraps the records."""
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        record = self._records[index]
        answer("bytes", len(record))
        return record

    def __repr__(self) -> str:
        return f"SlowSequence({self._records!r})"


def read_counts(folder: pathlib.Path) -> dict[str, int]:
    """Returns the number of requests of each kind so far, and `total_bytes`."""
    counts: collections.Counter[str] = collections.Counter()
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            kind, size = line.split()
            counts[kind] += 1
            counts["total_bytes"] += int(size)
    return dict(counts)


fsspec.register_implementation("slow", SlowStore, clobber=True)
