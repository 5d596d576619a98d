"""Comparison of the input's speed with the step's, and advice in the log."""

from __future__ import annotations

import time
from collections.abc import Callable

import ml_collections
from absl import logging

from diht_jax.input import workers
from diht_jax.training.monitoring.throughput import InputRate

# Of training, before the first look: a run starts with empty buffers.
_FIRST_LOOK_SECS = 60.0
# Between two warnings.
_WARNING_SECS = 600.0
# Workers that are busy for less than this share of their time wait for storage.
_BUSY_SHARE = 0.6


class InputSupply:
    """Warns, once in a while, where the input gives less than the step could take."""

    def __init__(
        self,
        data: ml_collections.ConfigDict,
        *,
        clock: Callable[[], float] = time.monotonic,
        worker_secs: Callable[[], float] = workers.processor_secs,
    ):
        """Starts the time.

        Args:
            data: the section `config.data`.
            clock: seconds, never running backwards.
            worker_secs: processor time of the decoding workers so far, in seconds.
        """
        self._data = data
        self._clock = clock
        self._worker_secs = worker_secs
        self._look_at = clock() + _FIRST_LOOK_SECS
        self._before = (clock(), worker_secs())
        self._is_short: bool | None = None

    def check(self, rate: InputRate) -> None:
        """Looks at the window that has just ended."""
        now, worker_secs = self._clock(), self._worker_secs()
        before, self._before = self._before, (now, worker_secs)
        if now < self._look_at:
            return
        if rate.is_short:
            busy_secs = max(0.0, worker_secs - before[1]) / max(now - before[0], 1e-9)
            logging.warning(
                "the input gives %.0f images/s, and the step could take %.0f; %s",
                rate.supplied,
                rate.possible,
                advise(self._data, workers.usable_cores(), busy_secs),
            )
            self._look_at = now + _WARNING_SECS
        elif self._is_short is not False:
            logging.info("the input keeps up with the step: %.0f images/s", rate.supplied)
        self._is_short = rate.is_short


def advise(data: ml_collections.ConfigDict, cores: int, busy_cores: float) -> str:
    """Names the setting to change where the input is too slow.

    Args:
        data: the section `config.data`.
        cores: that this process may use.
        busy_cores: how many of them the workers have kept busy.
    """
    num_workers = data.num_workers
    if num_workers is None:
        num_workers = workers.default_num_workers()
    if num_workers and busy_cores < _BUSY_SHARE * min(num_workers, cores):
        return (
            f"its {num_workers} workers keep {busy_cores:.1f} of {cores} cores busy and wait for "
            "storage for the rest: a local or faster disk, config.data.order='blocks' (reads many "
            "records at once), and of data in an object store config.data.read_threads="
            f"{data.read_threads} and config.data.cache_dir"
        )
    exact = "" if data.fast_decode else "set config.data.fast_decode=True, or "
    if num_workers < cores:
        kind = "workers" if num_workers else "workers (it decodes in threads)"
        return (
            f"{exact}raise config.data.num_workers: {num_workers} {kind}, and this process may use "
            f"{cores} cores"
        )
    return (
        f"{exact}give this process more cores (Slurm: srun --cpus-per-task) and leave "
        f"config.data.num_workers unset: {num_workers} workers keep all {cores} busy"
    )
