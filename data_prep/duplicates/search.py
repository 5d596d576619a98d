"""A search in its folder, and how its processes share the tasks of a stage.

A task writes one file and is done when it is there, so that a search that was stopped goes on.
Tasks are run by an engine. With `jax.distributed` each process runs its share of a stage, and all
wait for one another behind it. The jobs of an array do not wait: each runs its share of a stage
first, then what others have not done.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep.duplicates import mapped
from data_prep.duplicates.scan import Rows
from data_prep.duplicates.units import Unit
from data_prep.jobs.engine import Report, run_pending
from data_prep.sources.list import shards_of_task
from diht_jax.storage import files

_BLOCK_ROWS = 2**22
_SUFFIX = ".arrow"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of a stage.

    Attributes:
        source: what it is called in messages.
        output: path of its file.
        number: of the task, from 0.
        start: of what it looks at.
        stop: behind it.
    """

    source: str
    output: str
    number: int
    start: int = 0
    stop: int = 0


class StageFailedError(Exception):
    """Tasks of a stage have failed; `failures` says which, and why."""

    def __init__(self, failures: dict[str, str]):
        """Of this process."""
        super().__init__(failures)
        self.failures = failures


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that share a search, and this one of them.

    Attributes:
        index: of this process.
        count: of processes.
        in_step: whether they are those of `jax.distributed`, which wait for one another.
        engine: keywords of `run_pending`.
    """

    index: int
    count: int
    in_step: bool
    engine: Mapping[str, Any]

    @property
    def writes(self) -> bool:
        """Whether this process does what one must do alone."""
        return not self.in_step or self.index == 0

    def agree(self, failures: dict[str, str]) -> None:
        """Waits for the other processes of `jax.distributed`.

        Args:
            failures: of this process.

        Raises:
            StageFailedError: there are some, here or in another process.
        """
        count = len(failures)
        if self.in_step:
            from jax.experimental import multihost_utils

            count = int(np.sum(multihost_utils.process_allgather(np.array(count))))
        if count:
            raise StageFailedError(failures or {"another process": "see its messages"})

    def run(
        self, function: Callable[..., Any], tasks: Sequence[Task], label: str, **engine: Any
    ) -> None:
        """Runs the tasks of a stage that are not done.

        Args:
            function: of a task and its report; writes the file of the task at the end.
            tasks: of all processes; their files lie in one folder.
            label: of the progress bar.
            **engine: keywords of `run_pending` that replace those of `engine`.

        Raises:
            StageFailedError: see `agree`.
        """
        if not tasks:
            return
        folder = tasks[0].output.rpartition("/")[0]
        files.make_folder(folder)
        done = set(files.list_names(folder))
        pending = shards_of_task(tasks, self.index, self.count)
        if not self.in_step:
            mine = {task.number for task in pending}
            pending += [task for task in reversed(tasks) if task.number not in mine]
        pending = [task for task in pending if os.path.basename(task.output) not in done]
        engine = dict(self.engine) | engine
        if len(pending) == 1 and engine.get("ray") is None:
            engine["num_workers"] = 0  # sooner done than a worker has started
        function = functools.partial(_unless_done, function=function)
        self.agree(run_pending(function, pending, label=label, **engine))


def _unless_done(task: Task, report: Report, *, function: Callable[..., Any]) -> None:
    if not files.exists(task.output):
        function(task, report)


@dataclasses.dataclass(frozen=True)
class Search:
    """What the tasks of all stages know.

    Attributes:
        config: of `duplicates.config.default_config`.
        folder: of the output.
        units: that were scanned.
        starts: int64 [units + 1], the number of each unit's first row.
    """

    config: ml_collections.ConfigDict
    folder: str
    units: tuple[Unit, ...]
    starts: np.ndarray

    @functools.cached_property
    def rows(self) -> Rows:
        """The rows of all units."""
        return Rows(self.units, self.cache, self.starts)

    @functools.cached_property
    def cache(self) -> str:
        """The folder of `mapped.fetch`."""
        return mapped.cache_folder(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def path(self, *names: str) -> str:
        """Of a file of the folder."""
        return files.join(self.folder, *names)

    def open(self, stage: str, number: int) -> dict[str, np.ndarray]:
        """The columns that a task of a stage wrote."""
        return mapped.open_columns(self.path(stage, file_name(number)), self.cache)

    @functools.cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """First unit and the one behind the last of each block: whole units, 4 million rows."""
        number = (np.maximum(self.starts[1:], 1) - 1) // _BLOCK_ROWS
        edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(self.units)]
        return list(zip(edges[:-1], edges[1:], strict=True))

    def tasks(self, stage: str, count: int) -> list[Task]:
        """So many tasks of a stage."""
        return [
            Task(f"{stage} {number}", self.path(stage, file_name(number)), number)
            for number in range(count)
        ]

    def block_tasks(self, stage: str, suffix: str = _SUFFIX) -> list[Task]:
        """The tasks of a stage that looks at blocks; `start` and `stop` are of their rows."""
        return [
            Task(
                f"{stage} {number}",
                self.path(stage, file_name(number, suffix)),
                number,
                int(self.starts[first]),
                int(self.starts[last]),
            )
            for number, (first, last) in enumerate(self.blocks)
        ]


def file_name(number: int, suffix: str = _SUFFIX) -> str:
    """Of the file of a task."""
    return f"{number:08d}{suffix}"


def rows_between(columns: dict[str, np.ndarray], name: str, start: int, stop: int) -> slice:
    """Where a sorted column is at least `start` and below `stop`."""
    first, last = np.searchsorted(columns[name], [start, stop])
    return slice(int(first), int(last))
