"""One source shard in, one output and its statistics out: atomic, and done only once.

A shard counts as done when its statistics file exists, which is written last, and when that file
names the same config, the same input and an output of the size that lies there. What is done to
the records is not known here; `engine.py` runs the tasks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from data_prep.jobs import fingerprint
from data_prep.jobs.crash_search import CrashSearch
from diht_jax.data.atomic_file import write_atomically
from diht_jax.data.index import is_indexable, update_index
from diht_jax.data.readers.registry import SourceShard, names_files
from diht_jax.data.records import dataset_info
from diht_jax.data.records.dataset_index import INDEX_NAME
from diht_jax.data.records.formats.registry import FORMATS, name_format, open_writer
from diht_jax.data.records.formats.writer import RecordWriter

STATS_SUFFIX = dataset_info.STATS_SUFFIX
MERGED_STATS = "stats.json"

Process = Callable[[SourceShard, RecordWriter], dict[str, Any]]

# The names of `atomic_file.temporary_path`.
_TEMPORARY = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp")


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One unit of offline work.

    Attributes:
        source: what is read.
        output: path of the shard that is written.
        config_hash: of everything that decides what is written.
        search: for pairs that end their worker, once one has died of this task.
    """

    source: SourceShard
    output: str
    config_hash: str
    search: CrashSearch | None = None

    @property
    def stats_path(self) -> pathlib.Path:
        """Where the statistics lie."""
        return pathlib.Path(self.output + STATS_SUFFIX)

    @property
    def location_path(self) -> pathlib.Path:
        """Where the location of the input is kept."""
        return pathlib.Path(self.output + fingerprint.LOCATION_SUFFIX)


def hash_config(config: dict[str, Any]) -> str:
    """A short fingerprint of JSON-able settings; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def plan_tasks(
    sources: Sequence[SourceShard],
    folder: str,
    *,
    dataset: str,
    split: str,
    config_hash: str,
    output_format: str = "tfrecord",
) -> list[ShardTask]:
    """Gives every source shard its output shard, and makes the folder.

    Args:
        sources: in order; the order decides the names.
        folder: of the output.
        dataset: first part of the names.
        split: second part of the names.
        config_hash: see `hash_config`.
        output_format: of the output shards, one of `formats.registry.FORMATS`.

    Raises:
        ValueError: the folder holds shards that this plan would not replace, and that a training
            run on the folder would read.
    """
    os.makedirs(folder, exist_ok=True)
    suffix = FORMATS[output_format].suffix
    count = len(sources)
    names = [dataset_info.shard_name(dataset, split, i, count, suffix) for i in range(count)]
    foreign = sorted(set(read_shards(folder, output_format)) - set(names))
    if foreign:
        raise ValueError(
            f"'{folder}' holds {len(foreign)} shards that do not belong to this run, such as "
            f"'{foreign[0]}'; choose an empty folder, or delete them"
        )
    return [
        ShardTask(source, os.path.join(folder, name), config_hash)
        for source, name in zip(sources, names, strict=True)
    ]


def read_shards(folder: str, output_format: str) -> list[str]:
    """Names of the shards that training on a folder with this format of shards would read.

    Those of another format are read instead where that comes first in `FORMATS`.
    """
    names = list(FORMATS)
    first = set(names[: names.index(output_format) + 1])
    return [
        entry.name
        for entry in os.scandir(folder)
        if entry.is_file() and name_format(entry.name) in first
    ]


def run_task(task: ShardTask, process: Process, beside: Sequence[str] = ()) -> dict[str, Any]:
    """Does one task; nothing of it is visible until it is complete.

    Args:
        task: what to do.
        process: reads the source, writes records, returns JSON-able counts.
        beside: endings of further files that `process` writes, such as ".more" for OUTPUT.more.

    Returns:
        The statistics, as they lie in the file.

    Raises:
        ValueError: the source is damaged.
    """
    task.stats_path.unlink(missing_ok=True)
    described = fingerprint.describe(task.source)
    with open_writer(task.output) as writer:
        counts = process(task.source, writer)
    return finish_task(task, described, counts, len(writer), beside)


def finish_task(
    task: ShardTask,
    described: fingerprint.Description,
    counts: dict[str, Any],
    records: int,
    beside: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the statistics, which makes the task done.

    Args:
        task: whose output lies there.
        described: the input, before it was read.
        counts: what happened to the records.
        records: in the output.
        beside: endings of further files that belong to the output.
    """
    stats = {
        "config_hash": task.config_hash,
        "input": described.contents,
        "output": {
            "file": os.path.basename(task.output),
            "records": records,
            "bytes": os.path.getsize(task.output),
            "beside": {suffix: os.path.getsize(task.output + suffix) for suffix in beside},
        },
        "counts": counts,
    }
    fingerprint.write_location(task.location_path, described.location)
    write_json(task.stats_path, stats)
    return stats


def explain_change(task: ShardTask, stats: dict[str, Any]) -> str | None:
    """What has changed since a task was done: the config, the input, or nothing (None).

    Args:
        task: what would be done.
        stats: the statistics that lie there.
    """
    if stats.get("config_hash") != task.config_hash:
        return f"the config (hash {stats.get('config_hash')}, now {task.config_hash})"
    try:
        if fingerprint.is_same(task.source, stats.get("input") or {}, task.location_path):
            return None
    except FileNotFoundError:
        return f"the input '{task.source}', which is gone"
    images = " or an image that it names" if names_files(task.source) else ""
    return f"the input '{task.source}'{images}"


def read_stats(task: ShardTask) -> dict[str, Any] | None:
    """The statistics that lie there, whatever they belong to; None where there are none."""
    try:
        stats = json.loads(task.stats_path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return stats if isinstance(stats, dict) else None


def has_output(task: ShardTask, stats: dict[str, Any]) -> bool:
    """Whether the output and what lies beside it have the sizes that the statistics name."""
    try:
        output = stats["output"]
        return output["bytes"] == os.path.getsize(task.output) and all(
            size == os.path.getsize(task.output + suffix)
            for suffix, size in output["beside"].items()
        )
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def load_finished(task: ShardTask) -> dict[str, Any] | None:
    """The statistics of a task that was done before, by the same config on the same input.

    Args:
        task: what would be done.

    Returns:
        None where it has to be done (again).
    """
    stats = read_stats(task)
    if stats is None or explain_change(task, stats) or not has_output(task, stats):
        return None
    return stats


def remove_temporary_files(folder: str, names: Collection[str]) -> None:
    """Removes the half-written files that a killed run has left.

    Args:
        folder: where they lie.
        names: outputs that no other process is writing now; their temporary files are removed, and
            those of files whose names begin with them.
    """
    names = frozenset(names)
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match and not names.isdisjoint(_prefixes(match[1])):
                pathlib.Path(entry.path).unlink(missing_ok=True)


def remove_merged(folder: str) -> None:
    """Removes what describes the whole folder, before a shard of it changes."""
    for name in (MERGED_STATS, INDEX_NAME, *dataset_info.FILES, dataset_info.SIZES):
        (pathlib.Path(folder) / name).unlink(missing_ok=True)


def write_index(
    folder: str, outputs: Iterable[str], vocabulary: Mapping[str, Any] | None = None
) -> None:
    """Writes the `dataset.index` of a folder, where the format of its shards has one.

    Args:
        folder: of the shards.
        outputs: their paths.
        vocabulary: what all of them are labelled with, as of `Vocabulary.describe`.
    """
    if all(map(is_indexable, outputs)):
        update_index(folder, vocabulary=vocabulary)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads what `write_json` wrote."""
    return json.loads(path.read_bytes())


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes JSON for people and programs, atomically."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def _prefixes(name: str) -> list[str]:
    """The name without its last parts: "a.b.c", "a.b", "a"."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
