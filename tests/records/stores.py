"""Object stores of tests, which count requests or fail."""

import collections
import errno
import io
import pathlib
import threading

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractFileSystem


class MeteredStore(MemoryFileSystem):
    """`metered://`: counts the requests and the bytes that move, and may fail, or end a run.

    Attributes:
        requests: number of "get", "put", "list", "info" and "remove"; "bytes read" and "written".
        failing_every: of so many requests one fails; 0 for none.
        ends_before: the number of the "put" or "remove" that does not come, as if the run were
            killed; 0 for none.
    """

    protocol = "metered"
    store, pseudo_dirs = {}, [""]
    requests: collections.Counter = collections.Counter()
    failing_every = ends_before = 0
    _lock = threading.Lock()

    @classmethod
    def reset(cls):
        """Empties the store, and counts from zero."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.requests.clear()
        cls.failing_every = cls.ends_before = 0

    @classmethod
    def counts(cls):
        """Requests by kind, of those that there were."""
        return {kind: n for kind, n in cls.requests.items() if n and "bytes" not in kind}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("metered://"))

    def _request(self, kind, num_bytes=0):
        changes = kind in ("put", "remove")
        with self._lock:
            self.requests[kind] += 1
            self.requests["bytes written" if changes else "bytes read"] += num_bytes
            number = sum(n for name, n in self.requests.items() if "bytes" not in name)
        if self.failing_every and not number % self.failing_every:
            raise OSError(errno.EIO, "503 Slow Down")
        if changes and self.ends_before == self.requests["put"] + self.requests["remove"]:
            raise Killed

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start, end, **kwargs)
        self._request("get", len(data))
        return data

    def ls(self, path, detail=True, **kwargs):
        self._request("list")
        return super().ls(path, detail, **kwargs)

    def info(self, path, **kwargs):
        self._request("info")
        return super().info(path, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        self._request("put", len(value))
        super().pipe_file(path, value, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        self.pipe_file(rpath, pathlib.Path(lpath).read_bytes())

    def rm_file(self, path):
        self._request("remove")
        if self._strip_protocol(path) not in self.store:
            raise FileNotFoundError(path)
        super()._rm(path)


class BucketStore(MemoryFileSystem):
    """Google's store as gcsfs has it; the fixture `bucket` puts it behind `gs://`.

    An object is there once it is closed, and a folder as long as there is an object in it.

    Attributes:
        failures: how many more objects are refused.
    """

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]
    failures = 0

    @classmethod
    def reset(cls):
        """Empties the store; nothing fails."""
        cls.store.clear()
        cls.failures = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def mkdir(self, path, create_parents=True, **kwargs):
        """Does nothing."""

    def makedirs(self, path, exist_ok=False):
        """Does nothing."""

    pipe_file = AbstractFileSystem.pipe_file

    def cp_file(self, path1, path2, **kwargs):
        if self.isfile(path1):
            super().cp_file(path1, path2, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        if mode == "rb":
            return super()._open(path, mode, **kwargs)
        return _Upload(self, self._strip_protocol(path))


class _Upload(io.BytesIO):
    """An object of `BucketStore` that is being written."""

    def __init__(self, system, path):
        super().__init__()
        self._system, self._path = system, path

    def close(self):
        if self.closed:
            return
        data = self.getvalue()
        super().close()
        if BucketStore.failures:
            BucketStore.failures -= 1
            raise HttpError("503 backend error")
        self._system.store[self._path] = MemoryFile(self._system, self._path, data)


class HttpError(Exception):
    """As that of gcsfs: no OSError."""


class Killed(BaseException):
    """Stands for the end of a process: nothing catches it."""


fsspec.register_implementation(MeteredStore.protocol, MeteredStore, clobber=True)
