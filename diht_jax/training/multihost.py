"""Agreement between the processes of a job, so that all of them go on or all of them stop.

Start-up is `diht_jax.distributed`'s. All processes must call each of these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diht_jax.training.stopping import LASTING_EXIT_CODE, TemporaryError, exit_status

_LONGEST_TEXT_BYTES = 2**16

Result = TypeVar("Result")


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, in their order; each is cut off after 64 KiB."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()[:_LONGEST_TEXT_BYTES]
    padded = np.zeros(_LONGEST_TEXT_BYTES, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def first_text(text: str | None) -> str | None:
    """The first text that any process has, the same on all of them."""
    return next(filter(None, gather_texts(text or "")), None)


def check_same(text: str, describe: Callable[[list[str], str], str]) -> None:
    """Refuses a job whose processes have different texts.

    Args:
        describe: makes the message from all texts and the numbers of the processes that differ
            from the first one, such as "1, 3".
    """
    texts = gather_texts(text)
    others = [str(number) for number, other in enumerate(texts) if other != texts[0]]
    if others:
        raise ValueError(describe(texts, ", ".join(others)))


def check_together(check: Callable[[], Result]) -> Result:
    """Runs a check in every process; where it fails in one of them, all of them raise.

    Returns:
        What the check of this process returned.

    Raises:
        ValueError: with the text of the first one's; a `TemporaryError` where that one may be
            gone the next time.
    """
    problem: str | None = None
    cause: ValueError | None = None
    result: Any = None
    try:
        result = check()
    except ValueError as error:
        is_lasting = exit_status(error) == LASTING_EXIT_CODE
        problem, cause = f"{'lasting' if is_lasting else 'temporary'}:{error}", error
    problem = first_text(problem)
    if problem is None:
        return result
    if jax.process_count() == 1 and cause is not None:
        raise cause
    kind, _, text = problem.partition(":")
    raise (ValueError if kind == "lasting" else TemporaryError)(text) from cause


def share_from_first(read: Callable[[], bytes]) -> bytes:
    """Calls a function in the first process, and gives its result in all of them.

    Raises:
        ValueError: the function has failed; with its text.
    """
    if jax.process_count() == 1:
        return read()

    def read_in_first() -> bytes:
        try:
            return read() if jax.process_index() == 0 else b""
        except ValueError:
            raise
        except Exception as error:  # the other processes must not wait for data that never come
            raise ValueError(f"{type(error).__name__}: {error}") from error

    data = check_together(read_in_first)
    padded = np.zeros(int(gather_texts(str(len(data)))[0]), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def share_for(mesh: Mesh | None) -> Callable[[Callable[[], bytes]], bytes]:
    """`share_from_first` where a mesh has devices of several processes; else just the call."""
    if mesh is not None and mesh.is_multi_process:
        return share_from_first
    return lambda read: read()


def check_same_step(step: int | None) -> None:
    """Refuses a job whose processes have each read a model, and not all that of one step."""
    check_same(
        str(step),
        lambda texts, _: (
            f"--model: the processes have read checkpoints of steps {', '.join(texts)}, as the run "
            "goes on; name one by --step"
        ),
    )


def wait_for_all(name: str) -> None:
    """Returns when all processes have called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
