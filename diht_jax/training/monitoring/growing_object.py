"""A file that grows in an object store, where nothing can be appended to an object."""

from __future__ import annotations

from absl import logging
from etils import epath


class GrowingObject:
    """An object that is written anew, with all it has had, whenever it grows.

    Whoever looks sees it whole, and a kill costs nothing. What the store does not take is kept, and
    written with what comes next.

    Attributes:
        num_bytes: of its contents so far.
    """

    def __init__(self, path: epath.Path, data: bytes = b""):
        """Nothing is written yet.

        Args:
            path: of the object.
            data: its contents so far.
        """
        self._path, self._data = path, data
        self._has_waiting = False

    @property
    def num_bytes(self) -> int:
        return len(self._data)

    def append(self, data: bytes) -> bool:
        """Adds to the end; returns whether the store has all of it now."""
        self._data += data
        self._has_waiting = True
        return self.sync()

    def sync(self) -> bool:
        """Writes what the store did not take before; returns whether it has all of it now."""
        if self._has_waiting:
            try:
                # Of stores, and of what signs in to them, few errors are an OSError.
                self._path.write_bytes(self._data)
            except Exception as error:
                logging.warning(
                    "%s: what came last is kept for later, it cannot be written: %s",
                    self._path,
                    str(error) or type(error).__name__,
                )
                return False
        self._has_waiting = False
        return True

    def close(self) -> None:
        """Writes what is missing; a warning where the store does not take it now either."""
        if not self.sync():
            logging.warning("%s lacks what came last, it could not be written", self._path)
