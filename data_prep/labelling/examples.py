"""Examples to train and measure the heads on: embeddings, and the concepts that captions name.

Method: DiHT, arXiv 2301.02280, "Concept Distillation". Vocabularies come from the counts of the
filter, and targets from the mentions that it stored next to the shards; no caption is parsed here.
The files of vocabularies are defined in `diht_jax.records.vocabulary`. The keys of the records
decide which images are held out, and which are sampled where there are more than the config wants.

Targets are the concepts of records, of one kind: int32 [n, m], ids of a vocabulary, and -1 behind
those of a record that has fewer than m. NumPy only.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from data_prep.captions.mentions import read_mentions
from data_prep.jobs import shards
from data_prep.jobs.failures import find_finished
from data_prep.labelling.embeddings import (
    NO_COPIES,
    LocalCopies,
    hash_keys,
    key_ranks,
    load_embeddings,
)
from diht_jax.records.vocabulary import KINDS, STATS_SUFFIX, ConceptList, Vocabulary
from diht_jax.storage import files

# Concepts of a kind that are held at once, some 100 MB; the web's captions name ever new ones.
_MAX_HELD = 2**20


def read_counts(shards: Sequence[str]) -> tuple[dict[str, collections.Counter[str]], list[int]]:
    """Adds up what the filter counted; of very many concepts the rarest so far are let go.

    Returns:
        Kind -> concept -> pairs that mention it, and the number of records of each shard.

    Raises:
        ValueError: a shard without statistics, or one whose captions were not parsed.
    """
    counts = {kind: collections.Counter() for kind in KINDS}
    records: list[int] = []
    paths = [shard + STATS_SUFFIX for shard in shards]
    everything = files.map_many(files.read_object, paths, paths[0] if paths else "")
    names = {os.path.basename(shard) for shard in shards}
    for shard, path, stats in zip(shards, paths, everything, strict=True):
        try:
            stats = stats or {}  # a missing or damaged file
            found = [stats["counts"]["concepts"][kind] for kind in KINDS]
            owner, number = stats["output"]["file"], stats["output"]["records"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: missing, damaged, or no counts of concepts; write the shards again with "
                "`python -m data_prep.filter` and config.concepts=True"
            ) from error
        if owner in names and owner != os.path.basename(shard):
            raise ValueError(f"{path}: these are the statistics of {owner}; write the shards again")
        records.append(number)
        for kind, own in zip(KINDS, found, strict=True):
            counts[kind].update(own)
            if len(counts[kind]) > _MAX_HELD:
                counts[kind] = collections.Counter(dict(counts[kind].most_common(_MAX_HELD // 2)))
    return counts, records


def build_vocabulary(
    counts: Mapping[str, Mapping[str, int]], config: ml_collections.ConfigDict
) -> Vocabulary:
    """Chooses concepts and gives them ids, the most frequent first.

    Returns:
        Both vocabularies; equal counts are ordered by name. One of them may be empty.

    Raises:
        ValueError: both are empty.
    """
    parts = []
    for kind in KINDS:
        kept = [
            (-count, name)
            for name, count in counts[kind].items()
            if count >= config.min_count and name not in config[f"stop_{kind}"]
        ]
        kept = sorted(kept)[: config[f"max_{kind}"]]
        names, negative = tuple(name for _, name in kept), (count for count, _ in kept)
        parts.append(ConceptList(kind, names, tuple(-count for count in negative)))
    if not any(parts):
        best = max((max(c.values(), default=0) for c in counts.values()), default=0)
        raise ValueError(
            f"config.vocabulary.min_count={config.min_count} leaves no concept; the most frequent "
            f"one occurs in {best} pairs"
        )
    return Vocabulary(*parts)


def read_targets(shard: str, concepts: ConceptList) -> np.ndarray:
    """The concepts of a vocabulary that the captions of each record of a shard name, as targets.

    Raises:
        ValueError: the shard's concept file is missing or damaged.
    """
    known = {name: i for i, name in enumerate(concepts.names)}
    names, lengths, ids = read_mentions(shard, concepts.kind)
    mapped = np.array([known.get(name, -1) for name in names], np.int64)[ids]
    rows = np.repeat(np.arange(len(lengths)), lengths)[mapped >= 0]
    return make_targets(np.bincount(rows, minlength=len(lengths)), mapped[mapped >= 0])


def make_targets(lengths: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Targets of n records, of which `lengths` [n] says how many of the `ids` each has."""
    targets = np.full((len(lengths), int(lengths.max(initial=0))), -1, np.int32)
    targets[np.arange(targets.shape[1]) < lengths[:, None]] = ids
    return targets


def concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The targets of several shards as one."""
    width = max((part.shape[1] for part in parts), default=0)
    padded = (np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in parts)
    return np.concatenate([np.zeros((0, width), np.int32), *padded])


def count_concepts(targets: np.ndarray, num_concepts: int) -> np.ndarray:
    """int64 [num_concepts], records that have each."""
    return np.bincount(targets[targets >= 0], minlength=num_concepts)


def concept_factors(counts: np.ndarray, num_records: int, threshold: float) -> np.ndarray:
    """The factor by which each concept should be seen more often than it occurs.

    A concept in a share f of the records has the factor max(1, sqrt(threshold / f)), the square
    root of its inverse frequency (recalled of DiHT, arXiv 2301.02280; the form with a threshold is
    that of Mahajan et al. 2018, arXiv 1805.00932).

    Args:
        counts: int [v], records that have each; a concept that none has counts as one of one.
        threshold: share of the records above which a concept is not rare; 1 repeats all of them.

    Returns:
        float64 [v].
    """
    frequency = np.maximum(counts, 1) / max(1, num_records)
    return np.maximum(1.0, np.sqrt(threshold / frequency))


def repeat_factors(targets: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The weight of each record in a draw: its concepts' largest factor, or 0; float64 [n]."""
    return np.append(factors, 0.0)[targets].max(axis=1, initial=0)


# Seeds of independent choices by key.
_SPLIT, _SAMPLE = 0, 1


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples of training, or held out.

    Attributes:
        embeddings: float [n, d].
        targets: of the n images, see the module; each has at least one concept.
    """

    embeddings: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Examples:
    """Embeddings with their targets, of training or held out.

    Attributes:
        embeddings: [n, d].
        targets: kind -> targets of the n images, also of those without a concept.
    """

    embeddings: np.ndarray
    targets: Mapping[str, np.ndarray]

    def of_kind(self, kind: str) -> Split:
        """Those that have a concept of the kind."""
        lengths = (self.targets[kind] >= 0).sum(axis=1)
        with_concept = np.flatnonzero(lengths)
        targets = self.targets[kind][with_concept, : lengths.max(initial=0)]
        return Split(self.embeddings[with_concept], targets)


def is_held_out(key_hashes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Marks a share of the images, by a hash of their keys, that are never trained on: bool [n]."""
    return key_ranks(key_hashes, 2 * seed + _SPLIT) < share


def choose_shards(
    records: Sequence[int], names: Sequence[str], config: ml_collections.ConfigDict
) -> list[int]:
    """The shards that the heads learn from: as many as have the images that the config wants.

    A hash of its name decides about a shard, so that it does not depend on the others.
    """
    share = config.heads.held_out
    wanted = max(config.heads.max_examples / (1 - share), config.heads.max_held_out / share)
    order = np.argsort(key_ranks(hash_keys(names), 2 * config.seed + _SAMPLE), kind="stable")
    before = np.cumsum(np.array(records)[order]) - np.array(records)[order]
    return sorted(order[before < wanted].tolist())


def gather_examples(
    config: ml_collections.ConfigDict,
    vocabulary: Vocabulary,
    embedded: Sequence[shards.ShardTask],
    copies: LocalCopies = NO_COPIES,
) -> tuple[Examples, Examples]:
    """Training and held-out examples; a sample by key, where there are more than the config wants.

    Raises:
        ValueError: a file is damaged, or embeddings and mentions are not of the same records.
    """
    settings = config.heads
    done = find_finished(embedded)
    total = sum(stats["output"]["records"] for stats in done.values())
    limits = (
        settings.max_examples / max(1, total * (1 - settings.held_out)),
        settings.max_held_out / max(1, total * settings.held_out),
    )
    vectors: tuple[list, list] = ([], [])
    targets = tuple({part.kind: [] for part in vocabulary} for _ in range(2))
    for task in embedded:
        found = load_embeddings(task, copies)
        key_hashes = hash_keys(found.keys)
        held_out = is_held_out(key_hashes, settings.held_out, config.seed)
        rank = key_ranks(key_hashes, 2 * config.seed + _SAMPLE)
        has_embedding = np.zeros(len(held_out), bool)
        has_embedding[found.rows] = True
        of_shard = {part.kind: _targets_of(task, part, len(held_out)) for part in vocabulary}
        for number, of_split in enumerate((~held_out, held_out)):
            chosen = of_split & has_embedding & (rank < limits[number])
            vectors[number].append(found.embeddings[chosen[found.rows]])
            for kind, shard_targets in of_shard.items():
                targets[number][kind].append(shard_targets[chosen])
    # A shard without any embedding does not know their size.
    train, held_out = (
        Examples(
            np.concatenate(
                [part for part in parts if part.shape[1]] or [np.zeros((0, 1), np.float32)]
            ),
            {kind: concatenate(found) for kind, found in of_split.items()},
        )
        for parts, of_split in zip(vectors, targets, strict=True)
    )
    return train, held_out


def count_named(*splits: Examples) -> dict[str, int]:
    """Counts the images, and those that name a concept of the vocabulary; JSON-able."""
    named = [
        np.any([(targets >= 0).any(axis=1) for targets in split.targets.values()], axis=0)
        for split in splits
    ]
    return {
        "all": sum(mask.size for mask in named),
        "named": sum(int(mask.sum()) for mask in named),
    }


def _targets_of(task: shards.ShardTask, part: ConceptList, num_records: int) -> np.ndarray:
    targets = read_targets(task.source.path, part)
    if len(targets) != num_records:
        raise ValueError(
            f"{task.source}: {num_records} records, but concepts of {len(targets)}; filter again"
        )
    return targets
