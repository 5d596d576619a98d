"""What a labelling job does: its inputs, the names of its outputs, and what the folder decides."""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs import fingerprint, shards
from data_prep.labelling import embeddings
from data_prep.labelling import heads as head_files
from data_prep.labelling.shard import LabelTask, label_path
from data_prep.teachers.base import TeacherInfo
from data_prep.teachers.registry import settle_precision
from diht_jax.readers.registry import SourceShard
from diht_jax.records.catalog import find_shards
from diht_jax.records.dataset_info import shard_name
from diht_jax.records.fingerprint import fingerprint_records
from diht_jax.records.formats.registry import (
    FORMATS,
    format_of,
    name_format,
    open_source,
)
from diht_jax.storage import files

_LABELS_VERSION = 1


def find_inputs(text: str | None) -> list[SourceShard]:
    """The shards that `config.input` names.

    Raises:
        ValueError: it is not set, or there are none.
    """
    if not text:
        raise ValueError(
            "config.input is not set: expected a folder that data_prep.filter wrote, such as "
            "--config.input=/data/kept"
        )
    parts = input_paths(text)
    return [SourceShard(format_of(parts), path) for path in find_shards(parts)]


def input_paths(text: str) -> list[str]:
    """The paths in `config.input`, which commas separate."""
    return [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]


def settle(
    config: ml_collections.ConfigDict, folder: str
) -> tuple[ml_collections.ConfigDict, TeacherInfo]:
    """The config with what it leaves to the folder: `merge`, and the precision of the teacher.

    A folder with merged shards stays one, and embeddings that were computed in another precision
    than today's default go on to be used.

    Args:
        config: of `labelling.config.default_config`.
        folder: of the output.

    Returns:
        The config, and its teacher.

    Raises:
        ValueError: as of `describe_teacher`.
    """
    config = config.copy_and_resolve_references()
    if not config.merge and any(map(name_format, files.list_names(folder))):
        logging.info("%s holds merged shards: config.merge=True", folder)
        config.merge = True
    known = [head_files.read_description(place) for place in (config.heads.load, folder) if place]
    config.teacher, teacher = settle_precision(
        config.teacher,
        [found["teacher"] for found in known if found and "teacher" in found],
        lambda identity: _has_embeddings(config, folder, identity),
    )
    return config, teacher


def _has_embeddings(
    config: ml_collections.ConfigDict, folder: str, identity: dict[str, Any]
) -> bool:
    """Whether the folder has embeddings of a teacher."""
    config_hash = embeddings.hash_embeddings(identity, config.embedding_dtype)
    folder = files.join(folder, embeddings.FOLDER)
    for name in files.list_names(folder):
        if name.endswith(shards.STATS_SUFFIX):
            stats = json.loads(files.read_bytes(files.join(folder, name)))
            return stats["config_hash"] == config_hash
    return False


def plan_shards(
    config: ml_collections.ConfigDict, inputs: Sequence[SourceShard], folder: str
) -> list[shards.ShardTask]:
    """Every input with the path that its shard has in the folder, or would have.

    Merged shards are numbered, as TFDS wants them. Labels and embeddings are called as their shard
    is, so that others added to the input or removed from it change nothing.

    Raises:
        ValueError: the folder holds shards that do not belong to these.
    """
    if config.merge:
        return shards.plan_tasks(
            inputs,
            folder,
            dataset=config.dataset_name,
            split=config.split,
            config_hash="",
            output_format=config.output_format,
        )
    names = _names_of(inputs)
    suffix = FORMATS[config.output_format].suffix
    numbered = [
        shard_name(config.dataset_name, config.split, number, len(inputs), suffix)
        for number in range(len(inputs))
    ]
    if _are_numbered(folder, sorted(set(numbered) - set(names))):
        names = numbered
    return [
        shards.ShardTask(source, files.join(folder, name), "")
        for source, name in zip(inputs, names, strict=True)
    ]


def _are_numbered(folder: str, numbers: Sequence[str]) -> bool:
    """Whether the outputs of a folder have numbers, as all had once, and no input has these names.

    Inputs may have numbers too, and one of them may be gone: its embeddings state its own name.
    """
    where = files.join(folder, embeddings.FOLDER)
    present = set(files.list_names(where))
    for name in numbers:
        if f"{name}.npz" in present:
            path = files.join(where, f"{name}.npz{fingerprint.LOCATION_SUFFIX}")
            found = fingerprint.read_location(path)
            return found is None or os.path.basename(found["path"]) != name
    return False


def _names_of(inputs: Sequence[SourceShard]) -> list[str]:
    """The names of shards; the second one of a name has a hash of its folder in front."""
    seen: collections.Counter[str] = collections.Counter()
    names = []
    for source in inputs:
        folder, name = os.path.split(source.path)
        seen[name] += 1
        if seen[name] > 1:
            name = f"{hashlib.blake2b(folder.encode(), digest_size=4).hexdigest()}-{name}"
        names.append(name)
    return names


def plan_labels(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    heads: dict[str, Any],
    embedded: Sequence[embeddings.EmbeddingTask],
) -> list[LabelTask]:
    """The labelling tasks.

    Args:
        config: of `labelling.config.default_config`.
        tasks: of `plan_shards`.
        heads: what `heads.json` holds.
        embedded: the embedding task of each.
    """
    settings = {
        "format_version": _LABELS_VERSION,
        "embeddings": embedded[0].config_hash,
        "heads": heads["weights_hash"],
        "vocabulary": heads["vocabulary"],
        "top_k": config.top_k,
    }
    config_hash = shards.hash_config(settings)
    if config.merge:
        return [
            LabelTask(task.source, task.output, config_hash, embedding=embedding)
            for task, embedding in zip(tasks, embedded, strict=True)
        ]
    if tasks:
        files.make_folder(os.path.dirname(label_path(tasks[0].output)))
    return [
        LabelTask(
            source=task.source,
            output=label_path(task.output),
            config_hash=config_hash,
            shard=embedding.shard,
            embedding=embedding,
        )
        for task, embedding in zip(tasks, embedded, strict=True)
    ]


def identify_shards(
    tasks: Sequence[shards.ShardTask],
) -> Sequence[tuple[str, int, int, str] | None]:
    """The identity of every shard where an index describes them all; else each task looks."""
    try:
        return fingerprint_records(open_source([task.source.path for task in tasks])).shards
    except ValueError as error:
        if isinstance(error, OSError):  # StorageError
            raise
        logging.warning("%s", error)
        return [None] * len(tasks)
