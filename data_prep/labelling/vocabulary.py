"""The concepts of a data set: vocabularies from counts, targets of its records, repeat factors.

Method: DiHT, arXiv 2301.02280, "Concept Distillation". The counts and mentions are stored
next to the filtered shards; no caption is parsed here. The files of vocabularies are defined in
`diht_jax.records.vocabulary`.

Targets are the concepts of records, of one kind: int32 [n, m], ids of a vocabulary, and -1 behind
those of a record that has fewer than m.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from data_prep.captions import graph
from diht_jax.records.schema import MAX_CONCEPT_ID
from diht_jax.records.vocabulary import KINDS, STATS_SUFFIX, ConceptList, Vocabulary
from diht_jax.storage import files

# Concepts of a kind that are held at once, some 100 MB; the web's captions name ever new ones.
_MAX_HELD = 2**20


class Counted(NamedTuple):
    """Counts of the filter in some shards.

    Attributes:
        concepts: kind -> concept -> pairs that mention it.
        records: of each shard.
    """

    concepts: dict[str, collections.Counter[str]]
    records: list[int]


def read_counts(shards: Sequence[str]) -> Counted:
    """Adds up what the filter counted; of very many concepts the rarest so far are let go.

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
    return Counted(counts, records)


def build_vocabulary(
    counts: Mapping[str, Mapping[str, int]], config: ml_collections.ConfigDict
) -> Vocabulary:
    """Chooses concepts and gives them ids, the most frequent first.

    Returns:
        Both vocabularies; equal counts are ordered by name. One of them may be empty.

    Raises:
        ValueError: both are empty, or one has more concepts than a record's ids can tell apart.
    """
    parts = []
    for kind in KINDS:
        kept = [
            (-count, name)
            for name, count in counts[kind].items()
            if count >= config.min_count and name not in config[f"stop_{kind}"]
        ]
        kept = sorted(kept)[: config[f"max_{kind}"]]
        if len(kept) > MAX_CONCEPT_ID + 1:
            raise ValueError(
                f"{len(kept)} {kind}: more than {MAX_CONCEPT_ID + 1}; raise "
                "config.vocabulary.min_count"
            )
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
    names, lengths, ids = graph.read_mentions(shard, concepts.kind)
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
    root of its inverse frequency (DiHT, arXiv 2301.02280, "Concept Distillation"; the form with a
    threshold is that of Mahajan et al. 2018, arXiv 1805.00932).

    Args:
        counts: int [v], records that have each; a concept that none has counts as one of one.
        num_records: that were counted.
        threshold: share of the records above which a concept is not rare; 1 repeats all of them.

    Returns:
        float64 [v].
    """
    frequency = np.maximum(counts, 1) / max(1, num_records)
    return np.maximum(1.0, np.sqrt(threshold / frequency))


def repeat_factors(targets: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The weight of each record in a draw: its concepts' largest factor, or 0; float64 [n]."""
    return np.append(factors, 0.0)[targets].max(axis=1, initial=0)
