"""How the processes of a job agree, so that all go on or all stop, and how they end.

A run ends by a signal, so that the same command goes on, or by an error. SIGTERM (what Slurm,
Kubernetes and the clouds send before they take a machine away) and the first SIGINT let the step at
hand finish; the loop then saves, and the command exits with `EXIT_CODE`. A second SIGINT aborts at
once; any other signal changes nothing until the state is saved. In a job of several processes JAX's
coordination service passes either on, so that all stop after the same step, whichever of them was
signalled. All processes must call each function that compares, sends or waits. Start-up is
`diht_jax.distributed`'s.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from diht_jax.storage import files

# EX_TEMPFAIL of sysexits.h: try the same again.
EXIT_CODE = 75
# EX_CONFIG of sysexits.h: the same command would end with the same error.
LASTING_EXIT_CODE = 78
# In the work directory, where a process of a job of several has ended for good.
_MARKER = "ended.json"
# Errors of the operating system that nothing but a change by the user mends.
_LASTING_OS_ERRORS = (
    FileNotFoundError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
)

Result = TypeVar("Result")


class TemporaryError(ValueError):
    """The same command may succeed the next time."""


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(*sizes, 1), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


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
    if len(set(texts)) > 1:
        others = [str(number) for number, other in enumerate(texts) if other != texts[0]]
        raise ValueError(describe(texts, ", ".join(others)))


def check_together(check: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Calls `check(*arguments, **options)` in every process; where one fails, all of them raise.

    Returns:
        What the check of this process returned.

    Raises:
        ValueError: with the text of the first one's; a `TemporaryError` where that one may be
            gone the next time.
    """
    problem: str | None = None
    cause: Exception | None = None
    result: Any = None
    try:
        result = check(*arguments, **options)
    except Exception as error:  # the other processes must not wait for this one
        kind = "lasting" if exit_status(error) == LASTING_EXIT_CODE else "temporary"
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        problem, cause = f"{kind}:{name}{error}", error
    problem = first_text(problem)
    if problem is None:
        return result
    if jax.process_count() == 1 and cause is not None:
        raise cause
    kind, _, text = problem.partition(":")
    raise (ValueError if kind == "lasting" else TemporaryError)(text) from cause


def share_from_first(read: Callable[[], Any]) -> Any:
    """Calls a function in the first process, and gives its JSON-able result in all of them.

    Raises:
        ValueError: the function has failed; with its text.
    """
    if jax.process_count() == 1:
        return read()
    own = check_together(lambda: json.dumps(read()) if jax.process_index() == 0 else "")
    return json.loads(gather_texts(own)[0])


def check_same_step(step: int | None) -> None:
    """Refuses a job whose processes have each read a model, and not all that of one step."""
    check_same(
        str(step),
        lambda steps, _: (
            f"--model: the processes have read checkpoints of steps {', '.join(steps)}, as the run "
            "goes on; name one by --step"
        ),
    )


class Stopped(Exception):
    """The run was asked to stop, and has saved its state.

    Attributes:
        input_stalls: a thread may wait for its input for ever, so nothing should wait for it.
    """

    def __init__(self, message: str, *, input_stalls: bool = False):
        super().__init__(message)
        self.input_stalls = input_stalls


def exit_status(error: BaseException) -> int:
    """The exit status of a run that ends with this error.

    Returns:
        `LASTING_EXIT_CODE` for wrong config and input, for a run that has diverged and for one
        whose state or first step does not fit into memory (`without_memory_is_lasting`); 1 for what
        may have gone when the same command runs again: a full disk, a store or process that cannot
        be reached, a work directory that another run still holds, and all errors of other types
        than `ValueError` and `FileNotFoundError`.
    """
    if not isinstance(error, ValueError | FileNotFoundError):
        return 1
    chain = error_chain(error)
    if any(isinstance(link, _LASTING_OS_ERRORS) for link in chain):
        return LASTING_EXIT_CODE
    is_temporary = any(isinstance(link, OSError | TemporaryError) for link in chain)
    return 1 if is_temporary else LASTING_EXIT_CODE


def job_status(error: Exception, workdir: str) -> int:
    """The exit status of one process of several, which may know of the error alone.

    A process that ends for good leaves the reason in the work directory. The others find it there
    once they have lost that process, or wait for it at their next start, and end for good as well:
    a loop around their command would go on for ever.

    Args:
        workdir: of the run, on a disk or in a store that all processes see.
    """
    marker, status = files.join(workdir, _MARKER), exit_status(error)
    try:
        if status == LASTING_EXIT_CODE:
            files.make_folder(workdir)
            files.write_object(marker, {"process": jax.process_index(), "error": str(error)})
        elif (found := files.read_object(marker)) is not None:
            logging.error("process %s has ended for good: %s", found["process"], found["error"])
            return LASTING_EXIT_CODE
    except OSError as failure:
        logging.warning("%s: %s", marker, failure)
    return status


def begin_job(workdir: str, process: int | None = None) -> None:
    """Forgets how a job of several processes ended before.

    Args:
        process: number of the one that calls; what another one has left then stays, which may not
            have been started again. None once all are there.
    """
    marker = files.join(workdir, _MARKER)
    if process is None or (files.read_object(marker) or {}).get("process") == process:
        files.remove(marker)


def error_chain(error: BaseException) -> list[BaseException]:
    """An error and its causes, the innermost last."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return chain


@contextlib.contextmanager
def without_memory_is_lasting(is_running: Callable[[], bool]) -> Generator[None]:
    """Makes an error of a run whose state or first step does not fit into memory a lasting one.

    Raises:
        ValueError: for XLA's "RESOURCE_EXHAUSTED" before that.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if is_running() or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"state and step do not fit into the devices' memory: {str(error)[:500]}\nLower "
            "config.micro_batch or config.data.batch_size, take config.model.remat='minimal' or "
            "'full', or split the parameters by config.mesh.fsdp"
        ) from error


class StopRequest(contextlib.ExitStack):
    """Knows whether to stop; a context that gives the signals back when it ends."""

    _requested = _interrupted = False
    # Of this process, in all its runs: the service compares numbers, and steps begin anew in the
    # next stage.
    _looks = itertools.count(1)

    def listen(self) -> None:
        """Takes over the signals; until then they end the process, which has nothing to save."""
        # Only a main thread may; elsewhere (in a notebook's thread) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            # JAX's own handler of SIGTERM passes it on to the other processes.
            handled = (
                [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            )
            for number in handled:
                self.callback(signal.signal, number, signal.signal(number, self._remember))

    def is_due(self) -> bool:
        """Returns whether to save and stop after this step; the same answer in all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(self._looks))
        return self._requested

    def is_waiting(self) -> bool:
        """Returns whether to stop before the next step, if its batch does not come.

        Never in a job of several processes: all of them stop after the same step, and the others
        may be in the middle of it.
        """
        return self._requested and jax.process_count() == 1

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
