"""Waits in tests for other processes without reading the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

# Maximum sleep in total, to protect against hanging: a slow machine must not fail a test.
_LONGEST_SECS = 900


def wait_until(
    condition: Callable[[], object],
    *,
    pause_secs: float = 0.05,
    longest_secs: float = _LONGEST_SECS,
) -> None:
    """Returns once the condition holds; AssertionError if it fails for `longest_secs`.

    Args:
            condition: Polled repeatedly.
            pause_secs: Sleep between two polls.
            longest_secs: Total sleep before the error.
    """
    for _ in range(round(longest_secs / pause_secs)):
        if condition():
            return
        time.sleep(pause_secs)
    raise AssertionError("waited in vain")
