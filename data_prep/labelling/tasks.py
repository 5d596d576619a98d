"""Tasks of a labelling job: its inputs, the names of their outputs, and stale outputs."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence

import ml_collections
from absl import logging

from data_prep import sources
from data_prep.jobs import shards
from data_prep.jobs.failures import allowed_number
from diht_jax.readers.registry import SourceShard
from diht_jax.records.catalog import find_kind, find_shards
from diht_jax.records.formats import open_source
from diht_jax.records.labels.shards import ShardIdentity, label_shard_name
from diht_jax.records.shard_files import SUFFIXES, shard_name
from diht_jax.records.train_data import fingerprint_records
from diht_jax.storage import files
from diht_jax.storage.stores import StorageError


@dataclasses.dataclass(frozen=True, slots=True)
class LabelTask(shards.ShardTask):
    """Task that writes labels, embeddings, or a labelled copy of a record shard.

    Attributes:
        shard: name, records, bytes and digest of the record shard; None if it is damaged.
        embeddings: the task that makes the embeddings; None if this task does.
    """

    shard: ShardIdentity | None = None
    embeddings: LabelTask | None = None

    @property
    def name(self) -> str:
        """File name of the output."""
        return os.path.basename(self.output)

    @property
    def embedding(self) -> LabelTask:
        """The task that makes the embeddings, which may be this one."""
        return self.embeddings or self

    def identify(self) -> ShardIdentity:
        """Returns name, records, bytes and digest of the record shard.

        Raises:
            ValueError: the shard is damaged.
        """
        return self.shard or _identify([self.source])[0]


def find_inputs(text: str | None) -> list[SourceShard]:
    """Returns the shards that `config.input` names.

    Raises:
        ValueError: the key is not set, or there are no shards.
    """
    if not text:
        raise ValueError(
            "config.input is not set: expected a folder that data_prep.filter wrote, such as "
            "--config.input=/data/kept"
        )
    parts = sources.typed_texts(text)
    return [SourceShard(find_kind(parts), path) for path in find_shards(parts)]


def identify_inputs(inputs: Sequence[SourceShard]) -> list[ShardIdentity | None]:
    """Returns identities of the shards, independent of modification times; None if damaged.

    Raises:
        ValueError: all are damaged, or an index of the input is out of date.
    """
    try:
        return list(_identify(inputs))
    except StorageError:
        raise
    except ValueError as error:
        found = [_try_identify(source) for source in inputs]
        if not any(found):
            raise
        logging.warning("%s", error)
        return found


def refuse_changed(inputs: Sequence[SourceShard], before: Sequence[ShardIdentity | None]) -> None:
    """Raises if an input differs from the result of `identify_inputs` before.

    Raises:
        ValueError: a shard has changed, is damaged or is gone; the message names it.
    """
    for source, old, new in zip(inputs, before, identify_inputs(inputs), strict=True):
        if old != new:
            raise ValueError(
                f"{source} has changed since the command began, so its labels would be those of "
                "other records; run the command again when nothing writes to config.input any more"
            )


def _identify(inputs: Sequence[SourceShard]) -> Sequence[ShardIdentity]:
    return fingerprint_records(open_source([source.path for source in inputs])).shards


def _try_identify(source: SourceShard) -> ShardIdentity | None:
    try:
        return _identify([source])[0]
    except StorageError:
        raise
    except ValueError:
        return None


def plan_outputs(
    inputs: Sequence[SourceShard],
    folder: str,
    settings_hash: str,
    identities: Sequence[ShardIdentity | None],
    merged: ml_collections.ConfigDict | None = None,
) -> list[LabelTask]:
    """Returns the task of every input, and makes the folder.

    Outputs are named after their shards, so adding or removing inputs does not affect the others.
    Merged shards are numbered instead, as TFDS requires.

    Raises:
        ValueError: the folder contains shards that do not belong to this plan.
    """
    files.make_folder(folder)
    if merged is None:
        names = _name_outputs(inputs)
    else:
        count, suffix = len(inputs), SUFFIXES[merged.output_format]
        numbered = functools.partial(shard_name, merged.dataset_name, merged.split)
        names = [numbered(number, count, suffix) for number in range(count)]
        present = sources.read_shards(folder, merged.output_format)
        sources.refuse_foreign(folder, sorted(set(present) - set(names)))
    # Compared by records and not by time: a touched or copied shard counts as unchanged.
    return [
        LabelTask(
            source,
            files.join(folder, name),
            shards.hash_config({"settings": settings_hash, "shard": shard}),
            identity="size",
            shard=shard,
        )
        for source, name, shard in zip(inputs, names, identities, strict=True)
    ]


def _name_outputs(inputs: Sequence[SourceShard]) -> list[str]:
    """Names the files of labels; repeated shard names get a hash of their folder as prefix."""
    seen: collections.Counter[str] = collections.Counter()
    names = []
    for source in inputs:
        folder, name = os.path.dirname(source.path), label_shard_name(source.path)
        seen[name] += 1
        if seen[name] > 1:
            name = f"{hashlib.blake2b(folder.encode(), digest_size=4).hexdigest()}-{name}"
        names.append(name)
    return names


def remove_gone(tasks: Sequence[LabelTask], limit: float) -> None:
    """Removes outputs of shards that are gone, or warns if they are too many."""
    folder = os.path.dirname(tasks[0].output)
    present = files.list_names(folder)
    endings = (shards.STATS_SUFFIX, shards.FAILED_SUFFIX)
    made = {name.removesuffix(end) for name in present for end in endings if name.endswith(end)}
    gone = made.difference(task.name for task in tasks)
    allowed = allowed_number(limit, len(made))
    if len(gone) > allowed:
        logging.warning(
            "%s holds files of %d shards that config.input no longer names, such as %s; they stay, "
            "since config.max_changed_shards=%g allows %d to be removed",
            *(folder, len(gone), min(gone), limit, allowed),
        )
    elif gone:
        shards.remove_outputs(folder, gone)
        logging.warning("%s: files of %d shards that are gone are removed", folder, len(gone))
