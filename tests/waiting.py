"""Waiting in tests for what other processes do, without a look at the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

# Slept at most, only against hanging: a busy machine may be slow, and still be right.
_LONGEST_SECS = 900


def wait_until(
    condition: Callable[[], object],
    *,
    pause_secs: float = 0.05,
    longest_secs: float = _LONGEST_SECS,
) -> None:
    """Returns once the condition holds; AssertionError if it does not after so much sleep.

    Args:
        condition: looked at again and again.
        pause_secs: slept between two looks.
        longest_secs: slept altogether.
    """
    for _ in range(round(longest_secs / pause_secs)):
        if condition():
            return
        time.sleep(pause_secs)
    raise AssertionError("waited in vain")
