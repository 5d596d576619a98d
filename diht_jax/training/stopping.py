"""Stops a run on SIGTERM or SIGINT, so that the same command goes on where it was.

SIGTERM (what Slurm, Kubernetes and the clouds send before they take a machine away) and the first
SIGINT let the step at hand finish; the loop then saves, and the command exits with
`EXIT_CODE`. A second SIGINT aborts at once; any other signal changes nothing until the state is
saved. In a job of several processes JAX's coordination
service passes either on, so that all stop after the same step, whichever of them was signalled.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import jax
from absl import logging
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: try the same again.
EXIT_CODE = 75


class Stopped(Exception):
    """The run was asked to stop, and has saved its state."""


class StopRequest:
    """Knows whether to stop; a context that gives the signals back when it ends."""

    def __init__(self):
        self._requested = self._interrupted = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        return self

    def listen(self) -> None:
        """Takes over the signals; until then they end the process, which has nothing to save."""
        # Only a main thread may; elsewhere (in a notebook's thread) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            # JAX's own handler of SIGTERM passes it on to the other processes.
            handled = (
                [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            )
            for number in handled:
                self._previous[number] = signal.signal(number, self._remember)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_due(self, step: int) -> bool:
        """Whether to save and stop after this step; the same answer in all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        if self._requested:
            logging.warning("%s: the run is being stopped", signal.Signals(number).name)
            return
        self._requested = True
        if number == signal.SIGINT and jax.process_count() > 1:
            # Only SIGTERM is known to the coordination service.
            os.kill(os.getpid(), signal.SIGTERM)
        logging.warning(
            "%s: stopping after this step; the same command goes on from there",
            signal.Signals(number).name,
        )
