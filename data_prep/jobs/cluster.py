"""Runs tasks on a Ray cluster, in actors that keep their models loaded or share model actors.

All nodes must see the same paths and have the same packages and this repository, installed or at
the same path. Ray is imported only when it is used. An actor dies with its node or process; its
task may be retried, and a new actor starts wherever the cluster has room. Shared models run in
separate actors (`models.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging as python_logging
import os
import pathlib
import time
from collections.abc import Generator, Sequence
from concurrent import futures
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs.models import ClusterActor, share_models, start_models
from data_prep.jobs.workers import (
    DEATH,
    LOST,
    Function,
    Outcome,
    Report,
    call_function,
    describe_error,
)

_WAITING_SECS = 60.0

_now = time.monotonic  # measures the time limit of tasks; replaced by tests


@contextlib.contextmanager
def _connect(address: str) -> Generator[Any]:
    """Connects to a cluster, and yields the module `ray`."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine=ray needs Ray; run: pip install ray") from error
    if ray.is_initialized():  # by the calling program, which also shuts it down
        yield ray
        return
    # Lets the workers find this code where it is not installed as a package.
    paths = [str(pathlib.Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": environment},
            logging_level=python_logging.WARNING,
            **options,
        )
    except ConnectionError as error:
        raise ValueError(
            f"config.ray.address='{address}': no Ray cluster there ({error}); start one "
            "with `ray start --head`, or set config.ray.address='local'"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@dataclasses.dataclass(eq=False)
class _Worker:
    """An actor, when its current task began, and whether it was killed at the time limit."""

    actor: Any
    started: Any  # reference that is ready once the process has started
    began_secs: float | None = None
    is_overdue: bool = False


class RayPool:
    """Pool of Ray actors, each with one task at a time; same methods as `workers.ThisProcess`."""

    def __init__(self, function: Function, config: ml_collections.ConfigDict, add_pairs: Report):
        """Connects to the cluster.

        Raises:
            ValueError: Ray is not installed, or there is no such cluster.
        """
        self._settings = settings = config.ray
        self._connection = contextlib.ExitStack()
        self._ray = self._connection.enter_context(_connect(settings.address))
        self._num_workers = config.num_workers
        self._timeout_secs = config.shard_timeout_secs
        self._add_pairs = add_pairs
        self._function = self._ray.put(function)
        self._models = start_models(self._ray, settings.model_actors, settings.gpus_per_model_actor)
        self._idle: list[_Worker] = []
        self._busy: dict[futures.Future, _Worker] = {}
        self._heard_secs = time.monotonic()

    @property
    def room(self) -> int:
        """Number of actors that fit the cluster now; fixed if `config.num_workers` is set."""
        if self._num_workers is not None:
            return max(1, self._num_workers)
        has, s = self._ray.cluster_resources(), self._settings
        needs = (("CPU", s.cpus_per_worker), ("GPU", s.gpus_per_worker))
        return max(1, int(min(has.get(name, 0) / each for name, each in needs if each)))

    def submit(self, task: Any) -> futures.Future:
        """Starts a task."""
        if self._idle:
            worker = self._idle.pop()
            worker.began_secs = None
        else:
            remote = self._ray.remote(
                num_cpus=self._settings.cpus_per_worker,
                num_gpus=self._settings.gpus_per_worker,
                max_restarts=0,
            )
            actor = remote(_WorkerActor).remote(os.getcwd(), self._models)
            worker = _Worker(actor, actor.start.remote())
        future = worker.actor.work.remote(self._function, task).future()
        self._busy[future] = worker
        return future

    def poll(self) -> None:
        """Kills actors whose task exceeds the time limit; warns if no actor starts."""
        while self._idle:  # no tasks are left for them
            self._ray.kill(self._idle.pop().actor)
        for worker in self._busy.values():
            if worker.began_secs is None:
                with contextlib.suppress(self._ray.exceptions.RayError):
                    self._ray.get(worker.started, timeout=0)
                    worker.began_secs = _now()
            elif self._timeout_secs and _now() - worker.began_secs > self._timeout_secs:
                worker.is_overdue = True
                self._ray.kill(worker.actor)
        is_waiting = all(worker.began_secs is None for worker in self._busy.values())
        if is_waiting and self._busy and time.monotonic() - self._heard_secs > _WAITING_SECS:
            self._heard_secs = time.monotonic()
            logging.warning(
                "no Ray worker has started for %.0f s; each asks for %g CPUs and %g GPUs, and the "
                "cluster has free: %s",
                _WAITING_SECS,
                self._settings.cpus_per_worker,
                self._settings.gpus_per_worker,
                self._ray.available_resources(),
            )

    def read(self, future: futures.Future) -> Outcome:
        """The outcome of a task that has ended.

        Raises:
            ValueError: no actor can start.
        """
        worker, known = self._busy.pop(future), self._ray.exceptions
        self._heard_secs = time.monotonic()
        if worker.is_overdue and self._timeout_secs is not None:
            return Outcome.timed_out(self._timeout_secs)
        try:
            outcome, pairs = future.result()
        except known.RayTaskError as error:
            # Errors of the function itself are returned as outcomes; this one is from (un)pickling.
            outcome, pairs = Outcome(error=describe_error(error)), 0
        except known.RayError as error:
            return self._died(worker, error)
        self._idle.append(worker)
        self._add_pairs(pairs)
        return outcome

    def stop(self) -> None:
        """Ends all actors."""
        for worker in (*self._busy.values(), *self._idle):
            self._ray.kill(worker.actor)
        for actor in self._models:
            self._ray.kill(actor)
        self._connection.close()

    def _died(self, worker: _Worker, error: Exception) -> Outcome:
        with contextlib.suppress(Exception):  # it has probably ended already
            self._ray.kill(worker.actor)
        reason = " ".join(str(error).split())
        if getattr(error, "actor_init_failed", False):
            raise ValueError(f"no Ray worker could start: {reason}")
        # A task is not blamed for the loss of its node, or for memory that others used up. Ray
        # calls a silent node unavailable until it gives the node up; its actors are then killed by
        # the process that started them.
        known = self._ray.exceptions
        lost = known.NodeDiedError | known.ActorUnavailableError | known.ObjectLostError
        is_lost = isinstance(error, lost | known.OutOfMemoryError)
        is_lost |= any(sign in str(error) for sign in ("node has died", "killed by `ray.kill`"))
        return Outcome(
            error=f"the Ray worker died at work, or its node was lost: {reason}",
            cause=LOST if is_lost else DEATH,
        )


class _WorkerActor(ClusterActor):
    """Actor that runs tasks."""

    def __init__(self, folder: str, models: Sequence[Any]):
        super().__init__(folder)
        if models:
            share_models(models)

    def work(self, function: Function, task: Any) -> tuple[Outcome, int]:
        """Runs one task; returns the outcome and the number of pairs."""
        pairs: list[int] = []
        outcome = call_function(function, task, pairs.append)
        if outcome.error is not None:
            outcome = dataclasses.replace(outcome, error=outcome.error + self.hint)
        return outcome, sum(pairs)
