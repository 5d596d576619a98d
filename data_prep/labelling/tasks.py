"""The units of a labelling job: its inputs, the names of their outputs, and which outputs count."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Sequence

import ml_collections
from absl import logging

from data_prep.jobs import shards
from data_prep.jobs.failures import allowed_number
from diht_jax.readers.registry import SourceShard
from diht_jax.records.catalog import find_kind, find_shards
from diht_jax.records.fingerprint import fingerprint_records
from diht_jax.records.formats.registry import open_source
from diht_jax.records.labels.shards import ShardIdentity, label_shard_name
from diht_jax.storage import files
from diht_jax.storage.retries import StorageError


@dataclasses.dataclass(frozen=True, slots=True)
class LabelTask(shards.ShardTask):
    """A task that makes labels or embeddings of a record shard, or writes it again with labels.

    Attributes:
        shard: name, records, bytes and digest of the record shard; None of a damaged one.
        embedding: the task of its embeddings; None of a task that makes them.
    """

    shard: ShardIdentity | None = None
    embedding: LabelTask | None = None

    def identify(self) -> ShardIdentity:
        """Name, records, bytes and digest of the record shard.

        Raises:
            ValueError: the shard is damaged.
        """
        if self.shard is not None:
            return self.shard
        return fingerprint_records(open_source([self.source.path])).shards[0]


def input_paths(text: str) -> list[str]:
    """The paths in `config.input`, which commas separate."""
    return [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]


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
    return [SourceShard(find_kind(parts), path) for path in find_shards(parts)]


def identify_inputs(inputs: Sequence[SourceShard]) -> list[ShardIdentity | None]:
    """The identity of every shard, which does not depend on its time; None for damaged ones.

    Raises:
        ValueError: all are damaged, or an index of theirs is out of date.
    """
    try:
        return list(fingerprint_records(open_source([source.path for source in inputs])).shards)
    except StorageError:
        raise
    except ValueError as error:
        found = [_identify_alone(source) for source in inputs]
        if not any(found):
            raise
        logging.warning("%s", error)
        return found


def _identify_alone(source: SourceShard) -> ShardIdentity | None:
    try:
        return fingerprint_records(open_source([source.path])).shards[0]
    except StorageError:
        raise
    except ValueError:
        return None


def plan_outputs(
    inputs: Sequence[SourceShard],
    folder: str,
    settings_hash: str,
    identities: Sequence[ShardIdentity | None],
) -> list[LabelTask]:
    """The task of every input, whose output is called as its shard is; makes the folder.

    So inputs that are added or removed change nothing for the others.

    Args:
        inputs: of `find_inputs`.
        folder: of the outputs.
        settings_hash: of all that decides them but the shard.
        identities: of `identify_inputs`.
    """
    files.make_folder(folder)
    paths = [files.join(folder, name) for name in _name_outputs(inputs)]
    return _make_tasks(inputs, paths, settings_hash, identities)


def plan_merged(
    config: ml_collections.ConfigDict,
    inputs: Sequence[SourceShard],
    folder: str,
    settings_hash: str,
    identities: Sequence[ShardIdentity | None],
) -> list[LabelTask]:
    """The task of every input that is written again with labels; numbered, as TFDS wants them.

    Arguments of `plan_outputs`.

    Raises:
        ValueError: the folder holds shards that do not belong to these.
    """
    planned = shards.plan_tasks(
        inputs,
        folder,
        dataset=config.dataset_name,
        split=config.split,
        config_hash="",
        output_format=config.output_format,
    )
    return _make_tasks(inputs, [task.output for task in planned], settings_hash, identities)


def _make_tasks(
    inputs: Sequence[SourceShard],
    outputs: Sequence[str],
    settings_hash: str,
    identities: Sequence[ShardIdentity | None],
) -> list[LabelTask]:
    # The records count, and not the time of a file: a shard that was touched or copied stays.
    return [
        LabelTask(
            source,
            output,
            shards.hash_config({"settings": settings_hash, "shard": shard}),
            identity="size",
            shard=shard,
        )
        for source, output, shard in zip(inputs, outputs, identities, strict=True)
    ]


def _name_outputs(inputs: Sequence[SourceShard]) -> list[str]:
    """File names of labels; the second one of a name has a hash of its folder in front."""
    seen: collections.Counter[str] = collections.Counter()
    names = []
    for source in inputs:
        folder, name = os.path.dirname(source.path), label_shard_name(source.path)
        seen[name] += 1
        if seen[name] > 1:
            name = f"{hashlib.blake2b(folder.encode(), digest_size=4).hexdigest()}-{name}"
        names.append(name)
    return names


def remove_gone(tasks: Sequence[shards.ShardTask], limit: float) -> None:
    """Removes outputs of shards that are gone, while they are few; else it is a warning.

    Args:
        tasks: of all shards that are there, in one folder.
        limit: `config.max_changed_shards`.
    """
    folder = os.path.dirname(tasks[0].output)
    own = {os.path.basename(task.output) for task in tasks}
    present = files.list_names(folder)
    endings = (shards.STATS_SUFFIX, shards.FAILED_SUFFIX)
    made = {name.removesuffix(end) for name in present for end in endings if name.endswith(end)}
    gone = made - own
    allowed = allowed_number(limit, len(made))
    if len(gone) > allowed:
        logging.warning(
            "%s holds files of %d shards that config.input no longer names, such as %s; they stay, "
            "since config.max_changed_shards=%g allows %d to be removed",
            folder,
            len(gone),
            min(gone),
            limit,
            allowed,
        )
        return
    for name in shards.names_below(present, gone):
        files.remove(files.join(folder, name))
    if gone:
        logging.warning("%s: files of %d shards that are gone are removed", folder, len(gone))


def name_of(task: shards.ShardTask) -> str:
    """The file name of a task's output."""
    return os.path.basename(task.output)


def describe_inputs(tasks: Sequence[LabelTask]) -> dict[str, str]:
    """Name of each output -> a hash by which the records of its input are known."""
    return {name_of(task): shards.hash_config({"shard": task.shard}) for task in tasks}
