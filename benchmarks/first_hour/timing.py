"""Measures the seconds of calls on the devices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def secs_of_call(call: Callable[[], Any], *, rounds: int = 5, calls: int = 10) -> float:
    """Returns the median over rounds of the mean over calls; the first call is not timed."""
    jax.block_until_ready(call())
    secs = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        secs.append((time.perf_counter() - start) / calls)
    return statistics.median(secs)


def repetitions(small: bool) -> dict[str, int]:
    """Returns the arguments `rounds` and `calls` of `secs_of_call`."""
    return {"rounds": 1, "calls": 1} if small else {"rounds": 5, "calls": 10}
