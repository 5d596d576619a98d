"""Agreement between the processes of a job, so that all of them go on or all of them stop.

Start-up is `diht_jax.distributed`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diht_jax.training.stopping import LASTING_EXIT_CODE, TemporaryError, exit_status

_LONGEST_TEXT_BYTES = 4096
_LONGEST_WORK_MS = 7 * 24 * 60 * 60 * 1000

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


def work_together(work: Callable[[], Checked]) -> Checked:
    """Like `check_together`, for work that may take one process hours longer than another.

    They meet at a barrier of the coordination service first: a collective fails where a process
    comes late, with Gloo after half a minute.
    """
    result, problem = None, None
    try:
        result = work()
    except ValueError as error:
        problem = error
    if jax.process_count() > 1:
        import orbax.checkpoint.multihost

        if problem is not None:
            logging.error("%s (the job ends when the other processes are through)", problem)
        meet = orbax.checkpoint.multihost.get_barrier_sync_fn()
        meet(key="work_together", timeout_ms=_LONGEST_WORK_MS)

    def finish() -> Checked:
        if problem is not None:
            raise problem
        return result

    return check_together(finish)


def share_from_first(read: Callable[[], bytes]) -> bytes:
    """Calls a function in the first process, and gives its result in all of them. All must call.

    Raises:
        ValueError: the function has failed; with its text.
    """
    data = b""

    def read_in_first() -> None:
        nonlocal data
        try:
            data = read() if jax.process_index() == 0 else b""
        except Exception as error:
            # Any kind of error: the other processes must not wait for data that never come.
            if isinstance(error, ValueError) or jax.process_count() == 1:
                raise
            raise ValueError(f"{type(error).__name__}: {error}") from error

    check_together(read_in_first)
    if jax.process_count() == 1:
        return data
    # As two numbers, since JAX takes integers to 32 bits.
    size = multihost_utils.broadcast_one_to_all(np.array(divmod(len(data), 2**20), np.int32))
    padded = np.zeros(int(size[0]) * 2**20 + int(size[1]), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def share_for(mesh: Mesh | None) -> Callable[[Callable[[], bytes]], bytes]:
    """`share_from_first` where a mesh has devices of several processes; else just the call."""
    if mesh is not None and mesh.is_multi_process:
        return share_from_first
    return lambda read: read()


def check_same_step(step: int | None) -> None:
    """Refuses a job whose processes have each read a model, and not all that of one step.

    Args:
        step: of this process's model; None where it is of no run. All processes must call.

    Raises:
        ValueError: names the steps.
    """
    steps = gather_texts(str(step))
    if len(set(steps)) > 1:
        raise ValueError(
            f"--model: the processes have read checkpoints of steps {', '.join(steps)}, as the run "
            "goes on; name one by --step"
        )


def wait_for_all(name: str) -> None:
    """Returns when all processes have called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
