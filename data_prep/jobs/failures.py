"""Keys of all jobs; tasks that are done and whole, failed within a limit or beyond it, or waiting.

Why a shard has failed stands next to its output (`FAILED_SUFFIX`) until it is made, so that another
job of an array knows that nobody works on it. A later run tries it again.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple

import ml_collections
from absl import logging

from data_prep.jobs.engine import run_pending
from data_prep.jobs.shards import (
    FAILED_SUFFIX,
    STATS_SUFFIX,
    ShardTask,
    Task,
    check_all,
    trim_stats,
)
from diht_jax.config.keys import NOT_NEGATIVE, POSITIVE, Key, check_ranges
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote
from diht_jax.terminal import print_escaped

# Keys of all commands that do shard jobs.
KEYS: dict[str, Any] = {
    # Failed inputs that the output is written without: a share below 1 (0: none; else one at
    # least), or a number.
    "max_failed_shards": Key(0.01, NOT_NEGATIVE),
    # Inputs of before that may be gone or replaced, counted in the same way. What was made of them
    # is removed or made again; where they are more, nothing of it is touched.
    "max_changed_shards": Key(0.01, NOT_NEGATIVE),
    "num_workers": Key(int, NOT_NEGATIVE),  # processes; None: one per core, 0: no other process
    # How often a shard is run again when its worker died; 0: after no failure but the first at its
    # time limit, not even of its storage or its node, which have limits of their own.
    "retries": Key(1, NOT_NEGATIVE),
    # Seconds after which the worker of a shard is stopped; the second time the shard has failed.
    "shard_timeout_secs": Key(float, POSITIVE),
    # "auto" for the running cluster (or $RAY_ADDRESS), "local" to start one on this machine for the
    # time of the job, else HOST:PORT.
    "ray.address": "auto",
    "ray.cpus_per_worker": Key(1.0, NOT_NEGATIVE),  # cores that a worker reserves
    # GPUs, or a part of one, that a worker reserves and sees.
    "ray.gpus_per_worker": Key(0.0, NOT_NEGATIVE),
    # Actors at most that hold the networks for all workers, as many as the GPUs have room for; 0
    # for none: each worker has its own.
    "ray.model_actors": Key(0, NOT_NEGATIVE),
    # GPUs, or a part of one, that such an actor reserves and sees.
    "ray.gpus_per_model_actor": Key(1.0, NOT_NEGATIVE),
}

# Status with which a command ends whose output is there, without the shards that failed.
INCOMPLETE_STATUS = 3

# Path -> bytes, None where the file is missing.
Sizes = Callable[[str], int | None]


class Failures(dict[str, str]):
    """Sources that failed, with the reason.

    Attributes:
        output_written: whether the output is there nevertheless, without them.
        made: output -> statistics of the shards that `run_noting_failures` has made.
    """

    output_written: bool = False
    made: Mapping[str, dict[str, Any]] = types.MappingProxyType({})

    @property
    def exit_status(self) -> int:
        """Exit status of a command that ends with them: 0 where there are none."""
        if not self:
            return 0
        return INCOMPLETE_STATUS if self.output_written else 1


class Survey(NamedTuple, Generic[Task]):
    """State of the tasks of all jobs.

    Attributes:
        parts: tasks that are done, with their statistics (not read while others are waited for).
        failed: "source" and "error" of each task that failed when it was last tried.
        waiting: tasks that are neither, as far as their files tell.
        failed_tasks: those of `failed`.
        changed: those of `waiting` that were done, and whose input is another one since.
    """

    parts: Sequence[tuple[Task, Mapping[str, Any]]]
    failed: list[dict[str, str]]
    waiting: Sequence[Task]
    failed_tasks: list[Task]
    changed: Sequence[ShardTask]

    def explain_changed(self) -> dict[str, str]:
        """Source -> what to do, of each task of `changed`."""
        text = "it has changed since another job of the array had read it: run that job again once "
        text += "nothing writes to it any more, or the command without --num_tasks"
        return {str(task.source): text for task in self.changed}


def check_job(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError where one of `KEYS` is out of its range, or two contradict each other."""
    check_ranges(config, KEYS)
    if config.num_workers == 0 and config.shard_timeout_secs is not None:
        raise ValueError(
            f"config.shard_timeout_secs={config.shard_timeout_secs:g} with config.num_workers=0: "
            "only a worker process can be stopped; set config.num_workers=1 or more"
        )
    if not config.ray.cpus_per_worker and not config.ray.gpus_per_worker:
        raise ValueError(
            "config.ray.cpus_per_worker=0 and config.ray.gpus_per_worker=0; expected one of them "
            "to be more: they limit how many workers run on a node"
        )


def allowed_number(limit: float, total: int, *, one_of_a_few: bool = True) -> int:
    """The number of shards that a limit allows: a number, or a share (below 1) of them.

    A share above 0 allows one of several at least, unless `one_of_a_few` is false: one percent of
    fewer than 100 shards is none, and one bad tar would hold up all others.
    """
    least = 1 if one_of_a_few and limit > 0 and total > 1 else 0
    return max(least, int(limit * total + 1e-9)) if limit < 1 else int(limit)


def survey(
    tasks: Sequence[Task], known: Mapping[str, Mapping[str, Any]] | None = None
) -> Survey[Task]:
    """Looks which tasks are done, by this config on this input, and which have failed.

    The statistics are held without the counts, so that the memory does not grow with them. While
    some tasks are waited for, by the names in the folder, none of the others' is read.

    Args:
        tasks: of one folder, in order.
        known: output -> such statistics that were read before, and need not be read again.
    """
    known = dict(known or {})
    folder = tasks[0].output.rpartition("/")[0] if tasks else ""
    present = set(files.list_names(folder, (STATS_SUFFIX, FAILED_SUFFIX)))
    there, failed_tasks, waiting, changed = [], [], [], []
    for task in tasks:
        name = os.path.basename(task.output)
        is_done, is_failed = name + STATS_SUFFIX in present, name + FAILED_SUFFIX in present
        (there if is_done else failed_tasks if is_failed else waiting).append(task)
    if not waiting:
        for task, stats, change in check_all([t for t in there if t.output not in known]):
            if stats is not None and change is None:
                known[task.output] = trim_stats(stats)
            elif stats is not None and stats.get("config_hash") == task.config_hash:
                changed.append(task)
        waiting = [task for task in there if task.output not in known]
        there = [task for task in there if task.output in known]
    failed = []
    for task in failed_tasks:
        note = {"source": str(task.source), "error": "it failed, and the note of it is damaged"}
        failed.append(note | (files.read_object(task.output + FAILED_SUFFIX) or {}))
    parts = [(task, known.get(task.output, {})) for task in there]
    return Survey(parts, failed, waiting, failed_tasks, changed)


def find_finished(tasks: Sequence[ShardTask]) -> dict[str, dict[str, Any]]:
    """Output -> `trim_stats`, of the tasks of one folder that are done and whole."""
    if not tasks:
        return {}
    folder = tasks[0].output.rpartition("/")[0]
    present = set(files.list_names(folder, STATS_SUFFIX))
    there = [task for task in tasks if os.path.basename(task.stats_path) in present]
    found = [
        (task, trim_stats(stats))
        for task, stats, change in check_all(there)
        if stats is not None and change is None
    ]
    damaged = damaged_outputs(found)
    return {task.output: stats for task, stats in found if task.output not in damaged}


def has_output(path: str, stats: Mapping[str, Any], size_of: Sizes) -> bool:
    """Tells whether an output and its other files have the sizes that its statistics name."""
    sizes = {"": stats["output"]["bytes"], **stats["output"]["companions"]}
    return all(size == size_of(path + suffix) for suffix, size in sizes.items())


def open_sizes(folder: str) -> Sizes:
    """Bytes of the files of a folder by their path; those of a store are listed at once."""
    if not is_remote(folder):
        return files.size
    listed = files.list_sizes(folder, lambda name: not name.endswith(STATS_SUFFIX))
    return lambda path: listed.get(path.rpartition("/")[2])


def damaged_outputs(parts: Sequence[tuple[ShardTask, Mapping[str, Any]]]) -> set[str]:
    """The outputs, all of one folder, for which `has_output` is false."""
    if not parts:
        return set()
    sizes = open_sizes(parts[0][0].output.rpartition("/")[0])
    return {task.output for task, stats in parts if not has_output(task.output, stats, sizes)}


def run_noting_failures(
    function: Any,
    pending: Sequence[ShardTask],
    config: ml_collections.ConfigDict,
    engine: str,
    *,
    label: str,
) -> Failures:
    """Like `run_pending`, and notes what failed next to the outputs, until it succeeds.

    A shard whose input has changed since it was read is made again. One whose input changes once
    more has failed.
    """
    if not pending:
        return Failures()
    folder = pending[0].output.rpartition("/")[0]
    noted = {os.path.basename(task.output) + FAILED_SUFFIX for task in pending}
    for name in noted.intersection(files.list_names(folder, FAILED_SUFFIX)):
        files.remove(files.join(folder, name))
    failures = Failures()
    failures.made, changed = {}, pending
    for is_again in (False, True):
        failures.update(run_pending(function, changed, config, engine, label=label))
        checked, changed = check_all(changed), []
        for task, stats, change in checked:
            if change is not None:
                changed.append(task)
            elif stats is not None:
                failures.made[task.output] = trim_stats(stats)
        for task in changed:
            text = "%s has changed since it was read: its shard is made again"
            if is_again:
                files.remove(task.stats_path)
                text = "it changed whenever it had been read; wait until nothing writes to it any "
                failures[str(task.source)] = f"{text}more, and run the command again"
            else:
                logging.warning(text, task.source)
        if not changed:
            break
    for task in pending if failures else ():
        error = failures.get(str(task.source))
        if error is not None:
            note = {"source": str(task.source), "error": error}
            try:
                files.write_object(task.output + FAILED_SUFFIX, note)
            except OSError as refused:  # without it, other jobs take the shard for waiting
                logging.error("that %s failed could not be noted: %s", task.source, refused)
    return failures


def is_unfinished(
    limit: float,
    found: Survey,
    total: int,
    participle: str = "done",
    *,
    has_other_jobs: bool = True,
) -> bool:
    """Tells whether no output can be written yet; prints why, or which shards are left out.

    Args:
        limit: `config.max_failed_shards`, of all input shards, which are `total`.
        participle: what the stage does to a shard.
        has_other_jobs: whether other jobs may make what is missing.
    """
    num_done, failed = len(found.parts), len(found.failed)
    allowed = allowed_number(limit, total) if failed else 0
    num_tasks = num_done + failed + len(found.waiting)
    if found.waiting:
        print_escaped(
            f"{num_done} of {num_tasks} shards are {participle}; run the command again"
            + (", or wait for the other jobs" if has_other_jobs else "")
        )
    elif failed > allowed:
        print_escaped(
            f"{num_done} of {num_tasks} shards are {participle}, {failed} failed, and "
            f"config.max_failed_shards={limit:g} allows {allowed}: there is no output. Mend them "
            "or take them out of config.input, and run the command again"
        )
    elif num_done and failed:
        logging.warning(
            "the output is written without %d of %d shards, which failed, such as %s; the next run "
            "tries them again",
            failed,
            num_tasks,
            found.failed[0]["source"],
        )
    return bool(found.waiting) or failed > allowed or not num_done


def with_output(failures: Mapping[str, str], failed: Sequence[Mapping[str, str]]) -> Failures:
    """The failures of all jobs of an array, where the output was written without them."""
    result = Failures({**failures, **{found["source"]: found["error"] for found in failed}})
    result.output_written = True
    return result
