"""Waits for the next batch of a run: reports an input that stalls, and gives it up for a stop.

The batch is fetched in a thread, so that the main thread can look at the time and at the signals
meanwhile. Time is counted in polls, so that a clock that is set makes no difference.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent import futures
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
    """The run is to stop, and the batch behind `position`, which it waits for, does not come."""

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
        """The next batch; `stop_requested` tells whether to give up one that does not come.

        Raises:
            StoppedWaiting: it was given up; the iterator cannot be used any more.
        """
        position = Position(self._batches.get_state())
        fetched: futures.Future[dict[str, Any]] = futures.Future()

        def fetch() -> None:
            try:
                fetched.set_result(next(self._batches))
            except BaseException as error:
                fetched.set_exception(error)

        thread = threading.Thread(target=fetch, name="next_batch", daemon=True)
        thread.start()
        try:
            waited = stopping = 0.0
            warn_at = self._warn_after_secs
            while not futures.wait([fetched], self._poll_secs).done:
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
            thread.join(self._grace_secs)
            raise
        return fetched.result()
