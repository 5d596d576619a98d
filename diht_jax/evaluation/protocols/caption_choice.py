"""Choosing the right caption of an image among wrong ones that differ little from it.

SugarCrepe (Hsieh et al., arXiv 2306.14610) asks between two captions, ARO (Yuksekgonul et al.,
arXiv 2210.01936) between two or five; the caption most similar to the image is the answer. ARO's
macro accuracy is the mean over relations, or pairs of attributes, of their accuracies, and that of
SugarCrepe the mean over its seven subsets.

Ties: a wrong caption exactly as similar as the right one is the answer, as in SugarCrepe's code and
for ARO's relations and attributes. In ARO's orders, where a shuffled caption may be as it was, the
right one is (`ties=right`). Texts of equal tokens are encoded once, so such ties are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.encoding import (
    Batching,
    EmbeddingModel,
    EncodedImages,
    UnusablePair,
    encode_images,
    encode_texts,
)
from diht_jax.evaluation.prompts import CAPTION_SLOT, fill_caption_template
from diht_jax.evaluation.protocols.base import (
    CAPTION_TEMPLATE,
    Measured,
    Metric,
    Option,
    Protocol,
    Task,
)
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

TIES = {
    "wrong": "a wrong caption as similar as the right one is the answer",
    "right": "the right caption is the answer where a wrong one is as similar",
}

# Rows of two float32 arrays that are multiplied at once.
_BLOCK = 16_384


@dataclasses.dataclass(frozen=True)
class Question:
    """Captions of which one is right.

    Attributes:
        captions: at least two, the right one first.
        group: that the macro accuracy counts it for; None where it counts for none.
    """

    captions: tuple[str, ...]
    group: str | None = None


@dataclasses.dataclass(frozen=True)
class CaptionChoiceResult:
    """Result of `choose_captions`; n images, q questions, p pictures.

    Attributes:
        encoded: the images; a picture may be cut into several.
        questions: q of them.
        image_of_question: int [q], index among the n images.
        picture_of_question: int [q], from 0 to p - 1.
        similarities: q arrays, one number for each caption.
        is_right: bool [q].
        groups: their names, in alphabetical order.
        group_of_question: int [q], index among the groups; -1 for none.
    """

    encoded: EncodedImages
    questions: list[Question]
    image_of_question: np.ndarray
    picture_of_question: np.ndarray
    similarities: list[np.ndarray]
    is_right: np.ndarray
    groups: list[str]
    group_of_question: np.ndarray

    @property
    def num_items(self) -> int:
        """Independent items: the pictures."""
        return int(self.picture_of_question.max()) + 1

    @property
    def metrics(self) -> dict[str, float]:
        """Fractions: `accuracy`, and `macro_accuracy` where there are groups."""
        return self.resampled_metrics(np.ones(self.num_items, np.int64))

    def resampled_metrics(self, counts: np.ndarray) -> dict[str, float]:
        """The metrics if picture i and its questions had been there `counts[i]` times; int [p]."""
        weights = counts[self.picture_of_question].astype(np.float64)
        metrics = {"accuracy": float((weights * self.is_right).sum() / weights.sum())}
        if self.groups:
            accuracies, sizes = self._of_groups(weights)
            metrics["macro_accuracy"] = float(accuracies.sum() / max(1, (sizes > 0).sum()))
        return metrics

    def describe_groups(self) -> list[dict[str, Any]]:
        """Name, number of questions and accuracy of each group."""
        accuracies, sizes = self._of_groups(np.ones(len(self.questions)))
        return [
            {"group": name, "questions": int(size), "accuracy": float(accuracy)}
            for name, size, accuracy in zip(self.groups, sizes, accuracies, strict=True)
        ]

    def _of_groups(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Accuracies of the groups, 0 without questions, and their weights: float [groups]."""
        inside = self.group_of_question >= 0
        group, weights = self.group_of_question[inside], weights[inside]
        sizes = np.bincount(group, weights, len(self.groups))
        hits = np.bincount(group, weights * self.is_right[inside], len(self.groups))
        return hits / np.where(sizes > 0, sizes, 1), sizes


def choose_captions(
    model: EmbeddingModel,
    pairs: Iterable[Pair | Skipped],
    template: str = CAPTION_SLOT,
    ties: str = "wrong",
    *,
    batching: Batching | None = None,
) -> CaptionChoiceResult:
    """Embeds all images and captions, and finds the most similar caption of every question.

    Args:
        model: see `EmbeddingModel`.
        pairs: consumed once; `questions_of` describes them.
        template: put around each caption.
        ties: a key of `TIES`.
        batching: the defaults where None.

    Raises:
        ValueError: a bad template, or no pair with a question.
    """
    fill_caption_template(template, "")  # a bad template must fail before the images are encoded
    encoded = encode_images(model, pairs, questions_of, batching)
    asked = [
        (image, picture, question)
        for image, (picture, questions) in enumerate(encoded.notes)
        for question in questions
    ]
    questions = [question for _, _, question in asked]
    images = np.array([image for image, _, _ in asked], np.int32)
    texts = [fill_caption_template(template, text) for q in questions for text in q.captions]
    sizes = [len(question.captions) for question in questions]
    distinct, index_of_text = _distinct_texts(model, texts)
    text_emb = encode_texts(model.encode_text, distinct, batching)
    flat = _similarities(encoded.image_emb, np.repeat(images, sizes), text_emb, index_of_text)
    similarities = np.split(flat, np.cumsum(sizes)[:-1])
    own = np.array([row[0] for row in similarities])
    best_wrong = np.array([row[1:].max() for row in similarities])
    groups = sorted({q.group for q in questions if q.group is not None})
    number_of = {name: number for number, name in enumerate(groups)}
    return CaptionChoiceResult(
        encoded=encoded,
        questions=questions,
        image_of_question=images,
        picture_of_question=_number([picture for _, picture, _ in asked]),
        similarities=similarities,
        is_right=own >= best_wrong if ties == "right" else own > best_wrong,
        groups=groups,
        group_of_question=np.array([number_of.get(q.group, -1) for q in questions]),
    )


def questions_of(pair: Pair) -> tuple[str, list[Question]]:
    """The picture of a pair and the questions on it; raises `UnusablePair` where there is none.

    `metadata["questions"]` lists them, with `captions` and maybe `group`, and
    `metadata["picture"]` names the picture, where it is not the key. Without questions there is
    one, on all captions of the pair, of which the first is the right one.
    """
    asked = pair.metadata.get("questions")
    if asked is None:
        asked = [{"captions": pair.metadata.get("captions") or [pair.caption]}]
    questions = [Question(tuple(each["captions"]), each.get("group")) for each in asked]
    questions = [question for question in questions if len(question.captions) > 1]
    if not questions:
        raise UnusablePair("no_wrong_caption")
    return pair.metadata.get("picture", pair.key), questions


def _distinct_texts(model: EmbeddingModel, texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Texts of which no two have equal tokens, and for each of `texts` the index of its one."""
    by_text = list(dict.fromkeys(texts))
    keys: Sequence[Any] = by_text
    if hasattr(model, "tokenize"):
        keys = [tokens.tobytes() for tokens in np.asarray(model.tokenize(by_text))]
    text_of_key: dict[Any, str] = {}
    for key, text in zip(keys, by_text, strict=True):
        text_of_key.setdefault(key, text)
    index_of_key = {key: index for index, key in enumerate(text_of_key)}
    index_of = {text: index_of_key[key] for text, key in zip(by_text, keys, strict=True)}
    return list(text_of_key.values()), np.array([index_of[text] for text in texts], np.int32)


def _similarities(
    image_emb: np.ndarray, images: np.ndarray, text_emb: np.ndarray, texts: np.ndarray
) -> np.ndarray:
    """Cosines of the chosen rows, each summed in the same order: float32 [n]."""
    starts = range(0, len(texts), _BLOCK)
    parts = [slice(start, start + _BLOCK) for start in starts]
    return np.concatenate(
        [(image_emb[images[part]] * text_emb[texts[part]]).sum(axis=1) for part in parts]
    )


def _number(names: Sequence[str]) -> np.ndarray:
    """Numbers names from 0 in the order in which they first occur: int [n]."""
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([number_of[name] for name in names], np.int32)


def _run(
    model: EmbeddingModel, task: Task, entries: Iterable[Pair | Skipped], batching: Batching
) -> Measured:
    ties = task.options.get("ties", "wrong")
    result = choose_captions(model, entries, task.caption_template, ties, batching=batching)
    return Measured(
        encoded=result.encoded,
        num_items=result.num_items,
        measure=result.resampled_metrics,
        protocol={
            "caption_template": task.caption_template,
            "decision": "the caption most similar to the image",
            "ties": TIES[ties],
            **({"macro_accuracy": "mean over the groups"} if result.groups else {}),
        },
        counts={
            "images": len(result.encoded.positions),
            "pictures": result.num_items,
            "questions": len(result.questions),
            "texts": sum(len(question.captions) for question in result.questions),
        },
        details={"per_group": result.describe_groups()} if result.groups else {},
        result=result,
    )


def _parse_ties(value: Any) -> str:
    if value not in TIES:
        raise ValueError(f"ties={value}: expected {' or '.join(TIES)}")
    return value


PROTOCOL = Protocol(
    run=_run,
    metrics={
        "accuracy": Metric("share", "accuracy"),
        "macro_accuracy": Metric("share", "macro accuracy"),
    },
    options={"caption_template": CAPTION_TEMPLATE, "ties": Option(_parse_ties)},
    defaults={"caption_template": CAPTION_SLOT},
)
