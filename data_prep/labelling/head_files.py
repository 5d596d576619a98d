"""Files of the linear heads of a labelled folder, and prediction with the heads.

`heads.npz` stores the weights. `heads.json` describes them: vocabulary, teacher, training curves
and metrics, and the shards that the heads were made for. NumPy only, which makes labelling workers
start fast.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep.teachers.base import TeacherInfo
from diht_jax.records.vocabulary import check_vocabulary, read_vocabulary
from diht_jax.storage import files

WEIGHTS = "heads.npz"
DESCRIPTION = "heads.json"

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


def write_heads(folder: str, heads: Mapping[str, Head]) -> None:
    """Writes the heads of a folder, by kind; equal heads give equal bytes."""
    arrays = {}
    for kind, head in sorted(heads.items()):
        arrays |= {f"{kind}_kernel": head.kernel, f"{kind}_bias": head.bias}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    files.write_bytes(files.join(folder, WEIGHTS), buffer.getvalue())


@functools.lru_cache(maxsize=1)
def load_heads(folder: str, weights_hash: str) -> dict[str, Head]:
    """Loads the heads of a labelled folder: kind -> head, without kinds with an empty vocabulary.

    Cached: a worker reads the file once for all shards. `weights_hash` comes from `hash_heads`.

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


def hash_heads(folder: str) -> str | None:
    """Returns the fingerprint of the file of `write_heads`; None if there is no file."""
    path = files.join(folder, WEIGHTS)
    return _hash_weights(files.read_bytes(path)) if files.exists(path) else None


def _hash_weights(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_description(folder: str) -> dict[str, Any] | None:
    """Reads `heads.json`; returns None if it is missing, damaged or of another `heads.npz`."""
    description = files.read_object(files.join(folder, DESCRIPTION)) or {}
    is_whole = {"recipe", "weights_hash", "heads"} <= description.keys()
    return description if is_whole and description["weights_hash"] == hash_heads(folder) else None


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
