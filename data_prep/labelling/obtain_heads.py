"""The heads of a labelling job: those that are there, those of another folder, or new ones.

Heads and vocabulary stay while few of the shards are others than those they were made for
(`config.heads.max_changed_shards`), since new ones mean that every shard is labelled again. New
heads learn from as many shards as have the images that the config wants, chosen by their names:
these are embedded first, and each of the others is embedded and labelled in one pass.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs import shards
from data_prep.jobs.failures import allowed_number
from data_prep.labelling import heads as head_files
from data_prep.labelling import vocabulary as concept_vocabulary
from data_prep.labelling.embeddings import EmbeddingTask
from data_prep.labelling.examples import choose_shards, gather_examples, warn_of_few_mentions
from data_prep.labelling.scratch import Scratch
from data_prep.teachers.base import TeacherInfo
from diht_jax.records.vocabulary import (
    Vocabulary,
    encode_concepts,
    read_vocabulary,
    vocabulary_path,
)
from diht_jax.storage import files

_HEADS_VERSION = 1
# Keys of `config.heads` that do not decide what the heads become.
_NOT_HASHED = ("max_changed_shards",)


@dataclasses.dataclass(frozen=True)
class HeadsPlan:
    """Where the heads of a folder come from.

    Attributes:
        vocabulary: v of each head.
        sample: the embedding tasks of the shards that new heads learn from; empty where no head is
            trained.
        kept: the description of heads that stay; None where they are made.
    """

    vocabulary: Vocabulary
    sample: list[EmbeddingTask]
    kept: dict[str, Any] | None = None


def plan_heads(
    config: ml_collections.ConfigDict, folder: str, embedded: Sequence[EmbeddingTask]
) -> HeadsPlan:
    """Decides whether the heads of a folder stay, and else what they are made of.

    Args:
        config: of `labelling.config.default_config`.
        folder: of the output.
        embedded: the embedding task of every shard.

    Raises:
        ValueError: a shard without counts of concepts, or no concept is frequent enough.
    """
    description = _read_heads(folder)
    if config.heads.load:
        vocabulary = read_vocabulary(config.heads.load)
        return HeadsPlan(vocabulary, [], _of_load(config, description, vocabulary, embedded))
    if description and _are_kept(config, description, embedded):
        return HeadsPlan(read_vocabulary(folder), [], description)
    counted = concept_vocabulary.read_counts([task.source.path for task in embedded])
    settings = config.vocabulary
    vocabulary = concept_vocabulary.build_vocabulary(
        counted.concepts,
        min_count=settings.min_count,
        stop={"objects": settings.stop_objects, "attributes": settings.stop_attributes},
        max_size={"objects": settings.max_objects, "attributes": settings.max_attributes},
    )
    logging.info("%d objects, %d attributes", *map(len, vocabulary))
    # Of before heads listed the shards that they were made for.
    if description and description["config_hash"] == _hash_all(config, vocabulary, embedded):
        return HeadsPlan(vocabulary, [], description)
    chosen = choose_shards(counted.records, list(map(_name, embedded)), config)
    return HeadsPlan(vocabulary, [embedded[number] for number in chosen])


def use_trained(
    config: ml_collections.ConfigDict,
    folder: str,
    plan: HeadsPlan,
    embedded: Sequence[EmbeddingTask],
) -> HeadsPlan:
    """The plan with the heads of another job, where one has trained them since it was made."""
    if plan.kept is not None:
        return plan
    description = _read_heads(folder)
    if config.heads.load:
        kept = _of_load(config, description, plan.vocabulary, embedded)
        return dataclasses.replace(plan, kept=kept)
    if description and _are_kept(config, description, embedded):
        return HeadsPlan(read_vocabulary(folder), plan.sample, description)
    return plan


def _read_heads(folder: str) -> dict[str, Any] | None:
    """The description of the heads of a folder, where it has both."""
    description = head_files.read_description(folder)
    if description and description["weights_hash"] != head_files.hash_heads(folder):
        return None
    return description


def obtain_heads(
    config: ml_collections.ConfigDict,
    folder: str,
    plan: HeadsPlan,
    embedded: Sequence[EmbeddingTask],
    failed: Collection[str],
    teacher: TeacherInfo,
    scratch: Scratch | None = None,
) -> dict[str, Any]:
    """Heads and description of a folder, by the plan; writes the vocabulary as well.

    Args:
        config: of `labelling.config.default_config`.
        folder: gets `heads.npz` and `heads.json`.
        plan: of `plan_heads`.
        embedded: the embedding task of every shard; those of the sample that are done are read.
        failed: sources of the sample that have no embeddings.
        teacher: whose embeddings they are.
        scratch: where copies of them may be.

    Returns:
        The description, as `heads.json` has it.
    """
    for part in plan.vocabulary:
        files.write_bytes(vocabulary_path(folder, part.kind), encode_concepts(part))
    if plan.kept is not None:
        logging.info("heads: trained before")
        return plan.kept
    heads, results = {}, {}
    sample = [task for task in plan.sample if str(task.source) not in failed]
    if config.heads.load:
        heads = head_files.load_heads(config.heads.load)
        results = head_files.load_results(config.heads.load, teacher)
    else:
        # Workers hold the teacher on the same device, and come back after the training.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        # It needs JAX, which no worker should wait for: workers import this module as well.
        from data_prep.labelling.train_heads import train_and_measure

        train, held_out = gather_examples(config, plan.vocabulary, sample, scratch)
        warn_of_few_mentions(train, held_out)
        for part in plan.vocabulary:
            if len(part):
                heads[part.kind], results[part.kind] = train_and_measure(
                    config, part, train, held_out
                )
    head_files.write_heads(folder, heads)
    missing = {_name(task): None for task in embedded if str(task.source) in failed}
    description = {
        "config_hash": _hash_all(config, plan.vocabulary, sample),
        "weights_hash": head_files.hash_heads(folder),
        "recipe": _hash_recipe(config, embedded),
        "inputs": _identify(embedded) | missing,
        "loaded_from": config.heads.load,
        "vocabulary": plan.vocabulary.describe(),
        "teacher": dict(teacher.identity),
        "heads": results,
    }
    shards.write_json(files.join(folder, head_files.DESCRIPTION), description)
    return description


def _of_load(
    config: ml_collections.ConfigDict,
    description: dict[str, Any] | None,
    vocabulary: Vocabulary,
    embedded: Sequence[EmbeddingTask],
) -> dict[str, Any] | None:
    """The description of heads that were taken over before; whatever the shards, they stay."""
    if description is None or description["vocabulary"] != vocabulary.describe():
        return None
    is_same = description.get("recipe") == _hash_recipe(config, embedded)
    if is_same or description["config_hash"] == _hash_all(config, vocabulary, embedded):
        return description
    return None


def _are_kept(
    config: ml_collections.ConfigDict,
    description: Mapping[str, Any],
    embedded: Sequence[EmbeddingTask],
) -> bool:
    """Whether heads are of this config, and few shards are others than those they were made for."""
    if description.get("recipe") != _hash_recipe(config, embedded):
        return False
    now = _identify(embedded)
    before = {
        name: (known,) if isinstance(known, str) else known
        for name, known in description["inputs"].items()
    }
    # A shard that had failed at that time may come, however often it was written again.
    others = [
        name
        for name in before.keys() | now.keys()
        if before.get(name, ()) is not None and not {*before.get(name, ())} & {*now.get(name, ())}
    ]
    allowed = allowed_number(config.heads.max_changed_shards, len(before))
    if others:
        logging.info(
            "heads: %d of %d shards are others than when they were trained, and "
            "config.heads.max_changed_shards=%g allows %d: they %s",
            len(others),
            len(before),
            config.heads.max_changed_shards,
            allowed,
            "stay" if len(others) <= allowed else "are trained again",
        )
    return len(others) <= allowed


def _hash_recipe(config: ml_collections.ConfigDict, embedded: Sequence[EmbeddingTask]) -> str:
    """Of all that decides vocabulary and heads but the shards."""
    heads = {k: v for k, v in config.heads.to_dict().items() if k not in _NOT_HASHED}
    settings = {
        "format_version": _HEADS_VERSION,
        "heads": heads,
        "vocabulary": config.vocabulary.to_dict(),
        "seed": config.seed,
        "embeddings": embedded[0].config_hash,
    }
    return shards.hash_config(settings)


def _hash_all(
    config: ml_collections.ConfigDict,
    vocabulary: Vocabulary,
    embedded: Sequence[EmbeddingTask],
) -> str:
    """Of all that decides the heads, the shards that they learn from as well."""
    settings = {
        "format_version": _HEADS_VERSION,
        "heads": {k: v for k, v in config.heads.to_dict().items() if k not in _NOT_HASHED},
        "seed": config.seed,
        "vocabulary": vocabulary.describe(),
        "embeddings": [[task.config_hash, task.source.identity()] for task in embedded],
    }
    return shards.hash_config(settings)


def _identify(embedded: Sequence[EmbeddingTask]) -> dict[str, list[str] | None]:
    """Name of each shard -> hashes by which it is known: of its state, and of its records."""
    found = {}
    for task in embedded:
        known = [task.source.identity()] + ([{"shard": task.shard}] if task.shard else [])
        found[_name(task)] = list(map(shards.hash_config, known))
    return found


def _name(task: shards.ShardTask) -> str:
    return os.path.basename(task.output)
