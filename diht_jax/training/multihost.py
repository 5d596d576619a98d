"""Agreement among the processes of a job: checks, shared values, signals and exit codes.

A run ends either after a signal, and the same command resumes it, or with an error. SIGTERM (which
Slurm, Kubernetes and clouds send before they take a machine away) and the first SIGINT let the
current step finish; the loop then saves, and the command exits with `EXIT_CODE`. A second SIGINT
aborts at once; any other signal has no effect until the state is saved. In a job of several
processes, JAX's coordination service broadcasts these signals, so all processes stop after the same
step. All processes must call each function that compares, sends or waits. `diht_jax.distributed`
starts the job.
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

# EX_TEMPFAIL of sysexits.h: the same command may succeed later.
EXIT_CODE = 75
# EX_CONFIG of sysexits.h: the same command would fail with the same error.
LASTING_EXIT_CODE = 78
# Written to the work directory if a process of a multi-process job has failed permanently.
_MARKER = "ended.json"
# Errors of the operating system that persist until the user changes something.
_LASTING_OS_ERRORS = (
    FileNotFoundError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
)

Result = TypeVar("Result")


class TemporaryError(ValueError):
    """An error after which the same command may succeed the next time."""


def gather_texts(text: str) -> list[str]:
    """Returns the texts of all processes, in process order."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(*sizes, 1), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def first_text(text: str | None) -> str | None:
    """Returns the first text that is not None; the same on all processes."""
    return next(filter(None, gather_texts(text or "")), None)


def check_same(text: str, describe: Callable[[list[str], str], str]) -> None:
    """Raises an error if the processes of a job have different texts.

    Args:
        describe: makes the message from all texts and the numbers of the processes that differ
            from the first one, such as "1, 3".
    """
    texts = gather_texts(text)
    if len(set(texts)) > 1:
        others = [str(number) for number, other in enumerate(texts) if other != texts[0]]
        raise ValueError(describe(texts, ", ".join(others)))


def check_together(check: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Calls `check(*arguments, **options)` in every process; if one fails, all raise.

    Returns:
        The result of the check in this process.

    Raises:
        ValueError: has the message of the first failed process; a `TemporaryError` if that
            error may not recur.
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
    """Calls a function in the first process; returns its JSON-able result in all processes.

    Raises:
        ValueError: the function failed; has its message.
    """
    if jax.process_count() == 1:
        return read()
    own = check_together(lambda: json.dumps(read()) if jax.process_index() == 0 else "")
    return json.loads(gather_texts(own)[0])


def check_same_step(step: int | None) -> None:
    """Raises an error if the processes of a job have read models of different steps."""
    check_same(
        str(step),
        lambda steps, _: (
            f"--model: the processes have read checkpoints of steps {', '.join(steps)}, as the run "
            "goes on; name one by --step"
        ),
    )


class Stopped(Exception):
    """The run was asked to stop and has saved its state.

    Attributes:
        input_stalls: whether a thread may block on its input forever, so that nothing should join.
    """

    def __init__(self, message: str, *, input_stalls: bool = False):
        super().__init__(message)
        self.input_stalls = input_stalls


def exit_status(error: BaseException) -> int:
    """Returns the exit status of a run that ends with this error.

    Returns:
        `LASTING_EXIT_CODE` for wrong config and input, for a diverged run, and for one whose state
        or first step does not fit into memory (`without_memory_is_lasting`). 1 for errors that may
        not recur when the command runs again: a full disk, an unreachable store or process, a
        work directory that another run still holds, and errors of any type other than
        `ValueError` and `FileNotFoundError`.
    """
    if not isinstance(error, ValueError | FileNotFoundError):
        return 1
    chain = error_chain(error)
    if any(isinstance(link, _LASTING_OS_ERRORS) for link in chain):
        return LASTING_EXIT_CODE
    is_temporary = any(isinstance(link, OSError | TemporaryError) for link in chain)
    return 1 if is_temporary else LASTING_EXIT_CODE


def job_status(error: Exception, workdir: str) -> int:
    """Returns the exit status of one process of several, which may be alone with its error.

    A process with a permanent error leaves the reason in the work directory. The others find it
    there when they lose that process, or wait for it at their next start, and then also exit
    permanently. Otherwise a loop around their command would never end.

    Args:
        workdir: of the run, on a disk or in a store that all processes can see.
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
    """Clears the record of how a job of several processes ended before.

    Args:
        process: number of the calling process; records of others stay, since those may not have
            been restarted yet. None once all processes are there.
    """
    marker = files.join(workdir, _MARKER)
    if process is None or (files.read_object(marker) or {}).get("process") == process:
        files.remove(marker)


def error_chain(error: BaseException) -> list[BaseException]:
    """Returns an error and its causes, innermost last."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return chain


@contextlib.contextmanager
def without_memory_is_lasting(is_running: Callable[[], bool]) -> Generator[None]:
    """Turns out-of-memory errors of the state or the first step into permanent errors.

    Raises:
        ValueError: XLA reported "RESOURCE_EXHAUSTED" before `is_running` was true.
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
    """Tells whether to stop; as a context, it restores the signal handlers on exit."""

    _requested = _interrupted = False
    # Counts over all runs of this process: the service compares numbers, and steps restart in the
    # next stage.
    _looks = itertools.count(1)

    def listen(self) -> None:
        """Installs the handlers; before, signals end the process, which has nothing to save."""
        # Only the main thread may; elsewhere (a notebook's thread) signals are not handled.
        if threading.current_thread() is threading.main_thread():
            # JAX's own SIGTERM handler notifies the other processes.
            handled = (
                [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            )
            for number in handled:
                self.callback(signal.signal, number, signal.signal(number, self._remember))

    def is_due(self) -> bool:
        """Returns whether to save and stop after this step; the same on all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(self._looks))
        return self._requested

    def is_waiting(self) -> bool:
        """Returns whether to stop before the next step if its batch does not come.

        Always false in a job of several processes: they all stop after the same step, and the
        others may be in the middle of it.
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
            # The coordination service only knows SIGTERM.
            os.kill(os.getpid(), signal.SIGTERM)
        logging.warning(
            "%s: stopping after this step; the same command goes on from there",
            signal.Signals(number).name,
        )
