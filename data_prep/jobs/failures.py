"""Config keys of all jobs, the state of their tasks, and the limits on failed and changed inputs.

The reason of a failure is stored next to the output of the shard (`FAILED_SUFFIX`) until it
succeeds. It tells other jobs of an array that nobody works on the shard. A later run retries it.
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

# Keys of all commands that run shard jobs.
KEYS: dict[str, Any] = {
    # Failed inputs that the output may be written without: a share below 1 (0: none; else at least
    # one), or a number.
    "max_failed_shards": Key(0.01, NOT_NEGATIVE),
    # Earlier inputs that may be missing or replaced, counted in the same way: their results are
    # removed or made again. If there are more, the job stops before it changes anything.
    "max_changed_shards": Key(0.01, NOT_NEGATIVE),
    "num_workers": Key(int, NOT_NEGATIVE),  # processes; None: one per core, 0: only this process
    # Retries of a shard whose worker died. 0 also disables the retries after failures of storage or
    # nodes, which have limits of their own, but not the one retry after a timeout.
    "retries": Key(1, NOT_NEGATIVE),
    # Time limit of a shard: its worker is stopped, and the shard fails at the second timeout.
    "shard_timeout_secs": Key(float, POSITIVE),
    # "auto" for the running cluster (or $RAY_ADDRESS), "local" to start one on this machine for the
    # job, else HOST:PORT.
    "ray.address": "auto",
    "ray.cpus_per_worker": Key(1.0, NOT_NEGATIVE),  # cores reserved for each worker
    # GPUs, or a fraction of one, that each worker reserves and sees.
    "ray.gpus_per_worker": Key(0.0, NOT_NEGATIVE),
    # Maximum number of actors that hold the networks for all workers, limited by the GPUs; 0: each
    # worker has its own networks.
    "ray.model_actors": Key(0, NOT_NEGATIVE),
    # GPUs, or a fraction of one, that each model actor reserves and sees.
    "ray.gpus_per_model_actor": Key(1.0, NOT_NEGATIVE),
}

# Exit status of a command whose output was written without the failed shards.
INCOMPLETE_STATUS = 3

# Path -> size in bytes; None if the file is missing.
Sizes = Callable[[str], int | None]


class Failures(dict[str, str]):
    """Failed sources, with the reason.

    Attributes:
        output_written: whether the output was written without the failed sources.
        made: output -> statistics of the shards that `run_noting_failures` has made.
    """

    output_written: bool = False
    made: Mapping[str, dict[str, Any]] = types.MappingProxyType({})

    @property
    def exit_status(self) -> int:
        """Exit status of a command with these failures; 0 if there are none."""
        if not self:
            return 0
        return INCOMPLETE_STATUS if self.output_written else 1


class Survey(NamedTuple, Generic[Task]):
    """State of the tasks of all jobs.

    Attributes:
        parts: finished tasks with their statistics (not read while other tasks are waiting).
        failed: "source" and "error" of each task that failed in its last run.
        waiting: all other tasks.
        failed_tasks: the tasks of `failed`.
        changed: waiting tasks that were finished, but whose input has changed since.
    """

    parts: Sequence[tuple[Task, Mapping[str, Any]]]
    failed: list[dict[str, str]]
    waiting: Sequence[Task]
    failed_tasks: list[Task]
    changed: Sequence[ShardTask]

    def explain_changed(self) -> dict[str, str]:
        """Returns source -> what to do, for each task in `changed`."""
        text = "it has changed since another job of the array had read it: run that job again once "
        text += "nothing writes to it any more, or the command without --num_tasks"
        return {str(task.source): text for task in self.changed}


def check_job(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if one of `KEYS` is out of its range, or two contradict each other."""
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
    """Returns the number of shards that a limit allows: a number, or a share (below 1) of `total`.

    A share above 0 allows at least one of several shards, unless `one_of_a_few` is false. One
    percent of fewer than 100 shards would be none, and one bad tar would block all others.
    """
    least = 1 if one_of_a_few and limit > 0 and total > 1 else 0
    return max(least, int(limit * total + 1e-9)) if limit < 1 else int(limit)


def survey(
    tasks: Sequence[Task], known: Mapping[str, Mapping[str, Any]] | None = None
) -> Survey[Task]:
    """Finds the tasks that are finished, with this config and this input, and those that failed.

    Statistics are held without counts, which bounds the memory. They are not read at all if the
    names of the files show that some tasks are waiting.

    Args:
        tasks: tasks of one folder, in order.
        known: output -> statistics that were already read.
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
    """Returns output -> `trim_stats`, for finished and undamaged tasks of one folder."""
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
    """Returns whether an output and its other files have the sizes given in its statistics."""
    sizes = {"": stats["output"]["bytes"], **stats["output"]["companions"]}
    return all(size == size_of(path + suffix) for suffix, size in sizes.items())


def open_sizes(folder: str) -> Sizes:
    """Returns a function from path to size; the files of a store are listed in one request."""
    if not is_remote(folder):
        return files.size
    listed = files.list_sizes(folder, lambda name: not name.endswith(STATS_SUFFIX))
    return lambda path: listed.get(path.rpartition("/")[2])


def damaged_outputs(parts: Sequence[tuple[ShardTask, Mapping[str, Any]]]) -> set[str]:
    """Returns the outputs, all in one folder, for which `has_output` is false."""
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
    """Like `run_pending`; also records failures next to the outputs, until they succeed.

    A shard whose input changes while it is read is run again. If the input changes once more, the
    shard has failed.
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
            except OSError as refused:  # other jobs will then treat the shard as waiting
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
    """Returns whether the output cannot be written yet; prints the reason, or what is left out.

    Args:
        limit: `config.max_failed_shards`, for `total` input shards.
        participle: what the stage does to a shard.
        has_other_jobs: whether other jobs may make the missing shards.
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
    """Merges the failures of all jobs of an array, for an output written without them."""
    result = Failures({**failures, **{found["source"]: found["error"] for found in failed}})
    result.output_written = True
    return result
