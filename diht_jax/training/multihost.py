"""Agreement between the processes of a job, so that all of them go on or all of them stop.

Start-up is `diht_jax.distributed`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from diht_jax.training.stopping import LASTING_EXIT_CODE, TemporaryError, exit_status

_LONGEST_TEXT_BYTES = 4096

Checked = TypeVar("Checked")


def gather_texts(text: str, longest_bytes: int = _LONGEST_TEXT_BYTES) -> list[str]:
    """The texts of all processes, in their order, on each of them. All must call.

    Args:
        text: of this process.
        longest_bytes: what is longer is cut off; the same in all processes.
    """
    if jax.process_count() == 1:
        return [text]
    data = text.encode()[:longest_bytes]
    padded = np.zeros(longest_bytes, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def first_text(text: str | None) -> str | None:
    """The first text that any process has, the same on all of them. All must call."""
    return next(filter(None, gather_texts(text or "")), None)


def check_together(check: Callable[[], Checked]) -> Checked:
    """Runs a check in every process; where it fails in one of them, all of them raise.

    Returns:
        What the check of this process returned.

    Raises:
        ValueError: with the text of the first one's; a `TemporaryError` where that one may be
            gone the next time.
    """
    problem, cause, result = None, None, None
    try:
        result = check()
    except ValueError as error:
        is_lasting = exit_status(error) == LASTING_EXIT_CODE
        problem, cause = f"{'lasting' if is_lasting else 'temporary'}:{error}", error
    problem = first_text(problem)
    if problem is None:
        return result
    if jax.process_count() == 1:
        raise cause
    kind, _, text = problem.partition(":")
    raise (ValueError if kind == "lasting" else TemporaryError)(text) from cause


def wait_for_all(name: str) -> None:
    """Returns when all processes have called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
