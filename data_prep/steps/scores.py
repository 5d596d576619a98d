"""Filters by score: the CLIP score, and linear layers on image embeddings.

The CLIP score is the cosine of picture and caption for any model, as DataComp and LAION filter by
(arXiv 2304.14108, 2210.08402). LAION's two aesthetic predictors work on unit-length embeddings of
OpenAI's CLIP L/14. The first is a linear layer; the second has five without nonlinearities, which
fold into one (github.com/LAION-AI/aesthetic-predictor,
.../christophschuhmann/improved-aesthetic-predictor). A limit is a score, or the quantile of scores
that an earlier run has recorded (`filtering.config.set_quantile_limit`).
"""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import ml_collections
import numpy as np

from data_prep.duplicates import precomputed
from data_prep.steps import models
from data_prep.steps.base import EVIDENCE, IMAGE_ERROR, Candidate, Columns, Step
from data_prep.steps.cat import compare_captions
from diht_jax.config.keys import COUNT, Key, Range
from diht_jax.readers.base import SourceShard
from diht_jax.weights.tensor_files import WEIGHT_SUFFIXES, read_tensors

SCORE = "clip_score"

# Share of all pairs.
_QUANTILE = Range(0, 1, excludes_low=True, excludes_high=True)
HEAD_KEYS: dict[str, Any] = {
    # Weights of a linear layer: .npz, .safetensors, or a torch state dict, which is read without
    # executing code. Unsafe heads must be high for unsafe pictures, as a logistic regression is.
    # None: no scores.
    "head": str,
    "model": str,  # embedding model, as for diht_jax.load_model
    "embeddings": str,  # instead of model: the --output of diht_jax.embed for config.input
    "normalize": True,  # to unit length before the layer; False: embeddings as stored
    # Minimum aesthetic or maximum unsafe score (before any sigmoid); None: only record scores.
    "limit": float,
    # Instead of limit: drop this share of all pairs with a score in the finished folder `scores`,
    # from an earlier run with the same head and model.
    "quantile": Key(float, _QUANTILE),
    "scores": str,  # folder of the earlier run, for quantile
    "batch_size": Key(64, COUNT),  # pictures per batch of the model
}

# Names of weight and bias of a layer with one output, in PyTorch and in scikit-learn.
_NAMES = (("weight", "bias"), ("coef_", "intercept_"))
# Indices of the linear layers in LAION's second predictor. The layers between them are dropout,
# which has no effect at inference.
_LAION_LAYERS = (0, 2, 4, 6, 7)


class ScoreStep(Step):
    """A step with one score and one reason, whose config section is named like the step.

    The section must have the keys `batch_size`, `quantile` and `scores` in addition to the limit.

    Attributes:
        limit_key: key of the limit; if its value is None, scores are only recorded.
        drops_high: whether pairs above the limit are dropped, instead of those below.
    """

    not_hashed = ("batch_size", "quantile", "scores")  # the resulting limit is hashed
    limit_key: ClassVar[str] = "limit"
    drops_high: ClassVar[bool] = False

    @classmethod
    def score_name(cls) -> str:
        """Returns the name of the score's column."""
        return next(iter(cls.scores))

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        c, name = config[cls.name], f"config.{cls.name}"
        if (c.quantile is None) != (c.scores is None):
            raise ValueError(
                f"{name}.quantile and {name}.scores (the folder of a run that recorded scores) go "
                "together; one of them is not set"
            )
        if not cls.is_active(config) and (c[cls.limit_key], c.quantile) != (None, None):
            raise ValueError(f"config.{cls.switch} is not set: expected what gives the scores")

    @classmethod
    def decide(cls, columns: Columns, config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
        limit = config[cls.name][cls.limit_key]
        if limit is None:
            return {}
        scores, (reason,) = columns.numbers(cls.score_name()), cls.reasons
        return {reason: scores > limit if cls.drops_high else scores < limit}

    def to_columns(self, found: Sequence[float | str | None]) -> dict[str, list[Any]]:
        """Returns columns for each pair's score, or for why its picture cannot be decoded."""
        limit, (words,) = self.config[self.name][self.limit_key], self.reasons.values()
        bound = "most" if self.drops_high else "least"
        scores = [None if isinstance(score, str) else score for score in found]
        evidence = [
            None if score is None or limit is None else f"{words} {score:.3f}, {bound} {limit:.3f}"
            for score in scores
        ]
        errors = [score if isinstance(score, str) else None for score in found]
        return {self.score_name(): scores, EVIDENCE: evidence, IMAGE_ERROR: errors}


class ClipStep(ScoreStep):
    """Drops captions with a low CLIP score, and pairs for which no other caption remains.

    The score of a pair is the highest of the captions that have passed so far.
    """

    name = "clip"
    order = 26  # cheaper than text-spotting
    reads = ("caption", "image")
    reasons = {"low_score": "CLIP score"}
    scores = {SCORE: "CLIP score of the best caption"}
    bins = {SCORE: tuple(hundredth / 100 for hundredth in range(-100, 101))}
    limits = ("min_score",)
    keys = {
        "clip.model": str,  # as for diht_jax.load_model; None: no scores
        "clip.min_score": Key(float, Range(-1, 1)),  # minimum cosine; None: only record scores
        # Instead of min_score: drop this share of all pairs with a score in the finished folder
        # `scores`, from an earlier run with the same model.
        "clip.quantile": Key(float, _QUANTILE),
        "clip.scores": str,  # folder of the earlier run, for quantile
        "clip.batch_size": Key(64, COUNT),  # pictures or texts per batch of the model
    }
    section = "clip"
    switch = "clip.model"
    limit_key = "min_score"

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        return super().describe_rules(config) | {
            "clip_model": models.fingerprint(config.clip.model, "config.clip.model")
        }

    @classmethod
    def batch_size(cls, config: ml_collections.ConfigDict) -> int | None:
        return models.BATCHES * config.clip.batch_size

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        c = config.clip
        self._model = models.Encoder(c.model, c.batch_size, config.image.max_pixels)

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        images = self._model.embed_images([candidate.pair.image for candidate in batch])
        readable = itertools.compress(batch, [not isinstance(image, str) for image in images])
        captions = [text for candidate in readable for text in candidate.captions]
        texts = iter(self._model.embed_texts(captions))
        found: list[float | str | None] = []
        for candidate, image in zip(batch, images, strict=True):
            if isinstance(image, str):
                found.append(image)
                continue
            own = np.stack(list(itertools.islice(texts, len(candidate.captions))))
            # Row by row: a score must not depend on the rest of its batch.
            cosines = (image * own).sum(axis=1).tolist()
            candidate.of_captions = {SCORE: cosines}
            found.append(max(cosines))
        return self.to_columns(found)

    @classmethod
    def find_unknown(
        cls, columns: Columns, before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
    ) -> np.ndarray:
        # Other captions of a pair may reach this step now than those that were scored.
        several = columns.numbers("captions") > 1
        is_other = any(compare_captions(before, now))
        return super().find_unknown(columns, before, now) | (several & is_other)


class HeadStep(ScoreStep):
    """A step that scores pictures with a linear layer on their embeddings."""

    reads = ("image",)
    limits = ("limit",)

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        c, name = config[cls.name], f"config.{cls.name}"
        if (c.model is not None) + (c.embeddings is not None) != (c.head is not None):
            raise ValueError(
                f"{name}.head (a file of weights) goes with one of {name}.model and "
                f"{name}.embeddings, which give the embeddings"
            )
        super().check(config)
        if not c.normalize and c.model is not None:
            raise ValueError(
                f"{name}.normalize=False: {name}.model makes embeddings of unit length; expected "
                f"{name}.embeddings of another length"
            )

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
        self._pictures = models.PictureEmbeddings(
            source,
            c.embeddings,
            f"config.{self.name}.embeddings",
            c.model,
            c.batch_size,
            config.image.max_pixels,
        )

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        found = self._pictures.embed([candidate.pair for candidate in batch])
        return self.to_columns(
            [self._score(row) if isinstance(row, np.ndarray) else row for row in found]
        )

    def close(self) -> dict[str, Any]:
        self._pictures.warn_of_missing("a score")
        return {}

    def _score(self, embedding: np.ndarray) -> float:
        if embedding.shape != self._weights.shape:
            raise ValueError(
                f"config.{self.name}.head='{self._keys.head}' is for embeddings of "
                f"{len(self._weights)} numbers, and those of {self.source} have "
                f"{len(embedding)}; take the model that it was trained with"
            )
        row = embedding.astype(np.float64)
        if self._keys.normalize:
            row /= max(float(np.linalg.norm(row)), 1e-12)
        # Rounded as recorded: a limit taken from the records must not drop the pair it came from.
        return float(np.float32(row @ self._weights + self._bias))


class AestheticStep(HeadStep):
    """Drops pictures with a low aesthetic score."""

    name = section = "aesthetic"
    order = 27  # costs as much as a CLIP score, less than text-spotting
    reasons = {"low_score": "aesthetic score"}
    scores = {"aesthetic_score": "aesthetic score"}
    bins = {"aesthetic_score": tuple(tenth / 10 for tenth in range(-20, 121))}
    keys = {f"aesthetic.{name}": key for name, key in HEAD_KEYS.items()}
    switch = "aesthetic.head"


class UnsafeStep(HeadStep):
    """Drops pictures with a high score of a safety predictor."""

    name = section = "unsafe"
    order = 28
    reasons = {"high_score": "unsafe score"}
    scores = {"unsafe_score": "unsafe score"}
    bins = {"unsafe_score": tuple(tenth / 10 for tenth in range(-100, 101))}
    keys = {f"unsafe.{name}": key for name, key in HEAD_KEYS.items()}
    switch = "unsafe.head"
    drops_high = True


@functools.lru_cache(maxsize=4)
def read_head(path: str) -> tuple[np.ndarray, float]:
    """Reads a linear layer with one output.

    Args:
        path: file with arrays "weight" [1, d] or [d] and optional "bias" (.npz, .safetensors or
            a torch state dict), an .npz with scikit-learn's names, or LAION's second predictor.

    Returns:
        Weights float64 [d], and bias.

    Raises:
        ValueError: the file cannot be read, or holds another kind of model.
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
    """Reads the arrays of a file as float64."""
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
    except Exception as error:  # damaged archives raise nearly any type of error
        raise ValueError(f"{path}: not a whole .npz file of numbers ({error!s:.200})") from error


def _fold(
    layers: Sequence[tuple[np.ndarray, np.ndarray]], path: str
) -> tuple[np.ndarray, np.ndarray]:
    """Folds consecutive linear layers into one."""
    (weights, bias), *rest = layers
    try:
        for weight, offset in rest:
            weights, bias = weight @ weights, weight @ bias + offset
    except ValueError as error:
        raise ValueError(f"{path}: its layers do not follow one another ({error})") from error
    return weights, bias
