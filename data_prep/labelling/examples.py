"""Examples to train and measure the heads on: embeddings, and the concepts that captions name.

The keys of the records decide which images are held out, and which are sampled where there are more
than the config wants. NumPy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from data_prep.jobs import shards
from data_prep.jobs.failures import find_finished
from data_prep.labelling import vocabulary as concept_vocabulary
from data_prep.labelling.embeddings import (
    NO_COPIES,
    LocalCopies,
    hash_keys,
    key_ranks,
    load_embeddings,
)
from diht_jax.records.vocabulary import ConceptList, Vocabulary

# Seeds of independent choices by key.
_SPLIT, _SAMPLE = 0, 1


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples of training, or held out.

    Attributes:
        embeddings: float [n, d].
        targets: of the n images, see `vocabulary`; each has at least one concept.
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
        of_shard = {part.kind: _read_targets(task, part, len(held_out)) for part in vocabulary}
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
            {kind: concept_vocabulary.concatenate(found) for kind, found in of_split.items()},
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


def _read_targets(task: shards.ShardTask, part: ConceptList, num_records: int) -> np.ndarray:
    targets = concept_vocabulary.read_targets(task.source.path, part)
    if len(targets) != num_records:
        raise ValueError(
            f"{task.source}: {num_records} records, but concepts of {len(targets)}; filter again"
        )
    return targets
