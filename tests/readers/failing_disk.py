"""A simulated disk whose reads fail for a while, and the time that a program then waits."""

import builtins
import contextlib
import errno
import io
import os
from unittest import mock

from diht_jax.storage import stores


class FailingDisk:
    """Makes reads of files in a folder raise while `failures` are left.

    Attributes:
        failures: how many more reads fail.
        spared: how many reads succeed first.
        error: errno of the error.
        slept: total seconds of (simulated) waiting.
    """

    def __init__(self, folder, failures: int, spared: int = 0, error: int = errno.EIO):
        self.folder, self.failures, self.spared, self.error = str(folder), failures, spared, error
        self.slept = 0.0

    @contextlib.contextmanager
    def mounted(self):
        """Opens files through this disk within the context."""
        real_open, real_pread, disk = builtins.open, os.pread, self

        def pread(descriptor, *args):
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(self.folder):
                disk.read()
            return real_pread(descriptor, *args)

        class File(io.FileIO):
            def read(self, size=-1):
                disk.read()
                return super().read(size)

            def readinto(self, buffer):
                disk.read()
                return super().readinto(buffer)

            def readall(self):
                disk.read()
                return super().readall()

        def open_(path, mode="r", buffering=-1, *args, **kwargs):
            is_ours = isinstance(path, str | os.PathLike) and os.fspath(path).startswith(
                self.folder
            )
            if not is_ours or mode != "rb":
                return real_open(path, mode, buffering, *args, **kwargs)
            return File(path) if buffering == 0 else io.BufferedReader(File(path))

        def sleep(secs):
            self.slept += secs

        with (
            mock.patch.object(builtins, "open", open_),
            mock.patch.object(os, "pread", pread),
            mock.patch.object(stores, "sleep", sleep),
        ):
            yield self

    def read(self):
        """Simulates one read: raises or does nothing."""
        if self.spared:
            self.spared -= 1
        elif self.failures:
            self.failures -= 1
            raise OSError(self.error, os.strerror(self.error))
