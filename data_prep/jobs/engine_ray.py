"""Runs shard tasks on a Ray cluster, in actors that keep the models they have loaded.

Networks that need a GPU can lie in actors of their own (`ray_models.py`), while the workers read,
parse and write. Ray is imported only when it is asked for. An actor dies with its node or its
process; its task is then reported as one that may pass at another try, a new actor is started as
soon as the cluster has room, and the other actors go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging as python_logging
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

from data_prep.jobs.models import share_models
from data_prep.jobs.progress import (
    DEATH,
    KILLED,
    LOST,
    POLL_SECS,
    Function,
    Outcome,
    Progress,
    TaskQueue,
    call_function,
    describe_error,
    timed_out,
)
from data_prep.jobs.ray_models import ModelPool, RemoteModel, is_node_loss

_MAX_FAILED_STARTS = 3  # in a row
_WAITING_SECS = 60.0

_now = time.monotonic  # of the limit of a task; tests put their own clock here


@dataclasses.dataclass(frozen=True)
class RaySettings:
    """Which cluster, and what a worker takes of it.

    Attributes:
        address: "auto" for the running cluster (or $RAY_ADDRESS), "local" to start one on this
            machine for the time of the job, else HOST:PORT.
        cpus_per_worker: cores that a worker reserves.
        gpus_per_worker: GPUs, or a part of one, that a worker reserves and sees.
        model_actors: actors at most that hold the networks for all workers, as many as the GPUs
            have room for; 0 for none: each worker has its own.
        gpus_per_model_actor: GPUs, or a part of one, that such an actor reserves and sees.
    """

    address: str = "auto"
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    model_actors: int = 0
    gpus_per_model_actor: float = 1.0

    def check(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: a number is negative, or a worker would reserve nothing.
        """
        for field in dataclasses.fields(self)[1:]:
            if (value := getattr(self, field.name)) < 0:
                raise ValueError(f"config.ray.{field.name}={value}; expected at least 0")
        if not self.cpus_per_worker and not self.gpus_per_worker:
            raise ValueError(
                "config.ray.cpus_per_worker=0 and config.ray.gpus_per_worker=0; expected one of "
                "them to be more: they limit how many workers run on a node"
            )


def run_on_ray(
    function: Function,
    tasks: TaskQueue,
    settings: RaySettings,
    num_workers: int | None,
    progress: Progress,
    timeout_secs: float | None = None,
) -> Iterator[Outcome[Any, Any]]:
    """Calls `function(task, report)` for every task on the cluster.

    The nodes must see the same paths, and have the same packages and this repository, installed or
    under the same path. Relative paths mean what they mean here: workers run in a folder of the
    same name; on a node without it, tasks with relative paths fail with this reason.

    Nodes that join while the job runs get workers and model actors as well.

    Args:
        function: importable by its name, or picklable.
        tasks: picklable; more may be put into the queue whenever an outcome is yielded.
        settings: of the cluster.
        num_workers: actors at most; None fills the cluster.
        progress: counts the pairs of a task when it ends.
        timeout_secs: after which a task is stopped.

    Raises:
        ValueError: Ray is not installed, or there is no such cluster.
    """
    with _connect(settings):
        pool = _RayWorkerPool(function, tasks, settings, num_workers, progress, timeout_secs)
        try:
            yield from pool.run()
        finally:
            pool.stop()


@contextlib.contextmanager
def _connect(settings: RaySettings) -> Iterator[None]:
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine=ray needs Ray; run: pip install ray") from error
    if ray.is_initialized():  # by the program that calls us; it is theirs to end
        yield
        return
    # So that the workers find this very code, where it is not installed as a package.
    paths = [str(pathlib.Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    options: dict[str, Any] = {"include_dashboard": False} if settings.address == "local" else {}
    try:
        ray.init(
            address=settings.address,
            runtime_env={"env_vars": environment},
            logging_level=python_logging.WARNING,
            **options,
        )
    except ConnectionError as error:
        raise ValueError(
            f"config.ray.address='{settings.address}': no Ray cluster there ({error}); start one "
            "with `ray start --head`, or set config.ray.address='local'"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class _Actor:
    """A worker; one object lives in one process of the cluster."""

    def __init__(self, folder: str, roster: Any):
        """Prepares the process.

        Args:
            folder: in which the driver runs.
            roster: of the model actors; None where there are none.
        """
        self._no_folder: str | None = None
        try:
            os.chdir(folder)
        except OSError as error:
            self._no_folder = f"the job runs in '{folder}', which node {platform.node()} lacks"
            self._no_folder += f" ({error.strerror})"
        if roster is not None:
            share_models(functools.partial(RemoteModel, roster=roster))

    def is_ready(self) -> bool:
        return True

    def work(self, function: Function, task: Any) -> tuple[Outcome, int]:
        """The outcome, without its task, and the number of pairs."""
        relative = _find_relative_path(task)
        if relative is not None and self._no_folder is not None:
            error = (
                f"'{relative}' is a relative path, and {self._no_folder}; name input and output by "
                "absolute paths or URLs, or start the job in a folder that all nodes have"
            )
            return Outcome(None, error=error), 0
        pairs: list[int] = []
        outcome = call_function(function, task, pairs.append)
        return dataclasses.replace(outcome, task=None), sum(pairs)


def _find_relative_path(task: Any) -> str | None:
    """The input or the output of a task, where it is a relative path."""
    source = getattr(task, "source", None)
    for path in (getattr(source, "path", source), getattr(task, "output", None)):
        if isinstance(path, str) and "://" not in path and not os.path.isabs(path):
            return path
    return None


@dataclasses.dataclass(eq=False)
class _Worker:
    """An actor as the driver sees it; `task` is None until it has started."""

    actor: Any
    task: Any = None
    has_started: bool = False
    began_secs: float = 0.0


class _RayWorkerPool:
    """The actors of one run."""

    def __init__(
        self,
        function: Function,
        tasks: TaskQueue,
        settings: RaySettings,
        num_workers: int | None,
        progress: Progress,
        timeout_secs: float | None,
    ):
        import ray

        self._ray = ray
        self._function = ray.put(function)
        self._pending = tasks
        self._timeout_secs = timeout_secs
        self._settings = settings
        self._num_workers = num_workers
        self._progress = progress
        self._models: ModelPool | None = None
        if settings.model_actors:
            self._models = ModelPool(ray, settings.model_actors, settings.gpus_per_model_actor)
        self._waits: dict[Any, _Worker] = {}  # by the reference that comes next
        self._failed_starts = 0
        self._last_message_secs = time.monotonic()

    def run(self) -> Iterator[Outcome[Any, Any]]:
        """Yields the outcomes, in the order in which they come."""
        while self._pending or self._num_busy():
            if self._models is not None:
                self._models.refresh()
            # Counted anew each time, so that nodes that have joined get workers.
            most = self._num_workers or self._count_slots()
            wanted = min(most, len(self._pending) + self._num_busy())
            while len(self._waits) < wanted:
                self._start_worker()
            ready, _ = self._ray.wait(list(self._waits), timeout=POLL_SECS)
            self._progress.refresh()
            for reference in ready:
                yield from self._handle_message(reference, self._waits.pop(reference))
            yield from self._stop_overdue()
            self._warn_of_waiting()

    def stop(self) -> None:
        """Ends the actors that are still there."""
        for worker in self._waits.values():
            self._ray.kill(worker.actor)
        if self._models is not None:
            self._models.stop()

    def _num_busy(self) -> int:
        return sum(worker.has_started for worker in self._waits.values())

    def _count_slots(self) -> int:
        has, s = self._ray.cluster_resources(), self._settings
        slots = [
            has.get(name, 0) / needed
            for name, needed in (("CPU", s.cpus_per_worker), ("GPU", s.gpus_per_worker))
            if needed
        ]
        return max(1, int(min(slots, default=1)))

    def _start_worker(self) -> None:
        s = self._settings
        actor_class = self._ray.remote(
            num_cpus=s.cpus_per_worker, num_gpus=s.gpus_per_worker, max_restarts=0
        )(_Actor)
        roster = None if self._models is None else self._models.roster
        worker = _Worker(actor_class.remote(os.getcwd(), roster))
        self._waits[worker.actor.is_ready.remote()] = worker

    def _handle_message(self, reference: Any, worker: _Worker) -> Iterator[Outcome[Any, Any]]:
        """Takes the answer of a worker, or notices its end, and gives it the next task."""
        self._last_message_secs = time.monotonic()
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # The function's own errors come as outcomes: this one is in packing or unpacking.
            answer = Outcome(None, error=describe_error(error)), 0
        except self._ray.exceptions.RayError as error:
            yield from self._handle_exit(worker, error)
            return
        if worker.has_started:
            outcome, pairs = answer
            self._progress.add(pairs)
            yield dataclasses.replace(outcome, task=worker.task)
        worker.has_started, self._failed_starts = True, 0
        if self._pending:
            worker.task, worker.began_secs = self._pending.popleft(), _now()
            self._waits[worker.actor.work.remote(self._function, worker.task)] = worker
        else:
            self._ray.kill(worker.actor)

    def _handle_exit(self, worker: _Worker, error: Exception) -> Iterator[Outcome[Any, Any]]:
        with contextlib.suppress(Exception):  # it has most likely ended
            self._ray.kill(worker.actor)
        reason, is_lost = " ".join(str(error).split()), is_node_loss(self._ray, error)
        if worker.has_started:
            # The task is not to blame for the loss of its node, or for memory that others took.
            was_killed = isinstance(error, self._ray.exceptions.OutOfMemoryError)
            yield Outcome(
                worker.task,
                error=f"the Ray worker died at work, or its node was lost: {reason}",
                cause=KILLED if was_killed else LOST if is_lost else DEATH,
            )
            return
        self._failed_starts += not is_lost
        if self._failed_starts >= _MAX_FAILED_STARTS and not self._num_busy():
            while self._pending:
                yield Outcome(self._pending.popleft(), error=f"no Ray worker could start: {reason}")

    def _stop_overdue(self) -> Iterator[Outcome[Any, Any]]:
        """Stops the workers whose task takes longer than it may."""
        if self._timeout_secs is None:
            return
        for reference, worker in list(self._waits.items()):
            secs = _now() - worker.began_secs
            if worker.has_started and secs > self._timeout_secs:
                del self._waits[reference]
                self._ray.kill(worker.actor)
                yield timed_out(worker.task, secs, self._timeout_secs)

    def _warn_of_waiting(self) -> None:
        if time.monotonic() - self._last_message_secs < _WAITING_SECS:
            return
        s = self._settings
        if self._models is not None and self._models.is_wanted and not len(self._models):
            self._last_message_secs = time.monotonic()
            logging.warning(
                "no model actor has started for %.0f s; each asks for %g GPUs, and the cluster has "
                "free: %s",
                _WAITING_SECS,
                s.gpus_per_model_actor,
                self._ray.available_resources(),
            )
        if self._num_busy():
            return
        self._last_message_secs = time.monotonic()
        logging.warning(
            "no Ray worker has started for %.0f s; each asks for %g CPUs and %g GPUs, and the "
            "cluster has free: %s",
            _WAITING_SECS,
            s.cpus_per_worker,
            s.gpus_per_worker,
            self._ray.available_resources(),
        )
