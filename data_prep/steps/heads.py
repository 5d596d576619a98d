"""Scores of a linear layer on embeddings of pictures: aesthetic and safety predictors.

LAION's two aesthetic predictors are such layers on embeddings of OpenAI's CLIP L/14, at unit
length: the first one layer, the second five with nothing between them, which are one
(github.com/LAION-AI/aesthetic-predictor, .../christophschuhmann/improved-aesthetic-predictor). A
limit is a score, or comes from a share of the scores that an earlier run has recorded
(`filtering.replay.set_quantile_limit`).
"""

from __future__ import annotations

import functools
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import ml_collections
import numpy as np
from absl import logging
from ml_collections.config_dict import placeholder

from data_prep.duplicates import precomputed
from data_prep.steps import models
from data_prep.steps.base import EVIDENCE, IMAGE_ERROR, Candidate, Columns, Step, check_integers
from diht_jax.readers.base import SourceShard
from diht_jax.weights.tensor_files import WEIGHT_SUFFIXES, read_tensors

# Of a layer with one output: PyTorch's names, and scikit-learn's.
_NAMES = (("weight", "bias"), ("coef_", "intercept_"), ("coef", "intercept"))
# Numbers of the linear layers of LAION's second predictor; dropout is between the others, which
# does nothing outside of training.
_LAION_LAYERS = (0, 2, 4, 6, 7)


class HeadStep(Step):
    """A step that scores pictures by a linear layer on their embeddings.

    Its section of the config has its name.

    Attributes:
        drops_high: pairs are dropped that are above the limit, not those below.
    """

    reads = ("image",)
    limits = ("limit",)
    not_hashed = ("batch_size", "quantile", "scores")  # the limit they lead to is hashed
    drops_high: ClassVar[bool] = False

    @classmethod
    def score_name(cls) -> str:
        """The column of the scores."""
        return next(iter(cls.scores))

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        c, name = config[cls.name], f"config.{cls.name}"
        check_integers({f"{cls.name}.batch_size": (c.batch_size, 1)})
        if (c.quantile is None) != (c.scores is None):
            raise ValueError(
                f"{name}.quantile and {name}.scores (the folder of a run that recorded scores) go "
                "together; one of them is not set"
            )
        if c.quantile is not None and not 0 < c.quantile < 1:
            raise ValueError(f"{name}.quantile={c.quantile}; expected a share, such as 0.3")
        if (c.model is not None) + (c.embeddings is not None) != (c.head is not None):
            raise ValueError(
                f"{name}.head (a file of weights) goes with one of {name}.model and "
                f"{name}.embeddings, which give the embeddings"
            )
        if c.head is None and (c.limit is not None or c.quantile is not None):
            raise ValueError(f"{name}.head is not set: expected what gives the scores")
        if not c.normalize and c.model is not None:
            raise ValueError(
                f"{name}.normalize=False: {name}.model makes embeddings of unit length; expected "
                f"{name}.embeddings of another length"
            )

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        return config[cls.name].head is not None

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        c, name = config[cls.name], f"config.{cls.name}"
        read_head(c.head)
        if c.model is None:
            embeddings = precomputed.describe(c.embeddings)
        else:
            embeddings = models.fingerprint(c.model, f"{name}.model")
        return super().describe_rules(config) | {
            f"{cls.name}_head": models.fingerprint(c.head, f"{name}.head"),
            f"{cls.name}_embeddings": embeddings if c.normalize else f"{embeddings}, as stored",
        }

    @classmethod
    def batch_size(cls, config: ml_collections.ConfigDict) -> int | None:
        c = config[cls.name]
        return None if c.model is None else models.BATCHES * c.batch_size

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        c = self._keys = config[self.name]
        self._weights, self._bias = read_head(c.head)
        self._source, self._without_embedding = source, 0
        self._stored: Mapping[str, np.ndarray] | None = None
        self._model: models.Encoder | None = None
        if c.model is None:
            self._stored = precomputed.read_of_shard(c.embeddings, source)
        else:
            self._model = models.Encoder(c.model, c.batch_size)

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        columns: dict[str, list] = {self.score_name(): [], EVIDENCE: [], IMAGE_ERROR: []}
        limit = self._keys.limit
        for found in self._embed(batch):
            score = evidence = None
            if isinstance(found, np.ndarray):
                score = self._score(found)
                if limit is not None:
                    bound = "most" if self.drops_high else "least"
                    evidence = f"{self.scores[self.score_name()]} {score:.3f}, {bound} {limit:.3f}"
            error = found if isinstance(found, str) else None
            for name, value in zip(columns, (score, evidence, error), strict=True):
                columns[name].append(value)
        return columns

    @classmethod
    def decide(cls, columns: Columns, config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
        limit = config[cls.name].limit
        if limit is None:
            return {}
        scores, (reason,) = columns.numbers(cls.score_name()), cls.reasons
        return {reason: scores > limit if cls.drops_high else scores < limit}

    def close(self) -> dict[str, Any]:
        if self._without_embedding:
            logging.warning(
                "%s: %d pairs have no embedding in config.%s.embeddings='%s', and went on without "
                "a score",
                self._source,
                self._without_embedding,
                self.name,
                self._keys.embeddings,
            )
        return {}

    def _embed(self, batch: Sequence[Candidate]) -> list[np.ndarray | str | None]:
        """The embedding of each pair, or why its picture has none."""
        if self._model is not None:
            return list(self._model.embed_images([candidate.pair.image for candidate in batch]))
        assert self._stored is not None
        found = [self._stored.get(candidate.pair.key) for candidate in batch]
        self._without_embedding += sum(row is None for row in found)
        return list(found)

    def _score(self, embedding: np.ndarray) -> float:
        if embedding.shape != self._weights.shape:
            raise ValueError(
                f"config.{self.name}.head='{self._keys.head}' is for embeddings of "
                f"{len(self._weights)} numbers, and those of {self._source} have "
                f"{len(embedding)}; take the model that it was trained with"
            )
        row = embedding.astype(np.float64)
        if self._keys.normalize:
            row /= max(float(np.linalg.norm(row)), 1e-12)
        return float(row @ self._weights + self._bias)


class AestheticStep(HeadStep):
    """Drops pictures with a low aesthetic score."""

    name = "aesthetic"
    order = 27  # as dear as a CLIP score, and cheaper than to look for text
    reasons = {"low_score": "aesthetic score"}
    scores = {"aesthetic_score": "aesthetic score"}
    bins = {"aesthetic_score": tuple(tenth / 10 for tenth in range(-20, 121))}
    section = "aesthetic"

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        c = config.aesthetic = ml_collections.ConfigDict()
        # Weights of a linear layer: .npz, .safetensors, or torch's state dict, of which nothing is
        # executed; None: nothing is scored.
        c.head = placeholder(str)
        c.model = placeholder(str)  # for diht_jax.load_model, which makes the embeddings
        c.embeddings = placeholder(str)  # or the --output of diht_jax.embed on config.input
        c.normalize = True  # to unit length before the layer; False: embeddings as they are stored
        c.limit = placeholder(float)  # least score; None: scores are recorded only
        # Instead of limit: drop this share of all pairs that have a score in the finished folder
        # `scores`, an earlier run with the same head and model.
        c.quantile = placeholder(float)
        c.scores = placeholder(str)  # that folder
        c.batch_size = 64  # pictures that the model gets at a time


class UnsafeStep(HeadStep):
    """Drops pictures with a high score of a safety predictor."""

    name = "unsafe"
    order = 28
    reasons = {"high_score": "unsafe score"}
    scores = {"unsafe_score": "unsafe score"}
    bins = {"unsafe_score": tuple(tenth / 10 for tenth in range(-100, 101))}
    section = "unsafe"
    drops_high = True

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        c = config.unsafe = ml_collections.ConfigDict()
        # Weights of a linear layer whose scores are high for unsafe pictures, such as a logistic
        # regression, as aesthetic.head; None: nothing is scored.
        c.head = placeholder(str)
        c.model = placeholder(str)  # for diht_jax.load_model, which makes the embeddings
        c.embeddings = placeholder(str)  # or the --output of diht_jax.embed on config.input
        c.normalize = True  # to unit length before the layer; False: embeddings as they are stored
        c.limit = placeholder(float)  # greatest score, before any sigmoid; None: recorded only
        # Instead of limit: drop this share of all pairs that have a score in the finished folder
        # `scores`, an earlier run with the same head and model.
        c.quantile = placeholder(float)
        c.scores = placeholder(str)  # that folder
        c.batch_size = 64  # pictures that the model gets at a time


@functools.lru_cache(maxsize=4)
def read_head(path: str) -> tuple[np.ndarray, float]:
    """Reads a linear layer with one output.

    Args:
        path: of arrays "weight" [1, d] or [d] and perhaps "bias" in .npz, .safetensors, or a torch
            state dict; scikit-learn's names in .npz; or LAION's second aesthetic predictor.

    Returns:
        Weights, float64 [d], and bias.

    Raises:
        ValueError: it cannot be read, or is another model.
    """
    arrays = _read_arrays(path)
    layers = [f"layers.{number}" for number in _LAION_LAYERS]
    if arrays.keys() == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}:
        weights, bias = _fold([(arrays[f"{n}.weight"], arrays[f"{n}.bias"]) for n in layers], path)
    else:
        for names in _NAMES:
            if names[0] in arrays and arrays.keys() <= set(names):
                weights, bias = arrays[names[0]], arrays.get(names[1], np.zeros(1))
                break
        else:
            shown = ", ".join(sorted(arrays)[:8]) or "nothing"
            raise ValueError(
                f"{path}: expected a linear layer, 'weight' [1, d] and 'bias' [1], or the layers "
                f"of LAION's second aesthetic predictor; found {shown}. Models that are not "
                "linear cannot be read"
            )
    weights = weights.reshape(-1) if weights.ndim == 2 and len(weights) == 1 else weights
    if weights.ndim != 1 or bias.size != 1:
        raise ValueError(
            f"{path}: expected one output, weights [1, d] and bias [1]; got {list(weights.shape)} "
            f"and {list(bias.shape)}"
        )
    if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
        raise ValueError(f"{path}: weights that are not finite; download it again")
    return weights, float(bias.reshape(()))


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file, in float64."""
    if path.endswith(WEIGHT_SUFFIXES):
        if not pathlib.Path(path).is_file():
            raise ValueError(f"{path}: no such file of weights")
        tensors = read_tensors(path)
        return {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    if not path.endswith(".npz"):
        raise ValueError(f"{path}: expected a file of weights, .npz, {', '.join(WEIGHT_SUFFIXES)}")
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: np.asarray(found[name], np.float64) for name in found.files}
    # An empty file, a single array, numbers of another kind, compressed ones that are damaged.
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole .npz file of numbers ({error!s:.200})") from error


def _fold(
    layers: Sequence[tuple[np.ndarray, np.ndarray]], path: str
) -> tuple[np.ndarray, np.ndarray]:
    """One layer for several, from the first to the last."""
    (weights, bias), *rest = layers
    try:
        for weight, offset in rest:
            weights, bias = weight @ weights, weight @ bias + offset
    except ValueError as error:
        raise ValueError(f"{path}: its layers do not follow one another ({error})") from error
    return weights, bias
