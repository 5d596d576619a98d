"""Shard tasks: each writes one output shard and its statistics, once.

A shard is done when its statistics file, which is written last, exists and names the same config,
the same input, and the present size of the output. This module does not know how records are
processed; `engine.py` runs the tasks.

Two descriptions of each input are stored next to the output. Its contents (part, options, size) are
in the statistics. Its location (path, size, modification time) has a separate file, because it
differs between machines. `IDENTITIES` lists the ways to decide whether an input is the same:

    time   by size and modification time, or the version that an object store states; no reads
    hash   like "time"; a file that was touched or copied is compared by a hash of all its bytes,
           which reads the file once more
    size   by size only, for copies that lost their modification times

Files that a table names belong to the table, and are compared in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from data_prep.jobs.engine import CrashSearch
from diht_jax.readers.base import read_image, walk_files
from diht_jax.readers.registry import (
    Skipped,
    SourceShard,
    describe_linked,
    list_linked_files,
    names_files,
)
from diht_jax.records import dataset_info
from diht_jax.records.dataset_index import INDEX_NAME
from diht_jax.records.formats import open_writer
from diht_jax.records.shard_files import RecordHash, RecordWriter
from diht_jax.storage import files
from diht_jax.storage.stores import input_size, is_remote, open_file

STATS_SUFFIX = dataset_info.STATS_SUFFIX
MERGED_STATS = "stats.json"
# Files that describe the whole output folder.
MERGED_FILES = (MERGED_STATS, INDEX_NAME, *dataset_info.FILES, dataset_info.SIZES)
FAILED_SUFFIX = ".failed.json"  # next to an output that could not be made: the reason

LOCATION_SUFFIX = ".place.json"  # of the files with locations of inputs

IDENTITIES = ("time", "hash", "size")

_new_hash = functools.partial(hashlib.blake2b, digest_size=16)


@dataclasses.dataclass(frozen=True, slots=True)
class ShardTask:
    """A unit of offline work.

    Attributes:
        source: the input.
        output: path of the shard to write.
        config_hash: hash of all settings that determine the output.
        identity: how inputs are compared, one of `IDENTITIES`.
        search: search for pairs that kill their worker, after a first death.
    """

    source: SourceShard
    output: str
    config_hash: str
    identity: str = "time"
    search: CrashSearch | None = None

    @property
    def stats_path(self) -> str:
        """Path of the statistics file."""
        return self.output + STATS_SUFFIX


Task = TypeVar("Task", bound=ShardTask)


def hash_config(config: dict[str, Any]) -> str:
    """Returns a short hash of JSON-able settings, independent of the order of keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


class Description(NamedTuple):
    """JSON-able description of an input.

    Attributes:
        contents: independent of the location: part, options, size, and the hash of all bytes if
            requested.
        location: path, size and modification time.
    """

    contents: dict[str, Any]
    location: dict[str, Any]


def run_task(
    task: ShardTask,
    process: Callable[[SourceShard, RecordWriter], dict[str, Any]],
    companions: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs one task and returns its statistics; no output is visible until it is complete.

    Args:
        process: reads the source, writes records, and returns JSON-able counts.
        companions: suffixes of other files that `process` writes, such as ".more" for OUTPUT.more.

    Raises:
        ValueError: the source is damaged.
    """
    described = begin_task(task)
    with open_writer(task.output) as writer:
        writer.hash = RecordHash()
        counts = process(task.source, writer)
    return finish_task(task, described, counts, len(writer), companions, writer.hash.digest())


def begin_task(task: ShardTask) -> Description:
    """Removes the leftovers of an earlier attempt, and describes the input before it is read."""
    if task.search is not None:  # workers died of it and left half-written files
        folder, name = os.path.split(task.output)
        remove_temporary_files(folder, [name])
    files.remove(task.stats_path)
    return describe_input(task.source, task.identity)


def finish_task(
    task: ShardTask,
    described: Description,
    counts: dict[str, Any],
    records: int,
    companions: Sequence[str] = (),
    digest: str | None = None,
) -> dict[str, Any]:
    """Writes the statistics of the input, the output and the counts; the task is then done."""
    output = describe_output(task.output, records, companions)
    if digest is not None:
        output["digest"] = digest
    stats = {
        "config_hash": task.config_hash,
        "input": described.contents,
        "output": output,
        "counts": counts,
    }
    files.write_object(task.output + LOCATION_SUFFIX, described.location)
    files.write_object(task.stats_path, stats, with_checksum=True)
    return stats


def describe_output(path: str, records: int, companions: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the statistics of an output file; see `finish_task`."""
    return {
        "file": os.path.basename(path),
        "records": records,
        "bytes": files.size(path),
        "companions": {suffix: files.size(path + suffix) for suffix in companions},
    }


def trim_stats(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the statistics kept by a driver, whose size is independent of the records."""
    return {name: stats[name] for name in ("config_hash", "output") if name in stats}


def check_all(tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any] | None, str | None]]:
    """Yields every task, its statistics, and the changed config or input (None if unchanged).

    Reads many files of a store concurrently, and holds the counts of only a few.
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
        if is_same_input(task.source, before, task.output + LOCATION_SUFFIX, task.identity):
            return task, stats, None
    except FileNotFoundError:
        return task, stats, f"the input '{task.source}', which is gone"
    images = " or an image that it names" if names_files(task.source) else ""
    return task, stats, f"the input '{task.source}'{images}"


def remove_temporary_files(folder: str, names: Iterable[str]) -> None:
    """Removes the half-written files of outputs and their companions that a killed run left.

    No other process may be writing these outputs at the same time.
    """
    wanted = frozenset(names)
    files.remove_temporary_files(folder, lambda name: bool(names_below([name], wanted)))


def remove_merged(folder: str, names: Iterable[str] = MERGED_FILES) -> None:
    """Removes the files that describe the whole folder, before one of its shards changes."""
    for name in names:
        files.remove(files.join(folder, name))


def remove_outputs(folder: str, outputs: Collection[str]) -> None:
    """Removes outputs with all files that belong to them.

    The statistics are removed first, because an output without statistics is not done.
    """
    below = names_below(files.list_names(folder), outputs)
    for name in sorted(below, key=lambda name: not name.endswith(STATS_SUFFIX)):
        files.remove(files.join(folder, name))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object from a file; raises ValueError if it is missing or damaged."""
    found = files.read_object(os.fspath(path))
    if found is None:
        raise ValueError(f"{os.fspath(path)}: missing, or damaged")
    return found


def names_below(names: Iterable[str], outputs: Collection[str]) -> list[str]:
    """Returns the file names of outputs: OUTPUT itself, and OUTPUT.suffix with any suffix."""
    wanted = frozenset(outputs)

    def belongs(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[: i + 1]) in wanted for i in range(len(parts)))

    return list(filter(belongs, names))


def describe_input(source: SourceShard, identity: str = "time") -> Description:
    """Describes an input; reads it only if it is hashed.

    Raises:
        FileNotFoundError: the input is gone.
    """
    contents, location = _look_at(source)
    if identity == "hash":
        contents["digest"] = _hash_all(source)
        if "linked" in location:
            contents["linked"] = _hash_linked(source)
    return Description(contents, location)


def is_same_input(
    source: SourceShard, contents: Mapping[str, Any], location_path: str, identity: str = "time"
) -> bool:
    """Compares an input with its earlier contents, and with its stored location if there is one.

    An input that was touched or copied is compared by its hash, if it was hashed. If the hashes are
    equal, the new location is stored, and the next run need not read the input.

    Raises:
        FileNotFoundError: the input is gone.
    """
    now, location = _look_at(source)
    for name, value in now.items():
        if name != "files" and contents.get(name) != value:
            return False
    before = files.read_object(location_path)
    # The path is ignored: a moved file is still the same file.
    if before is not None and before | {"path": location["path"]} == location:
        return True
    if "digest" in contents:
        if contents["digest"] != _hash_all(source):
            return False
        if "linked" in contents and contents["linked"] != _hash_linked(source):
            return False
    elif identity != "size":
        return False
    files.write_object(location_path, location)
    return True


def _look_at(source: SourceShard) -> Description:
    """Describes an input without reading it."""
    found = source.identity()
    location = {"path": found["path"], "size_bytes": found["size_bytes"]}
    location["changed"] = found["changed_ns"]
    if names_files(source) and (linked := describe_linked(source)) is not None:
        location["linked"] = linked
    contents = {
        "kind": source.kind,
        "start": source.start,
        "stop": source.stop,
        "options": dict(source.options),
        "size_bytes": found["size_bytes"],
        "files": found["files"],
    }
    return Description(json.loads(json.dumps(contents)), location)


def _hash_all(source: SourceShard) -> str:
    """Returns the hash of all bytes of a file, or of a folder's files with their names."""
    digest = _new_hash()
    found = [("", source.path)]
    if not is_remote(source.path) and os.path.isdir(source.path):
        inside = [path for path, is_inside in walk_files(source.path, source.root) if is_inside]
        found = sorted((os.path.relpath(path, source.path), path) for path in inside)
    for name, path in found:
        size = input_size(path)
        digest.update(f"{name}\n{size}\n".encode("utf-8", "surrogatepass"))
        version = SourceShard(source.kind, path).identity()["changed_ns"]
        digest.update(_hash_file(path, version))
    return digest.hexdigest()


# Several parts of one file hash the whole file; the cache reads it once per process.
@functools.lru_cache(maxsize=1024)
def _hash_file(path: str, version: int | str | None) -> bytes:
    """Returns the hash of a file; `version` keeps the cache from outliving a change."""
    with open_file(path) as file:
        return hashlib.file_digest(file, _new_hash).digest()


def _hash_linked(source: SourceShard) -> str:
    """Returns the hash of all files that a table names, in the order of its rows."""
    digest = _new_hash()
    for root, name in list_linked_files(source):
        image = read_image(os.path.realpath(root), name, name)
        data = image.reason.encode() if isinstance(image, Skipped) else image
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()
