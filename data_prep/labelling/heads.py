"""Linear heads of a labelled folder: their files, prediction, and whether new ones are needed.

`heads.npz` stores the weights. `heads.json` describes them: vocabulary, teacher, training curves
and metrics, and the shards that the heads were made for. Heads and vocabulary are kept while few
shards have changed since the training (`config.heads.max_changed_shards`), because new heads
require labelling every shard again. NumPy only, which makes labelling workers start fast.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.jobs import shards
from data_prep.jobs.failures import allowed_number
from data_prep.labelling import examples
from data_prep.labelling.embeddings import LocalCopies
from data_prep.labelling.tasks import LabelTask
from data_prep.teachers.base import TeacherInfo
from diht_jax.records.vocabulary import (
    Vocabulary,
    check_vocabulary,
    read_vocabulary,
    write_vocabulary,
)
from diht_jax.storage import files, locks

WEIGHTS = "heads.npz"
DESCRIPTION = "heads.json"

_HEADS_VERSION = 1
_ROWS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear classifier.

    Attributes:
        kernel: float32 [d, v].
        bias: float32 [v].
    """

    kernel: np.ndarray
    bias: np.ndarray

    def predict(self, embeddings: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Predicts the most likely concepts.

        Args:
            embeddings: float [n, d].
            top_k: number of concepts k, at most the size of the vocabulary.

        Returns:
            ids: int32 [n, k], most likely first.
            probs: float32 [n, k], softmax probabilities, renormalised over the k concepts.
        """
        k = min(top_k, len(self.bias))
        ids = np.zeros((len(embeddings), k), np.int32)
        probs = np.zeros((len(embeddings), k), np.float32)
        for start in range(0, len(embeddings), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            logits = embeddings[part].astype(np.float32) @ self.kernel + self.bias
            best = np.argpartition(-logits, k - 1, axis=1)[:, :k]
            best.sort(axis=1)  # orders equal logits by their ids
            values = np.take_along_axis(logits, best, axis=1)
            order = np.argsort(-values, axis=1, kind="stable")
            values = np.take_along_axis(values, order, axis=1)
            weights = np.exp(values - values[:, :1])
            ids[part] = np.take_along_axis(best, order, axis=1)
            probs[part] = weights / weights.sum(axis=1, keepdims=True)
        return ids, probs


def write_heads(folder: str, heads: Mapping[str, Head]) -> str:
    """Writes the heads of a folder, by kind; equal heads give equal bytes. Returns their hash."""
    arrays = {}
    for kind, head in sorted(heads.items()):
        arrays |= {f"{kind}_kernel": head.kernel, f"{kind}_bias": head.bias}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    files.write_bytes(files.join(folder, WEIGHTS), buffer.getvalue())
    return _hash_weights(buffer.getvalue())


@functools.lru_cache(maxsize=1)
def load_heads(folder: str, weights_hash: str) -> dict[str, Head]:
    """Loads the heads of a labelled folder: kind -> head, without kinds with an empty vocabulary.

    Cached: a worker reads the file once for all shards. `weights_hash` is that of `write_heads`.

    Raises:
        ValueError: the file is missing or damaged, or contains other heads.
    """
    path = files.join(folder, WEIGHTS)
    try:
        data = files.read_bytes(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: no heads of data_prep.label ({error}); expected the output folder of a run"
        ) from error
    found = _hash_weights(data)
    if found != weights_hash:
        raise ValueError(
            f"{path}: other heads (hash {found}) than this job labels with ({weights_hash}); "
            "they were trained again meanwhile: run data_prep.label again"
        )
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        kinds = sorted({name.rpartition("_")[0] for name in file.files})
        return {kind: Head(file[f"{kind}_kernel"], file[f"{kind}_bias"]) for kind in kinds}


def _hash_weights(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_description(folder: str) -> dict[str, Any] | None:
    """Reads `heads.json`; returns None if it is missing, damaged or of another `heads.npz`."""
    description = files.read_object(files.join(folder, DESCRIPTION)) or {}
    path = files.join(folder, WEIGHTS)
    is_whole = {"recipe", "weights_hash", "heads"} <= description.keys() and files.exists(path)
    is_own = is_whole and description["weights_hash"] == _hash_weights(files.read_bytes(path))
    return description if is_own else None


def load_trained(folder: str, teacher: TeacherInfo) -> tuple[dict[str, Head], dict[str, Any]]:
    """Loads the heads of another run, with their curves and metrics.

    The heads are in the folder `config.heads.load`; `teacher` is the teacher of this run.

    Returns:
        Kind -> head, and kind -> result, as in `heads.json`.

    Raises:
        ValueError: there are no heads, the files in the folder are inconsistent, or the heads
            belong to another teacher.
    """
    description = read_description(folder)
    if description is None:
        raise ValueError(
            f"config.heads.load='{folder}': {DESCRIPTION} is missing, damaged, or not of the "
            f"{WEIGHTS} there"
        )
    expected = read_vocabulary(folder).describe()
    check_vocabulary(description["vocabulary"], expected, f"{folder}/{DESCRIPTION}", folder)
    # Compares identities after a JSON round trip, without parts that depend on the data set. The
    # size of the embeddings is checked when the heads are applied.
    theirs, ours = (
        {k: v for k, v in json.loads(json.dumps(identity)).items() if k not in teacher.data_keys}
        for identity in (description["teacher"], teacher.identity)
    )
    if ours != theirs:
        raise ValueError(
            f"config.heads.load='{folder}': its heads belong to the teacher {theirs}, this run's "
            f"is {ours}"
        )
    return load_heads(folder, description["weights_hash"]), description["heads"]


# `train_heads.train_and_measure`: config, concepts, training and held-out examples -> head, result.
Train = Callable[..., tuple[Head, dict[str, Any]]]


class Heads:
    """The existing heads of an output folder, or the inputs needed to make new ones.

    Attributes:
        vocabulary: the concepts of each head.
        sample: embedding tasks of the shards that new heads are trained on; empty if no head is
            trained.
        description: contents of `heads.json`; None until the heads exist.
    """

    vocabulary: Vocabulary

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        embedded: Sequence[LabelTask],
        embeddings_hash: str,
    ):
        """Decides whether existing heads can be kept.

        Raises:
            ValueError: a shard has no counts of concepts, or no concept is frequent enough.
        """
        self._config, self._folder = config, config.output
        self._embedded, self._embeddings_hash = embedded, embeddings_hash
        self.sample: list[LabelTask] = []
        if config.heads.load:
            self.vocabulary = read_vocabulary(config.heads.load)
        self.description = self._find()
        if self.description or config.heads.load:
            return
        concepts, records = examples.read_counts([task.source.path for task in embedded])
        self.vocabulary = examples.build_vocabulary(concepts, config.vocabulary)
        logging.info("%d objects, %d attributes", *map(len, self.vocabulary))
        chosen = examples.choose_shards(records, [task.name for task in embedded], config)
        self.sample = [embedded[number] for number in chosen]

    def _find(self) -> dict[str, Any] | None:
        """Returns the description of the existing heads; None if new ones are needed."""
        found = read_description(self._folder)
        if found is None or found["recipe"] != self._hash_recipe():
            return None
        if self._config.heads.load:  # loaded heads are valid for any shards
            if found["vocabulary"] != self.vocabulary.describe():
                return None
        elif not self._are_few_changed(found["inputs"]):
            return None
        vocabulary = read_vocabulary(self._folder)
        if found["vocabulary"] != vocabulary.describe():  # a killed run replaced only one file
            return None
        self.vocabulary = vocabulary
        return found

    def obtain(
        self, failed: Collection[str], teacher: TeacherInfo, copies: LocalCopies, train_head: Train
    ) -> dict[str, Any]:
        """Makes missing heads, and writes them with their vocabulary.

        Only one job makes them; other jobs wait in the meantime, and use the result.

        Returns:
            The description of the heads.
        """
        if self.description is None:
            with locks.leader_lock(self._folder):
                self.description = self._find()
                if self.description is None:
                    self.description = self._make(failed, teacher, copies, train_head)
                    return self.description
        logging.info("heads: trained before")
        return self.description

    def _make(
        self, failed: Collection[str], teacher: TeacherInfo, copies: LocalCopies, train_head: Train
    ) -> dict[str, Any]:
        config = self._config
        heads, results, images = {}, {}, None
        if config.heads.load:
            heads, results = load_trained(config.heads.load, teacher)
        else:
            # Workers hold the teacher on the same device, and resume after the training.
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            sample = [task for task in self.sample if str(task.source) not in failed]
            train, held_out = examples.gather_examples(config, self.vocabulary, sample, copies)
            images = examples.count_named(train, held_out)
            for part in (part for part in self.vocabulary if len(part)):
                heads[part.kind], results[part.kind] = train_head(config, part, train, held_out)
        # Written last, so a failed run leaves folder and labels unchanged.
        write_vocabulary(self._folder, self.vocabulary)
        weights_hash = write_heads(self._folder, heads)
        missing = {task.name: None for task in self._embedded if str(task.source) in failed}
        description = {
            "weights_hash": weights_hash,
            "recipe": self._hash_recipe(),
            "inputs": _hash_inputs(self._embedded) | missing,
            "loaded_from": config.heads.load,
            "vocabulary": self.vocabulary.describe(),
            "teacher": dict(teacher.identity),
            "heads": results,
            "images": images,
        }
        path = files.join(self._folder, DESCRIPTION)
        files.write_object(path, description, with_checksum=True)
        return description

    def _are_few_changed(self, before: dict[str, str | None]) -> bool:
        """Returns whether few shards differ from `before`, the `_hash_inputs` of the training."""
        now = _hash_inputs(self._embedded)
        # A shard that had failed at that time (None) does not count as changed.
        changed = sum(
            before.get(name, "") not in (None, now.get(name, "")) for name in before | now
        )
        limit = self._config.heads.max_changed_shards
        allowed = allowed_number(limit, len(before), one_of_a_few=False)
        if changed:
            logging.info(
                "heads: %d of %d shards are others than when they were trained, and "
                "config.heads.max_changed_shards=%g allows %d: they %s",
                *(changed, len(before), limit, allowed),
                "stay" if changed <= allowed else "are trained again",
            )
        return changed <= allowed

    def _hash_recipe(self) -> str:
        """Hashes all settings that determine vocabulary and heads, except for the shards."""
        config = self._config
        heads = config.heads.to_dict()
        heads.pop("max_changed_shards")  # does not affect the result
        settings = {
            "format_version": _HEADS_VERSION,
            "heads": heads,
            "vocabulary": config.vocabulary.to_dict(),
            "seed": config.seed,
            "embeddings": self._embeddings_hash,
        }
        return shards.hash_config(settings)


def _hash_inputs(tasks: Sequence[LabelTask]) -> dict[str, str]:
    """Maps the name of each output to a hash that identifies the records of its input."""
    return {task.name: shards.hash_config({"shard": task.shard}) for task in tasks}
