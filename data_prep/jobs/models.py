"""Models that a task uses: in the worker's own process, or in actors that share the GPUs.

A task asks for a model with `open_model` and need not know which of the two it gets.

On a Ray cluster models are in actors of their own, several a GPU, shared by all workers. Ray starts
them wherever the cluster has room, also on nodes that join, and restarts those that die. A worker
sends batches to several of them at a time, and no more than a few, so that a slow GPU holds up the
reading instead of filling the memory. When a model actor dies, whoever waits for it sends its batch
to another one: a call depends on its arguments alone.

Ray is imported only where it is in use. What a model computes is not known here.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from absl import logging

from data_prep.jobs.workers import POLL_SECS, ProcessDeath

# Batches that a worker has under way: one computes, the others travel or wait.
_MAX_UNDER_WAY = 4
# Model actors that may die of a batch before the batch is taken to be the reason.
_MAX_DEATHS = 3
_WAITING_SECS = 60.0

# Makes a model ready, once per process however often it is called; picklable.
Load = Callable[[], Any]


class LocalModel:
    """A model in this process; `SharedModel` is one that runs elsewhere, with the same method."""

    def __init__(self, load: Load):
        self._load = load

    def map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Calls a method many times, and yields the results in the order of the calls.

        Args:
            method: of what `load` returns; a function of its arguments alone.
            calls: the arguments of each call, taken as they are needed.
        """
        function = getattr(self._load(), method)
        for arguments in calls:
            yield function(*arguments)


_open: Callable[[Load], Any] = LocalModel


def open_model(load: Load) -> LocalModel | SharedModel:
    """The model that a task should use."""
    return _open(load)


def is_shared() -> bool:
    """Tells whether models run in other processes than this one."""
    return _open is not LocalModel


def share_models(opened: Callable[[Load], SharedModel]) -> None:
    """Lets all later tasks of this process use models that run elsewhere."""
    global _open
    _open = opened


class ClusterActor:
    """A process of the cluster, in the folder of the job where there is one."""

    def __init__(self, folder: str):
        self.hint = ""  # for errors of tasks and models
        try:
            os.chdir(folder)
        except OSError as error:
            self.hint = (
                f"; the job runs in '{folder}', which node {platform.node()} lacks "
                f"({error.strerror}): name input, output and models by absolute paths or URLs"
            )

    def start(self) -> bool:
        """Answers when the process has started."""
        return True


class _ModelActor(ClusterActor):
    """Holds models."""

    def call(self, load: Load, method: str, arguments: tuple[Any, ...]) -> Any:
        """Calls a method of the model that `load` gives."""
        try:
            model = load()
        except ValueError as error:
            raise ValueError(f"{error}{self.hint}") from error
        return getattr(model, method)(*arguments)


def start_models(ray: Any, count: int, gpus_each: float) -> list[Any]:
    """Asks for the model actors; each starts as soon as the cluster has room for it."""
    options: dict[str, Any] = {}
    if gpus_each:
        # Else JAX takes three quarters of a GPU's memory at once, which the other actors of the
        # GPU need, and in the same actor the text spotter, whose networks are of torch.
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if gpus_each < 1:
            memory["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus_each:.2f}"
        options["runtime_env"] = {"env_vars": memory}
    # Without CPUs: the GPUs limit them, and workers cannot take their room.
    remote = ray.remote(num_cpus=0, num_gpus=gpus_each, max_restarts=-1, **options)(_ModelActor)
    return [remote.remote(os.getcwd()) for _ in range(count)]


class ModelActors:
    """The model actors as a worker sees them: those that answer, and those that were asked to."""

    def __init__(self, actors: Sequence[Any]):
        import ray

        self._ray = ray
        self._ready: list[Any] = []
        self._asked: dict[Any, Any] = {actor.start.remote(): actor for actor in actors}

    def ask_again(self) -> None:
        """Trusts none before it has answered anew: a lost node takes several at once."""
        self._asked |= {actor.start.remote(): actor for actor in self._ready}
        self._ready = []

    def choose(self, busy: Iterable[Any]) -> Any:
        """Chooses the ready actor with the fewest calls under way; waits until one is ready.

        Raises:
            ValueError: none can start.
        """
        began_secs = time.monotonic()
        self._take_answers(timeout_secs=0)
        while not self._ready:
            self._take_answers(timeout_secs=POLL_SECS)
            if time.monotonic() - began_secs > _WAITING_SECS:
                began_secs = time.monotonic()
                logging.warning(
                    "no model actor has started for %.0f s; the cluster has free: %s",
                    _WAITING_SECS,
                    self._ray.available_resources(),
                )
        loads = collections.Counter(busy)
        return min(self._ready, key=lambda actor: (loads[actor], random.random()))

    def _take_answers(self, timeout_secs: float) -> None:
        known, references = self._ray.exceptions, list(self._asked)
        if not references:
            return
        count = 1 if timeout_secs else len(references)
        answered, _ = self._ray.wait(references, num_returns=count, timeout=timeout_secs)
        for reference in answered:
            actor = self._asked.pop(reference)
            try:
                self._ray.get(reference)
                self._ready.append(actor)
            except known.ActorUnavailableError:  # until Ray has restarted it
                time.sleep(POLL_SECS)
                self._asked[actor.start.remote()] = actor
            except known.RayError as error:
                if not (self._asked or self._ready):
                    raise ValueError(f"no model actor could start: {error}") from error


@dataclasses.dataclass(eq=False)
class _Call:
    """A call that is under way."""

    arguments: Any
    actor: Any = None
    result: Any = None


class SharedModel:
    """Stands in a worker for a model that the model actors hold."""

    def __init__(self, load: Load, actors: ModelActors):
        import ray

        self._ray = ray
        self._load = ray.put(load)
        self._actors = actors

    def map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Like `LocalModel.map`.

        Raises:
            ProcessDeath: several model actors have died of one call.
        """
        under_way: collections.deque[_Call] = collections.deque()
        for arguments in calls:
            call = _Call(self._ray.put(arguments))
            self._send(call, method, under_way)
            under_way.append(call)
            if len(under_way) == _MAX_UNDER_WAY:
                yield self._receive(method, under_way)
        while under_way:
            yield self._receive(method, under_way)

    def _send(self, call: _Call, method: str, under_way: Iterable[_Call]) -> None:
        call.actor = self._actors.choose(other.actor for other in under_way)
        call.result = call.actor.call.remote(self._load, method, call.arguments)

    def _receive(self, method: str, under_way: collections.deque[_Call]) -> Any:
        """The result of the first call."""
        call = under_way.popleft()
        for deaths in range(1, _MAX_DEATHS + 1):
            try:
                return self._ray.get(call.result)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error  # of the model itself, as if it had run here
            except self._ray.exceptions.RayError as error:
                if deaths == _MAX_DEATHS:
                    reason = " ".join(str(error).split())
                    raise ProcessDeath(
                        f"{_MAX_DEATHS} model actors died of one batch: {reason}"
                    ) from error
            logging.warning("a model actor died, or its node was lost; others take its batches")
            self._actors.ask_again()
            self._send(call, method, under_way)
        raise AssertionError("the last attempt returns or raises")
