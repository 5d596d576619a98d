"""Shard tasks: one source shard in, one output and its statistics out, atomic, done only once.

A shard counts as done when its statistics file exists, which is written last, and when that file
names the same config, the same input and an output of the size that it has. What is done to
the records is not known here; `engine.py` runs the tasks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from data_prep.jobs import fingerprint
from data_prep.jobs.crash_search import CrashSearch
from diht_jax.readers.registry import SourceShard, names_files
from diht_jax.records import dataset_info
from diht_jax.records.catalog import kind_of
from diht_jax.records.dataset_index import INDEX_NAME
from diht_jax.records.formats.registry import FORMATS, open_writer
from diht_jax.records.formats.writer import RecordSink
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote

STATS_SUFFIX = dataset_info.STATS_SUFFIX
MERGED_STATS = "stats.json"
FAILED_SUFFIX = ".failed.json"  # next to an output that could not be made: why

# Path -> bytes, None where the file is missing.
Sizes = Callable[[str], int | None]


@dataclasses.dataclass(frozen=True, slots=True)
class ShardTask:
    """A unit of offline work.

    Attributes:
        source: what is read.
        output: path of the shard that is written.
        config_hash: of everything that decides what is written.
        identity: what counts as the same input, one of `fingerprint.IDENTITIES`.
        search: for pairs that end their worker, once one has died of this task.
    """

    source: SourceShard
    output: str
    config_hash: str
    identity: str = "time"
    search: CrashSearch | None = None

    @property
    def stats_path(self) -> str:
        """Path of the statistics."""
        return self.output + STATS_SUFFIX

    @property
    def location_path(self) -> str:
        """Path of the location of the input."""
        return self.output + fingerprint.LOCATION_SUFFIX


Task = TypeVar("Task", bound=ShardTask)


def hash_config(config: dict[str, Any]) -> str:
    """A short fingerprint of JSON-able settings; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def refuse_foreign(folder: str, names: Sequence[str]) -> None:
    """Raises ValueError for shards in a folder that a training run would read, and nobody plans."""
    if names:
        raise ValueError(
            f"'{folder}' holds {len(names)} shards that do not belong to this run, such as "
            f"'{names[0]}' (by '{names[0]}{STATS_SUFFIX}', where there is one); choose an empty "
            "folder, or delete them"
        )


def read_shards(folder: str, output_format: str) -> list[str]:
    """Names of the shards that training on a folder with this format of shards would read.

    Those of another format are read instead where that comes first in `FORMATS`.
    """
    names = list(FORMATS)
    first = set(names[: names.index(output_format) + 1])
    return [name for name in files.list_names(folder) if kind_of(name) in first]


def run_task(
    task: ShardTask,
    process: Callable[[SourceShard, RecordSink], dict[str, Any]],
    companions: Sequence[str] = (),
) -> dict[str, Any]:
    """Does one task; nothing of it is visible until it is complete. Returns its statistics.

    Args:
        task: what to do.
        process: reads the source, writes records, returns JSON-able counts.
        companions: endings of further files that `process` writes, such as ".more" for OUTPUT.more.

    Raises:
        ValueError: the source is damaged.
    """
    described = begin_task(task)
    with open_writer(task.output) as writer:
        hashing = HashingWriter(writer)
        counts = process(task.source, hashing)
    return finish_task(task, described, counts, len(writer), companions, hashing.digest())


def begin_task(task: ShardTask) -> fingerprint.Description:
    """Removes what an earlier attempt has left; describes the input before it is read."""
    if task.search is not None:  # workers have died of it, and left half-written files
        folder, name = os.path.split(task.output)
        remove_temporary_files(folder, [name])
    files.remove(task.stats_path)
    return fingerprint.describe(task.source, task.identity)


def finish_task(
    task: ShardTask,
    described: fingerprint.Description,
    counts: dict[str, Any],
    records: int,
    companions: Sequence[str] = (),
    digest: str | None = None,
) -> dict[str, Any]:
    """Writes the statistics, which makes the task done: what it read, what it wrote, counts."""
    output = describe_output(task.output, records, companions)
    if digest is not None:
        output["digest"] = digest
    stats = {
        "config_hash": task.config_hash,
        "input": described.contents,
        "output": output,
        "counts": counts,
    }
    files.write_object(task.location_path, described.location)
    files.write_object(task.stats_path, stats, with_checksum=True)
    return stats


def describe_output(path: str, records: int, companions: Sequence[str] = ()) -> dict[str, Any]:
    """Statistics of an output that is written; see `finish_task`."""
    return {
        "file": os.path.basename(path),
        "records": records,
        "bytes": files.size(path),
        "companions": {suffix: files.size(path + suffix) for suffix in companions},
    }


def trim_stats(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The part of statistics that a driver holds: nothing that grows with the records."""
    return {name: stats[name] for name in ("config_hash", "output") if name in stats}


class RecordHash:
    """A hash of records in their order; it is the same for every format."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def update(self, data: bytes) -> None:
        """Takes one record."""
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def digest(self) -> str:
        """Hash of all records so far."""
        return self._hash.hexdigest()


class HashingWriter(RecordHash):
    """Hashes the records on their way to a writer, which the caller closes."""

    def __init__(self, writer: RecordSink):
        super().__init__()
        self.path = writer.path
        self._writer = writer

    def write(self, data: bytes) -> None:
        """Appends one record."""
        self._writer.write(data)
        self.update(data)

    def __len__(self) -> int:
        return len(self._writer)


def check_all(
    tasks: Sequence[Task],
) -> Iterator[tuple[Task, dict[str, Any] | None, str | None]]:
    """Every task, its statistics, and what has changed since: config or input, None for nothing.

    From a store they are read by many requests at once; the counts are held of a few only.
    """
    if tasks:
        yield from files.map_many(_check, tasks, tasks[0].output)


def _check(task: Task) -> tuple[Task, dict[str, Any] | None, str | None]:
    stats = files.read_object(task.stats_path)
    if stats is None:
        return task, None, None
    if stats.get("config_hash") != task.config_hash:
        change = f"the config (hash {stats.get('config_hash')}, now {task.config_hash})"
        return task, stats, change
    try:
        before = stats.get("input") or {}
        if fingerprint.is_same(task.source, before, task.location_path, task.identity):
            return task, stats, None
    except FileNotFoundError:
        return task, stats, f"the input '{task.source}', which is gone"
    images = " or an image that it names" if names_files(task.source) else ""
    return task, stats, f"the input '{task.source}'{images}"


def has_output(path: str, stats: Mapping[str, Any], size_of: Sizes = files.size) -> bool:
    """Tells whether an output and its other files have the sizes that its statistics name."""
    try:
        output = stats["output"]
        return output["bytes"] == size_of(path) and all(
            size == size_of(path + suffix) for suffix, size in output["companions"].items()
        )
    except (KeyError, TypeError, AttributeError):
        return False


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


def find_finished(tasks: Sequence[ShardTask]) -> dict[str, dict[str, Any]]:
    """Output -> `trim_stats`, of the tasks of one folder that are done and whole."""
    if not tasks:
        return {}
    folder = tasks[0].output.rpartition("/")[0]
    present = set(files.list_names(folder, lambda name: name.endswith(STATS_SUFFIX)))
    there = [task for task in tasks if os.path.basename(task.stats_path) in present]
    found = [
        (task, trim_stats(stats))
        for task, stats, change in check_all(there)
        if stats is not None and change is None
    ]
    damaged = damaged_outputs(found)
    return {task.output: stats for task, stats in found if task.output not in damaged}


def remove_temporary_files(folder: str, names: Iterable[str]) -> None:
    """Removes the half-written files that a killed run has left of outputs and their companions.

    No other process may be writing these outputs now.
    """
    wanted = frozenset(names)
    files.remove_temporary_files(folder, lambda name: bool(names_below([name], wanted)))


def remove_merged(folder: str) -> None:
    """Removes what describes the whole folder, before a shard of it changes."""
    for name in (MERGED_STATS, INDEX_NAME, *dataset_info.FILES, dataset_info.SIZES):
        files.remove(files.join(folder, name))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file; a ValueError where it is missing or damaged."""
    found = files.read_object(os.fspath(path))
    if found is None:
        raise ValueError(f"{os.fspath(path)}: missing, or damaged")
    return found


def names_below(names: Iterable[str], outputs: Collection[str]) -> list[str]:
    """The file names that belong to outputs: their own, and those with more behind a dot."""
    wanted = frozenset(outputs)

    def belongs(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[: i + 1]) in wanted for i in range(len(parts)))

    return list(filter(belongs, names))
