"""Waits for the next batch of a run: reports an input that stalls, and gives it up for a stop.

The batch is fetched in a thread, so that the main thread can look at the time and at the signals
meanwhile. Time is counted in polls, so that a clock that is set makes no difference.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

from absl import logging

from diht_jax.input.pipeline import TrainIterator


@dataclasses.dataclass(frozen=True)
class Position:
    """A position in the data that stays while its iterator goes on."""

    state: dict[str, int]

    def get_state(self) -> dict[str, int]:
        """The state that `TrainIterator.set_state` takes."""
        return self.state


class StoppedWaiting(Exception):
    """Raised where the run is to stop, and the batch that it waits for does not come.

    Attributes:
        position: before that batch.
    """

    def __init__(self, position: Position):
        super().__init__("the input stalls")
        self.position = position


class BatchWait:
    """Takes the batches of an iterator."""

    def __init__(
        self,
        batches: TrainIterator,
        *,
        poll_secs: float = 1.0,
        warn_after_secs: float = 60.0,
        grace_secs: float = 5.0,
    ):
        """Takes nothing yet.

        Args:
            batches: of the run.
            poll_secs: between two looks at whether to stop; a batch that comes is taken at once.
            warn_after_secs: of waiting, until the log names what is awaited; then again after twice
                as long.
            grace_secs: that a batch still has to come once the run is to stop.
        """
        self._batches = batches
        self._poll_secs = poll_secs
        self._warn_after_secs = warn_after_secs
        self._grace_secs = grace_secs

    def take(self, stop_requested: Callable[[], bool]) -> dict[str, Any]:
        """The next batch.

        Args:
            stop_requested: whether to give up a batch that does not come.

        Raises:
            StoppedWaiting: it was given up; the iterator cannot be used any more.
        """
        position = Position(self._batches.get_state())
        fetch = _Fetch(self._batches)
        try:
            waited = stopping = 0.0
            warn_at = self._warn_after_secs
            while not fetch.done.wait(self._poll_secs):
                waited += self._poll_secs
                if stop_requested():
                    stopping += self._poll_secs
                    if stopping >= self._grace_secs:
                        raise StoppedWaiting(position)
                if waited >= warn_at:
                    warn_at *= 2
                    logging.warning(
                        "no batch for %.0f s: %s", waited, self._batches.describe_awaited()
                    )
        except BaseException:  # a second ^C, too
            self._batches.abandon()
            fetch.join(self._grace_secs)
            raise
        if fetch.error is not None:
            raise fetch.error
        return fetch.batch


class _Fetch(threading.Thread):
    """Fetches one batch."""

    def __init__(self, batches: TrainIterator):
        super().__init__(name="next_batch", daemon=True)
        self._batches = batches
        self.done = threading.Event()
        self.batch: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.batch = next(self._batches)
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()
