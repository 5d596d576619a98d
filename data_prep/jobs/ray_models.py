"""Models in actors of their own on a Ray cluster: several a GPU, shared by all workers.

The driver starts model actors wherever the cluster has room for one, and goes on to do so while
the job runs (`ModelPool`). A list of them lies in an actor (`_Roster`), which every worker asks now
and then; a worker sends batches to several of them at a time, and no more than a few, so that a
slow GPU holds up the reading instead of filling the memory (`RemoteModel`). When a model actor
dies, whoever waits for it sends its batch to another one: a call depends on its arguments alone.

Ray is imported only where it is in use. What a model computes is not known here.
"""

from __future__ import annotations

import collections
import contextlib
import os
import platform
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from data_prep.jobs.models import Load
from data_prep.jobs.progress import POLL_SECS, ProcessDeath

# Batches that a worker has under way: one computes, the others travel or wait.
_MAX_UNDER_WAY = 4
# Model actors that may die of a batch before the batch is taken to be the reason.
_MAX_DEATHS = 3
_MAX_FAILED_STARTS = 3  # in a row


def is_node_loss(ray: Any, error: Exception) -> bool:
    """Whether an actor is gone, or its answer, because its node is: not of what the actor did.

    Args:
        ray: the module.
        error: that Ray has raised.
    """
    known = ray.exceptions
    # A node that does not answer is called unavailable until Ray gives it up, and its actors are
    # ended by whoever has started them.
    lost = known.NodeDiedError | known.ActorUnavailableError | known.ObjectLostError
    reasons = ("node has died", "killed by `ray.kill`")
    return isinstance(error, lost) or any(reason in str(error) for reason in reasons)


class _ModelActor:
    """Holds models; one object lives in one process of the cluster."""

    def __init__(self, folder: str):
        """Runs in the folder of the job where there is one, so that relative paths mean the same.

        Args:
            folder: in which the driver runs.
        """
        self._no_folder = ""
        try:
            os.chdir(folder)
        except OSError as error:
            self._no_folder = f"; the job runs in '{folder}', which node {platform.node()} lacks"
            self._no_folder += f" ({error.strerror}): name models by absolute paths or URLs"

    def wait(self) -> None:
        """Never returns, so that an answer means the end of the actor."""
        threading.Event().wait()

    def is_ready(self) -> bool:
        return True

    def call(self, load: Load, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            model = load()
        except ValueError as error:
            raise ValueError(f"{error}{self._no_folder}") from error
        return getattr(model, method)(*arguments)


class _Roster:
    """The model actors that are there, for the workers to ask."""

    def __init__(self):
        self._actors: list[Any] = []
        self._was_asked = False

    def was_asked(self) -> bool:
        return self._was_asked

    def set(self, actors: list[Any]) -> None:
        self._actors = actors

    def get(self) -> list[Any]:
        self._was_asked = True
        return self._actors


class ModelPool:
    """The model actors of one run, as the driver sees them; none before a worker asks for one."""

    def __init__(self, ray: Any, most: int, gpus_each: float):
        """Starts the list of them.

        Args:
            ray: the module.
            most: actors at most.
            gpus_each: GPUs, or a part of one, that each reserves and sees.
        """
        self._ray = ray
        self._most = most
        self._gpus_each = gpus_each
        self._starting: dict[Any, Any] = {}  # by the reference that comes when it is ready
        self._ends: dict[Any, Any] = {}  # of those that are ready, by the reference of their end
        self._failed_starts = 0
        self.is_wanted = False
        self.roster = ray.remote(
            num_cpus=0,
            # On the node of the driver, so that it lives as long as the job.
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            ),
        )(_Roster).remote()

    def __len__(self) -> int:
        return len(self._ends)

    def refresh(self) -> None:
        """Takes account of actors that are ready or have died, and starts more where room is.

        Raises:
            ValueError: none of them can start.
        """
        self.is_wanted = self.is_wanted or self._ray.get(self.roster.was_asked.remote())
        if not self.is_wanted:
            return
        changed = self._take_ready() + self._take_ended()
        if changed:
            self._ray.get(self.roster.set.remote(list(self._ends.values())))
        while len(self._starting) + len(self._ends) < min(self._most, self._count_room()):
            self._start()

    def stop(self) -> None:
        """Ends all actors."""
        for actor in (*self._starting.values(), *self._ends.values(), self.roster):
            self._ray.kill(actor)

    def _count_room(self) -> int:
        if not self._gpus_each:
            return self._most
        # Added up over the nodes, since a part of a GPU must lie on one.
        per_gpu = int(1 / self._gpus_each + 1e-9)
        rooms = [
            int(gpus) * per_gpu if per_gpu else int(gpus / self._gpus_each)
            for node in self._ray.nodes()
            if node["Alive"] and (gpus := node["Resources"].get("GPU", 0))
        ]
        return sum(rooms)

    def _start(self) -> None:
        options: dict[str, Any] = {}
        if self._gpus_each:
            # Else JAX takes three quarters of a GPU's memory at once, which the other actors of the
            # GPU need, and in the same actor the text spotter, whose networks are of torch.
            memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            if self._gpus_each < 1:
                memory["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * self._gpus_each:.2f}"
            options["runtime_env"] = {"env_vars": memory}
        actor_class = self._ray.remote(
            num_cpus=0,  # the GPUs limit them, and workers cannot take their room
            num_gpus=self._gpus_each,
            max_restarts=0,
            concurrency_groups={"life": 1},
            **options,
        )(_ModelActor)
        actor = actor_class.remote(os.getcwd())
        self._starting[actor.is_ready.remote()] = actor

    def _find_answered(self, references: Mapping[Any, Any]) -> list[Any]:
        """Those to which an answer, or an error, has come."""
        if not references:
            return []
        return self._ray.wait(list(references), num_returns=len(references), timeout=0)[0]

    def _take_ready(self) -> int:
        ready = self._find_answered(self._starting)
        for reference in ready:
            actor = self._starting.pop(reference)
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                self._failed_starts += not is_node_loss(self._ray, error)
                if self._failed_starts >= _MAX_FAILED_STARTS and not self._ends:
                    raise ValueError(f"no model actor could start: {error}") from error
                continue
            self._failed_starts = 0
            end = actor.wait.options(concurrency_group="life").remote()
            self._ends[end] = actor
        return len(ready)

    def _take_ended(self) -> int:
        ended = self._find_answered(self._ends)
        for reference in ended:
            actor = self._ends.pop(reference)
            with contextlib.suppress(self._ray.exceptions.RayError):
                try:
                    self._ray.get(reference)
                except self._ray.exceptions.ActorUnavailableError:
                    # If only its node has not answered for a while, it would keep its GPU.
                    self._ray.kill(actor)
            logging.warning("a model actor died, or its node was lost; others take its batches")
        return len(ended)


class RemoteModel:
    """Stands in a worker for a model that model actors hold."""

    def __init__(self, load: Load, roster: Any):
        import ray

        self._ray = ray
        self._load = ray.put(load)
        self._roster = roster

    def map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """As `models.Model.map`.

        Raises:
            ProcessDeath: several model actors have died of one call.
        """
        run = _Run(
            self._ray,
            self._roster,
            lambda actor, arguments: actor.call.remote(self._load, method, arguments),
        )
        for arguments in calls:
            run.send(arguments)
            while run.is_full:
                run.wait()
                yield from run.take_done()
        while run.under_way:
            run.wait()
            yield from run.take_done()


class _Run:
    """The calls of one `map`: those under way, and results that wait for earlier ones."""

    def __init__(self, ray: Any, roster: Any, submit: Callable[[Any, Any], Any]):
        self._ray = ray
        self._roster = roster
        self._submit = submit
        self._actors: list[Any] = []
        self._dead: set[Any] = set()
        self._next = self._yielded = 0
        self._done: dict[int, Any] = {}
        self._deaths: collections.Counter[int] = collections.Counter()
        # Reference -> number of the call, its arguments, and the actor.
        self.under_way: dict[Any, tuple[int, Any, Any]] = {}
        self._ask()

    @property
    def is_full(self) -> bool:
        return len(self.under_way) + len(self._done) >= _MAX_UNDER_WAY

    def send(self, arguments: Any) -> None:
        self._send(self._next, self._ray.put(arguments))
        self._next += 1

    def wait(self) -> None:
        """Until a call has ended."""
        ended, _ = self._ray.wait(list(self.under_way))
        for reference in ended:
            number, arguments, actor = self.under_way.pop(reference)
            try:
                self._done[number] = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error  # of the model itself, as if it had run here
            except self._ray.exceptions.RayError as error:
                # A lost node takes several actors at once, and no batch is to blame for that.
                self._deaths[number] += not is_node_loss(self._ray, error)
                if self._deaths[number] >= _MAX_DEATHS:
                    raise ProcessDeath(
                        f"{_MAX_DEATHS} model actors died of one batch: "
                        f"{' '.join(str(error).split())}"
                    ) from error
                self._dead.add(actor)
                self._actors = [other for other in self._actors if other != actor]
                self._send(number, arguments)

    def take_done(self) -> Iterator[Any]:
        """The results whose turn has come."""
        while self._yielded in self._done:
            yield self._done.pop(self._yielded)
            self._yielded += 1

    def _send(self, number: int, arguments: Any) -> None:
        while not self._actors:
            time.sleep(POLL_SECS)  # until the driver has started another one
            self._ask()
        loads = collections.Counter(actor for *_, actor in self.under_way.values())
        random.shuffle(self._actors)
        actor = min(self._actors, key=loads.__getitem__)
        self.under_way[self._submit(actor, arguments)] = (number, arguments, actor)

    def _ask(self) -> None:
        listed = self._ray.get(self._roster.get.remote())
        self._actors = [actor for actor in listed if actor not in self._dead]
