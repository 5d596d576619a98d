"""Local copies of files in object stores."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Generator
from concurrent import futures

from diht_jax.storage import files, locks, stores
from diht_jax.storage.stores import StorageError, is_remote

_DOWNLOAD_BYTES, _DOWNLOAD_THREADS = 2**25, 8  # per request; concurrent requests


@contextlib.contextmanager
def local_copy(path: str) -> Generator[str]:
    """Yields a local path to a file; a file in a store is downloaded to a temporary folder."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="diht_jax-") as folder:
        copy = pathlib.Path(folder, path.rsplit("/", 1)[1])
        download(path, copy)
        yield str(copy)


def cached_copy(
    url: str,
    name: str,
    num_bytes: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    advice: str = "free some space",
) -> str:
    """Returns the path of a copy of a store's file, shared by all processes and runs on this host.

    Args:
        name: file name of the copy. It must identify the contents.
        num_bytes: size of the file. None looks it up with one request.
        folder: cache folder. None uses a per-user folder in the system's temporary directory.
        advice: hint for the error message if the disk is too full.

    Raises:
        ValueError: the disk has too little free space.
    """
    cache = pathlib.Path(folder or f"{tempfile.gettempdir()}/diht_jax-{os.getuid()}")
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = cache / name
    num_bytes = stores.input_size(url) if num_bytes is None else num_bytes

    def is_here() -> bool:
        return path.exists() and path.stat().st_size == num_bytes

    if is_here():
        return str(path)
    with locks.lock_file(cache / f".{name}.lock"):
        if not is_here():
            if shutil.disk_usage(cache).free < num_bytes:
                raise ValueError(f"{cache} has no room for {url} ({num_bytes:,} bytes); {advice}")
            with files.local_output(path) as local:
                download(url, local, num_bytes)
    return str(path)


def download(url: str, path: pathlib.Path, num_bytes: int | None = None) -> None:
    """Downloads a file from a store to a new local file, with concurrent requests.

    Without `num_bytes`, one more request looks up the size. Errors are those of `stores.retry`.
    """
    end = stores.input_size(url) if num_bytes is None else num_bytes
    with (
        open(path, "xb", buffering=0) as file,
        futures.ThreadPoolExecutor(_DOWNLOAD_THREADS) as pool,
    ):

        def copy(start: int) -> None:
            stop = min(start + _DOWNLOAD_BYTES, end)
            data = stores.read_range(url, start, stop)
            if os.pwrite(file.fileno(), data, start) != stop - start:
                raise StorageError(
                    f"{url}: it was written again while it was being read; run the command again"
                )

        for _ in pool.map(copy, range(0, end, _DOWNLOAD_BYTES)):
            pass
