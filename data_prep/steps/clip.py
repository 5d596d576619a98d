"""Scores with a limit; the CLIP score: the cosine of picture and caption, by any model.

The latter is what DataComp and LAION filter by (arXiv 2304.14108, 2210.08402). A limit is a score,
or comes from a share of the scores that an earlier run has recorded
(`filtering.config.set_quantile_limit`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from data_prep.steps import models
from data_prep.steps.base import EVIDENCE, IMAGE_ERROR, Candidate, Columns, Step, check_integers
from data_prep.steps.captions import compare_captions
from diht_jax.readers.base import SourceShard

SCORE = "clip_score"


class ScoreStep(Step):
    """A step with one score and one reason; its section of the config has its name.

    The section has the keys `batch_size`, `quantile` and `scores` besides those that are named
    here.

    Attributes:
        source_key: what gives the scores; the step is active where it is set.
        limit_key: the limit; None records scores only.
        drops_high: pairs are dropped that are above the limit, not those below.
    """

    not_hashed = ("batch_size", "quantile", "scores")  # the limit they lead to is hashed
    source_key: ClassVar[str] = "model"
    limit_key: ClassVar[str] = "limit"
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
        if not cls.is_active(config) and (c[cls.limit_key], c.quantile) != (None, None):
            raise ValueError(f"{name}.{cls.source_key} is not set: expected what gives the scores")

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        return config[cls.name][cls.source_key] is not None

    @classmethod
    def decide(cls, columns: Columns, config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
        limit = config[cls.name][cls.limit_key]
        if limit is None:
            return {}
        scores, (reason,) = columns.numbers(cls.score_name()), cls.reasons
        return {reason: scores > limit if cls.drops_high else scores < limit}

    def to_columns(self, found: Sequence[float | str | None]) -> dict[str, list[Any]]:
        """The columns for the score of each pair, or why its picture cannot be decoded."""
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
    """Drops captions whose score is too low, and pairs without another one.

    The score of a pair is the highest of its captions that came so far.
    """

    name = "clip"
    order = 26  # cheaper than to look for text
    reads = ("caption", "image")
    reasons = {"low_score": "CLIP score"}
    scores = {SCORE: "CLIP score of the best caption"}
    bins = {SCORE: tuple(hundredth / 100 for hundredth in range(-100, 101))}
    limits = ("min_score",)
    section = "clip"
    limit_key = "min_score"

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        c = config.clip = ml_collections.ConfigDict()
        c.model = placeholder(str)  # for diht_jax.load_model; None: nothing is scored
        c.min_score = placeholder(float)  # least cosine; None: scores are recorded only
        # Instead of min_score: drop this share of all pairs that have a score in the finished
        # folder `scores`, an earlier run of the same model.
        c.quantile = placeholder(float)
        c.scores = placeholder(str)  # that folder
        c.batch_size = 64  # pictures, or texts, that the model gets at a time

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        super().check(config)
        least = config.clip.min_score
        if least is not None and not -1 <= least <= 1:
            raise ValueError(f"config.clip.min_score={least}; expected a cosine, -1 to 1")

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
        self._model = models.Encoder(config.clip.model, config.clip.batch_size)

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
            # Row by row, so that a score does not depend on the others of its batch.
            cosines = (image * own).sum(axis=1).tolist()
            candidate.of_captions = {SCORE: cosines}
            found.append(max(cosines))
        return self.to_columns(found)

    @classmethod
    def find_unknown(
        cls, columns: Columns, before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
    ) -> np.ndarray:
        # Of several captions others may come here than those that were scored.
        several = columns.numbers("captions") > 1
        is_other = any(compare_captions(before, now))
        return super().find_unknown(columns, before, now) | (several & is_other)
