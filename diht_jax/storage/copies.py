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

_DOWNLOAD_BYTES, _DOWNLOAD_THREADS = 2**25, 8  # of one request, and requests at a time


@contextlib.contextmanager
def local_copy(path: str) -> Generator[str]:
    """The path of a local file; of one in a store, that of a copy, which is deleted in the end."""
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
    """The path of a copy of a store's file on this host; its processes, and later runs, share it.

    Args:
        name: of the copy; it stands for the contents.
        num_bytes: of the file; None costs a request.
        folder: gets the copy; None is a folder of this user in the system's temporary one.
        advice: what helps where there is no room, for the message.

    Raises:
        ValueError: there is no room for it.
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
    """Copies a file of a store to a new local one, by several requests at a time.

    Its size, where not given, costs one more. Errors are those of `stores.retry`.
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
