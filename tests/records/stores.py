"""Simulated object stores that count requests or fail."""

import collections
import errno
import io
import pathlib
import threading

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractFileSystem


class MeteredStore(MemoryFileSystem):
    """`metered://`: counts requests and bytes, and may fail or end a run.

    Attributes:
        requests: numbers of "get", "put", "list", "info", "remove", "bytes read", "bytes written".
        failing_every: every n-th request fails; 0 for none.
        ends_before: number of the "put" or "remove" before which the run ends as if it were
            killed; 0 for none.
    """

    protocol = "metered"
    store, pseudo_dirs = {}, [""]
    requests: collections.Counter = collections.Counter()
    failing_every = ends_before = 0
    _lock = threading.Lock()

    @classmethod
    def reset(cls):
        """Empties the store, and resets the counts."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.requests.clear()
        cls.failing_every = cls.ends_before = 0

    @classmethod
    def counts(cls):
        """Returns the counted requests by kind."""
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
    """Google Cloud Storage as in gcsfs; the fixture `bucket` registers it for `gs://`.

    An object exists once it is closed, and a folder exists while it has an object.

    Attributes:
        failures: how many more objects are refused.
    """

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]
    failures = 0

    @classmethod
    def reset(cls):
        """Empties the store and resets the failures."""
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
    """The error class of gcsfs, which is not an OSError."""


class Killed(BaseException):
    """Simulates the end of a process: nothing catches it."""


fsspec.register_implementation(MeteredStore.protocol, MeteredStore, clobber=True)
