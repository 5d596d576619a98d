"""Training and held-out examples of the heads: embeddings, and the concepts named in captions.

Method: DiHT, arXiv 2301.02280, "Concept Distillation". Vocabularies are built from the counts of
the filter, and targets from the mentions that it stored next to the shards; captions are not parsed
again. `diht_jax.records.vocabulary` defines the vocabulary files. Hashes of the record keys decide
which images are held out, and which are sampled if there are more than the config allows.

Targets are the concepts of one kind in each record: int32 [n, m], ids of a vocabulary, padded with
-1 to the m concepts of the longest record. NumPy only.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from data_prep.captions.mentions import read_mentions
from data_prep.duplicates.rows import hash_texts
from data_prep.jobs import shards
from data_prep.jobs.failures import find_finished
from data_prep.labelling.embeddings import (
    NO_COPIES,
    LocalCopies,
    key_ranks,
    load_embeddings,
)
from diht_jax.records.vocabulary import KINDS, STATS_SUFFIX, ConceptList, Vocabulary
from diht_jax.storage import files

# Concepts of a kind in memory, some 100 MB; the captions of the web keep naming new concepts.
_MAX_HELD = 2**20


def read_counts(shards: Sequence[str]) -> tuple[dict[str, collections.Counter[str]], list[int]]:
    """Sums the filter's counts of concepts; drops the rarest so far if there are too many.

    Returns:
        Kind -> concept -> pairs that mention it, and the number of records of each shard.

    Raises:
        ValueError: a shard has no statistics, or its captions were not parsed.
    """
    counts = {kind: collections.Counter() for kind in KINDS}
    records: list[int] = []
    paths = [shard + STATS_SUFFIX for shard in shards]
    everything = files.map_many(files.read_object, paths, paths[0] if paths else "")
    names = {os.path.basename(shard) for shard in shards}
    for shard, path, stats in zip(shards, paths, everything, strict=True):
        try:
            stats = stats or {}  # the file is missing or damaged
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
    """Selects the concepts and numbers them, the most frequent first.

    Returns:
        Both vocabularies; concepts with equal counts are ordered by name. One of them may be empty.

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
    """Reads the targets of a shard: the concepts of a vocabulary that each record's captions name.

    Raises:
        ValueError: the shard's concept file is missing or damaged.
    """
    known = {name: i for i, name in enumerate(concepts.names)}
    names, lengths, ids = read_mentions(shard, concepts.kind)
    mapped = np.array([known.get(name, -1) for name in names], np.int64)[ids]
    rows = np.repeat(np.arange(len(lengths)), lengths)[mapped >= 0]
    return make_targets(np.bincount(rows, minlength=len(lengths)), mapped[mapped >= 0])


def make_targets(lengths: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Makes the targets of n records from their concatenated `ids` and `lengths` [n]."""
    targets = np.full((len(lengths), int(lengths.max(initial=0))), -1, np.int32)
    targets[np.arange(targets.shape[1]) < lengths[:, None]] = ids
    return targets


def concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenates the targets of several shards."""
    width = max((part.shape[1] for part in parts), default=0)
    padded = (np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in parts)
    return np.concatenate([np.zeros((0, width), np.int32), *padded])


def count_concepts(targets: np.ndarray, num_concepts: int) -> np.ndarray:
    """Counts the records that have each concept; int64 [num_concepts]."""
    return np.bincount(targets[targets >= 0], minlength=num_concepts)


def concept_factors(counts: np.ndarray, num_records: int, threshold: float) -> np.ndarray:
    """Computes how much more often than it occurs each concept should be seen.

    A concept in a share f of the records has the factor max(1, sqrt(threshold / f)), the square
    root of its inverse frequency (recalled of DiHT, arXiv 2301.02280; the form with a threshold is
    from Mahajan et al. 2018, arXiv 1805.00932).

    Args:
        counts: int [v], records that have each concept; 0 is treated as 1.
        threshold: share of the records up to which a concept is up-sampled; 1 up-samples all.

    Returns:
        float64 [v].
    """
    frequency = np.maximum(counts, 1) / max(1, num_records)
    return np.maximum(1.0, np.sqrt(threshold / frequency))


def repeat_factors(targets: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Returns the sampling weight of each record: the largest factor of its concepts, or 0; [n]."""
    return np.append(factors, 0.0)[targets].max(axis=1, initial=0)


# Seed offsets that make the two choices by key independent.
_SPLIT, _SAMPLE = 0, 1


@dataclasses.dataclass(frozen=True)
class Split:
    """Training or held-out examples of one kind of concepts.

    Attributes:
        embeddings: float [n, d].
        targets: targets of the n images (module docstring), at least one concept each.
    """

    embeddings: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Examples:
    """Training or held-out embeddings with the targets of both kinds of concepts.

    Attributes:
        embeddings: [n, d].
        targets: kind -> targets of the n images, including those without a concept.
    """

    embeddings: np.ndarray
    targets: Mapping[str, np.ndarray]

    def of_kind(self, kind: str) -> Split:
        """Returns the examples with at least one concept of a kind."""
        lengths = (self.targets[kind] >= 0).sum(axis=1)
        with_concept = np.flatnonzero(lengths)
        targets = self.targets[kind][with_concept, : lengths.max(initial=0)]
        return Split(self.embeddings[with_concept], targets)


def is_held_out(key_hashes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Marks a share of the images as held out, by a hash of their keys; bool [n]."""
    return key_ranks(key_hashes, 2 * seed + _SPLIT) < share


def choose_shards(
    records: Sequence[int], names: Sequence[str], config: ml_collections.ConfigDict
) -> list[int]:
    """Selects enough shards to provide the number of images that the config allows.

    A shard is selected by a hash of its name, which makes the choice independent of other shards.
    """
    share = config.heads.held_out
    wanted = max(config.heads.max_examples / (1 - share), config.heads.max_held_out / share)
    order = np.argsort(key_ranks(hash_texts(names), 2 * config.seed + _SAMPLE), kind="stable")
    before = np.cumsum(np.array(records)[order]) - np.array(records)[order]
    return sorted(order[before < wanted].tolist())


def gather_examples(
    config: ml_collections.ConfigDict,
    vocabulary: Vocabulary,
    embedded: Sequence[shards.ShardTask],
    copies: LocalCopies = NO_COPIES,
) -> tuple[Examples, Examples]:
    """Loads the training and held-out examples, sampled by key down to the limits of the config.

    Raises:
        ValueError: a file is damaged, or embeddings and mentions belong to different records.
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
        key_hashes = hash_texts(found.keys)
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
    # A shard without any embedding has no embedding size.
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
