"""The two heads of a data set: out of embeddings and mentions come `heads.npz` and `heads.json`.

`data_prep.label` calls it between embedding and labelling. The training itself is in `heads.py`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.jobs import shards
from data_prep.labelling import metrics
from data_prep.labelling import vocabulary as concept_vocabulary
from data_prep.labelling.embeddings import key_ranks, load_embeddings
from data_prep.labelling.head_weights import WEIGHTS, Head, hash_heads, load_heads, write_heads
from data_prep.labelling.train_heads import Split, train_head
from data_prep.labelling.vocabulary import Targets
from data_prep.teachers.base import TeacherInfo
from diht_jax.data.records.vocabulary import (
    ConceptList,
    Vocabulary,
    check_vocabulary,
    read_vocabulary,
)

DESCRIPTION = "heads.json"

_FORMAT_VERSION = 1
# Seeds of independent choices by key.
_SPLIT, _SAMPLE = 0, 1
# How many of them the description names, for the report.
_LISTED = 20
# Fewer held-out images say too little of a concept to rank it.
_MIN_POSITIVES = 5


@dataclasses.dataclass(frozen=True)
class Examples:
    """Embeddings with their targets, of training or held out.

    Attributes:
        embeddings: [n, d].
        targets: kind -> targets of the n images, empty rows included.
    """

    embeddings: np.ndarray
    targets: Mapping[str, Targets]

    def of_kind(self, kind: str) -> Split:
        """Those that have a concept of the kind."""
        with_concept = np.flatnonzero(self.targets[kind].lengths)
        return Split(self.embeddings[with_concept], self.targets[kind].take(with_concept))


def is_held_out(key_hashes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [n]: which images are never trained on.

    Args:
        key_hashes: uint64 [n].
        share: of the images.
        seed: of the choice.
    """
    return key_ranks(key_hashes, 2 * seed + _SPLIT) < share


def obtain_heads(
    config: ml_collections.ConfigDict,
    folder: str,
    vocabulary: Vocabulary,
    embedded: Sequence[shards.ShardTask],
    teacher: TeacherInfo,
) -> dict[str, Any]:
    """The heads of a folder: those that are there, or new ones.

    Args:
        config: of `label_config.default_config`.
        folder: gets `heads.npz` and `heads.json`.
        vocabulary: v of each head.
        embedded: finished tasks of `embeddings.plan_embeddings`.
        teacher: whose embeddings they are.

    Returns:
        The description, as `heads.json` has it.
    """
    settings = {
        "format_version": _FORMAT_VERSION,
        "heads": config.heads.to_dict(),
        "seed": config.seed,
        "vocabulary": vocabulary.describe(),
        "embeddings": [[task.config_hash, task.source.identity()] for task in embedded],
    }
    config_hash = shards.hash_config(settings)
    description = _read_description(folder)
    present = {"config_hash": config_hash, "weights_hash": hash_heads(folder)}
    if description is not None and present.items() <= description.items():
        logging.info("heads: trained before")
        return description
    heads, results = {}, {}
    if config.heads.load:
        heads, results = load_heads(config.heads.load), _check_loaded(config, vocabulary, teacher)
    else:
        train, held_out = gather_examples(config, vocabulary, embedded)
        for part in vocabulary:
            if len(part):
                heads[part.kind], results[part.kind] = _train(config, part, train, held_out)
    write_heads(folder, heads)
    description = {
        "config_hash": config_hash,
        "weights_hash": hash_heads(folder),
        "loaded_from": config.heads.load,
        "vocabulary": vocabulary.describe(),
        "teacher": dict(teacher.identity),
        "heads": results,
    }
    shards.write_json(pathlib.Path(folder) / DESCRIPTION, description)
    return description


def gather_examples(
    config: ml_collections.ConfigDict,
    vocabulary: Vocabulary,
    embedded: Sequence[shards.ShardTask],
) -> tuple[Examples, Examples]:
    """Training and held-out examples; a sample by key, where there are more than the config wants.

    Raises:
        ValueError: a file is damaged, or embeddings and mentions are not of the same records.
    """
    settings = config.heads
    total = sum(shards.load_finished(task)["output"]["records"] for task in embedded)
    limits = (
        settings.max_examples / max(1, total * (1 - settings.held_out)),
        settings.max_held_out / max(1, total * settings.held_out),
    )
    vectors: tuple[list, list] = ([], [])
    targets = tuple({part.kind: [] for part in vocabulary} for _ in range(2))
    for task in embedded:
        found = load_embeddings(task.output)
        held_out = is_held_out(found.key_hashes, settings.held_out, config.seed)
        rank = key_ranks(found.key_hashes, 2 * config.seed + _SAMPLE)
        has_embedding = np.zeros(len(held_out), bool)
        has_embedding[found.rows] = True
        of_shard = {part.kind: _read_targets(task, part, len(held_out)) for part in vocabulary}
        for number, of_split in enumerate((~held_out, held_out)):
            chosen = of_split & has_embedding & (rank < limits[number])
            vectors[number].append(found.embeddings[chosen[found.rows]])
            for kind, shard_targets in of_shard.items():
                targets[number][kind].append(shard_targets.take(chosen))
    # A shard without any embedding does not know their size.
    vectors = [[part for part in parts if part.shape[1]] for parts in vectors]
    return tuple(
        Examples(
            np.concatenate(parts or [np.zeros((0, 1), np.float32)]),
            {kind: concept_vocabulary.concatenate(found) for kind, found in of_split.items()},
        )
        for parts, of_split in zip(vectors, targets, strict=True)
    )


def _read_targets(task: shards.ShardTask, part: ConceptList, num_records: int) -> Targets:
    targets = concept_vocabulary.read_targets([task.source.path], part)
    if len(targets) != num_records:
        raise ValueError(
            f"{task.source}: {num_records} records, but concepts of {len(targets)}; filter again"
        )
    return targets


def _train(
    config: ml_collections.ConfigDict, part: ConceptList, train: Examples, held_out: Examples
) -> tuple[Head, dict[str, Any]]:
    train_split, held_out_split = train.of_kind(part.kind), held_out.of_kind(part.kind)
    logging.info(
        "head of %d %s: %d images, %d held out",
        len(part),
        part.kind,
        len(train_split.targets),
        len(held_out_split.targets),
    )
    head, curve = train_head(train_split, held_out_split, len(part), config.heads, config.seed)
    depth = max(metrics.RANKS)
    ids, _ = head.predict(held_out_split.embeddings, depth)
    predictions = metrics.Predictions(ids, held_out_split.targets)
    baseline = metrics.frequency_baseline(
        train_split.targets, held_out_split.targets, len(part), depth
    )
    return head, {
        "images": {"train": len(train_split.targets), "held_out": len(held_out_split.targets)},
        "curve": curve,
        "metrics": metrics.summarize(predictions, len(part)),
        "baseline": metrics.summarize(baseline, len(part)),
        **_rank_concepts(predictions, part),
    }


def _rank_concepts(predictions: metrics.Predictions, part: ConceptList) -> dict[str, Any]:
    """Best and worst concepts, by the recall at the deepest rank that is no matter of course."""
    k = max(k for k in metrics.RANKS if k == 1 or 4 * k <= len(part))
    recall = predictions.concept_recall(k, len(part))
    positives = predictions.targets.counts(len(part))
    enough = np.flatnonzero(positives >= _MIN_POSITIVES)
    order = enough[np.lexsort((-positives[enough], -recall[enough]))]
    listed = [
        {"concept": part.names[i], "recall": float(recall[i]), "images": int(positives[i])}
        for i in order
    ]
    half = min(_LISTED, len(listed) // 2)
    return {
        "ranked_by": f"recall_at_{k}",
        "best": listed[:half],
        "worst": listed[::-1][: min(_LISTED, len(listed) - half)],
    }


def _check_loaded(
    config: ml_collections.ConfigDict, vocabulary: Vocabulary, teacher: TeacherInfo
) -> dict[str, Any]:
    """The results of loaded heads, from their folder; raises if they do not fit this run."""
    folder = config.heads.load
    description = _read_description(folder)
    if description is None:
        raise ValueError(f"config.heads.load='{folder}': no {DESCRIPTION} there")
    if description["weights_hash"] != hash_heads(folder):
        raise ValueError(f"{folder}/{WEIGHTS} is not the file that {DESCRIPTION} describes")
    expected = read_vocabulary(folder).describe()
    check_vocabulary(description["vocabulary"], expected, f"{folder}/{DESCRIPTION}", folder)
    check_vocabulary(vocabulary.describe(), expected, config.output, folder)
    # The identity as it comes back from JSON, without what belongs to one data set. The size of the
    # embeddings is checked when the heads are applied.
    theirs, ours = (
        {k: v for k, v in json.loads(json.dumps(identity)).items() if k not in teacher.data_keys}
        for identity in (description["teacher"], teacher.identity)
    )
    if ours != theirs:
        raise ValueError(
            f"config.heads.load='{folder}': its heads belong to the teacher {theirs}, this run's "
            f"is {ours}"
        )
    return description["heads"]


def _read_description(folder: str) -> dict[str, Any] | None:
    path = pathlib.Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
        description["config_hash"], description["weights_hash"], description["heads"]  # noqa: B018
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return description
