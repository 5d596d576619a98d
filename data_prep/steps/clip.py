"""CLIP score: the cosine of picture and caption, by any model that `diht_jax.load_model` reads.

What DataComp and LAION filter by (arXiv 2304.14108, 2210.08402). A limit is a cosine, or comes from
a share of the scores that an earlier run has recorded (`filtering.replay.set_quantile_limit`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from data_prep.steps import models
from data_prep.steps.base import EVIDENCE, IMAGE_ERROR, Candidate, Columns, Step, check_integers
from data_prep.steps.captions import compare_captions
from diht_jax.readers.base import SourceShard

SCORE = "clip_score"


class ClipStep(Step):
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
    not_hashed = ("batch_size", "quantile", "scores")  # the limit they lead to is min_score

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
        c = config.clip
        check_integers({"clip.batch_size": (c.batch_size, 1)})
        if c.min_score is not None and not -1 <= c.min_score <= 1:
            raise ValueError(f"config.clip.min_score={c.min_score}; expected a cosine, -1 to 1")
        if (c.quantile is None) != (c.scores is None):
            raise ValueError(
                "config.clip.quantile and config.clip.scores (the folder of a run that recorded "
                "scores) go together; one of them is not set"
            )
        if c.quantile is not None and not 0 < c.quantile < 1:
            raise ValueError(f"config.clip.quantile={c.quantile}; expected a share, such as 0.3")
        if c.model is None and (c.min_score is not None or c.quantile is not None):
            raise ValueError("config.clip.model is not set: expected what gives the scores")

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        return config.clip.model is not None

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
        is_readable = [not isinstance(image, str) for image in images]
        readable = itertools.compress(batch, is_readable)
        texts = iter(
            self._model.embed_texts([text for candidate in readable for text in candidate.captions])
        )
        columns: dict[str, list] = {SCORE: [], EVIDENCE: [], IMAGE_ERROR: []}
        least = self.config.clip.min_score
        for candidate, image in zip(batch, images, strict=True):
            score, evidence, error = None, None, None
            if isinstance(image, str):
                error = image
            else:
                own = np.stack(list(itertools.islice(texts, len(candidate.captions))))
                # Row by row, so that a score does not depend on the others of its batch.
                scores = (image * own).sum(axis=1).tolist()
                candidate.of_captions = {SCORE: scores}
                score = max(scores)
                if least is not None:
                    evidence = f"CLIP score {score:.3f}, least {least:.3f}"
            for name, value in zip(columns, (score, evidence, error), strict=True):
                columns[name].append(value)
        return columns

    @classmethod
    def decide(cls, columns: Columns, config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
        least = config.clip.min_score
        return {} if least is None else {"low_score": columns.numbers(SCORE) < least}

    @classmethod
    def find_unknown(
        cls, columns: Columns, before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
    ) -> np.ndarray:
        # Of several captions others may come here than those that were scored.
        several = columns.numbers("captions") > 1
        is_other = any(compare_captions(before, now))
        return super().find_unknown(columns, before, now) | (several & is_other)
