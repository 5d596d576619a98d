"""Models used by tasks: in the worker's own process, or in actors that share the GPUs.

A task opens a model with `open_model`, and works with either of the two.

On a Ray cluster, models run in separate actors, several per GPU, shared by all workers. Ray starts
them wherever the cluster has room, including nodes that join later, and restarts them after a
death. A worker has at most `_MAX_UNDER_WAY` batches in flight, so a slow GPU delays reading
instead of filling the memory. When a model actor dies, each waiting worker sends its batch to
another one, because a call depends on its arguments only.

Ray is imported only when it is used. This module does not know what the models compute.
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

# Batches in flight per worker: one is computed, the others are transferred or wait.
_MAX_UNDER_WAY = 4
# Number of model actors that may die of a batch before the batch is blamed.
_MAX_DEATHS = 3
_WAITING_SECS = 60.0

# Returns a model that is loaded once per process, however often it is called; picklable.
Load = Callable[[], Any]


class LocalModel:
    """Model in this process; `SharedModel` has the same method for a model in model actors."""

    def __init__(self, load: Load):
        self._load = load

    def map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Calls a method many times, and yields the results in the order of the calls.

        Args:
            method: name of a method of the model; its result depends on its arguments only.
            calls: the arguments of each call, consumed lazily.
        """
        function = getattr(self._load(), method)
        for arguments in calls:
            yield function(*arguments)


_actors: ModelActors | None = None  # shared by the workers, if there are any


def open_model(load: Load) -> LocalModel | SharedModel:
    """Returns the model that a task should use."""
    return LocalModel(load) if _actors is None else SharedModel(load, _actors)


def is_shared() -> bool:
    """Returns whether models run in other processes than this one."""
    return _actors is not None


def share_models(actors: Sequence[Any]) -> None:
    """Makes all later tasks of this process use models in these actors."""
    global _actors
    _actors = ModelActors(actors)


class ClusterActor:
    """Actor that runs in the folder of the job, if its node has that folder."""

    def __init__(self, folder: str):
        self.hint = ""  # appended to errors of tasks and models
        try:
            os.chdir(folder)
        except OSError as error:
            self.hint = (
                f"; the job runs in '{folder}', which node {platform.node()} lacks "
                f"({error.strerror}): name input, output and models by absolute paths or URLs"
            )

    def start(self) -> bool:
        """Returns once the process has started."""
        return True


class _ModelActor(ClusterActor):
    """Actor that holds models."""

    def call(self, load: Load, method: str, arguments: tuple[Any, ...]) -> Any:
        """Calls a method of the model returned by `load`."""
        try:
            model = load()
        except ValueError as error:
            raise ValueError(f"{error}{self.hint}") from error
        return getattr(model, method)(*arguments)


def start_models(ray: Any, count: int, gpus_each: float) -> list[Any]:
    """Requests the model actors; each starts as soon as the cluster has room for it."""
    options: dict[str, Any] = {}
    if gpus_each:
        # By default JAX takes three quarters of a GPU's memory, which is needed by other actors on
        # the GPU and by the torch networks of the text spotter in the same actor.
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if gpus_each < 1:
            memory["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus_each:.2f}"
        options["runtime_env"] = {"env_vars": memory}
    # No CPUs: the GPUs limit the number of actors, and workers cannot take their place.
    remote = ray.remote(num_cpus=0, num_gpus=gpus_each, max_restarts=-1, **options)(_ModelActor)
    return [remote.remote(os.getcwd()) for _ in range(count)]


class ModelActors:
    """Model actors from the view of a worker: those that are ready, and those not yet started."""

    def __init__(self, actors: Sequence[Any]):
        import ray

        self._ray = ray
        self._ready: list[Any] = []
        self._asked: dict[Any, Any] = {actor.start.remote(): actor for actor in actors}

    def ask_again(self) -> None:
        """Marks all actors as not ready until they answer again; a lost node may take several."""
        self._asked |= {actor.start.remote(): actor for actor in self._ready}
        self._ready = []

    def choose(self, busy: Iterable[Any]) -> Any:
        """Returns the ready actor with the fewest calls in flight; waits until one is ready.

        Raises:
            ValueError: no actor can start.
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
            except known.ActorUnavailableError:  # while Ray restarts it
                time.sleep(POLL_SECS)
                self._asked[actor.start.remote()] = actor
            except known.RayError as error:
                if not (self._asked or self._ready):
                    raise ValueError(f"no model actor could start: {error}") from error


@dataclasses.dataclass(eq=False)
class _Call:
    """A call in flight."""

    arguments: Any
    actor: Any = None
    result: Any = None


class SharedModel:
    """Proxy in a worker for a model that runs in the model actors."""

    def __init__(self, load: Load, actors: ModelActors):
        import ray

        self._ray = ray
        self._load = ray.put(load)
        self._actors = actors

    def map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Like `LocalModel.map`.

        Raises:
            ProcessDeath: several model actors died of one call.
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
        """Returns the result of the oldest call; sends it again if its actor died."""
        call = under_way.popleft()
        for deaths in range(1, _MAX_DEATHS + 1):
            try:
                return self._ray.get(call.result)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error  # raised by the model itself, as in a local call
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
