"""Selection of the right caption of an image among similar wrong ones.

SugarCrepe (Hsieh et al., arXiv 2306.14610) and ARO (Yuksekgonul et al., arXiv 2210.01936). Ties
count as in their code; in ARO's orders, where shuffling may not change a caption, they are right
(`ties=right`). Texts with equal tokens are encoded once, so such ties are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diht_jax.evaluation.embedding.encoding import EmbeddingModel, Encoder, UnusablePair
from diht_jax.evaluation.protocols.base import (
    CAPTION_SLOT,
    Measured,
    Metric,
    Protocol,
    Task,
    choice,
    fill_caption_template,
    parse_text,
)
from diht_jax.records.schema import Pair

TIES = {
    "wrong": "a wrong caption as similar as the right one is the answer",
    "right": "the right caption is the answer where a wrong one is as similar",
}


class Question(NamedTuple):
    """Captions, one of which is right."""

    captions: tuple[str, ...]  # at least two, the right one first
    group: str | None = None  # group for the macro accuracy


@dataclasses.dataclass(frozen=True)
class CaptionChoiceResult:
    """The predictions for q questions."""

    questions: list[Question]
    image_of_question: np.ndarray  # int [q], index of the image
    picture_of_question: np.ndarray  # int [q]; a picture may be cropped to several images
    similarities: list[np.ndarray]  # q arrays with one value per caption
    is_right: np.ndarray  # bool [q]
    groups: dict[str, np.ndarray]  # name -> bool [q], in alphabetical order

    def measure(self, counts: np.ndarray) -> dict[str, float]:
        """Computes the metrics with picture i and its questions counted `counts[i]` times."""
        weights = counts[self.picture_of_question]
        metrics = {"accuracy": float(np.average(self.is_right, weights=weights))}
        if self.groups:
            accuracies = [
                np.average(self.is_right[own], weights=weights[own])
                for own in self.groups.values()
                if weights[own].any()
            ]
            metrics["macro_accuracy"] = float(np.sum(accuracies) / max(1, len(accuracies)))
        return metrics

    def per_group(self) -> list[dict[str, Any]]:
        """Returns name, number of questions and accuracy of each group."""
        rows = []
        for name, own in self.groups.items():
            accuracy = float(self.is_right[own].mean())
            rows.append({"group": name, "questions": int(own.sum()), "accuracy": accuracy})
        return rows


def run(task: Task, encoder: Encoder) -> Measured:
    """Predicts the caption for every question of `questions_of`; resampled items are the pictures.

    `Measured.result` is a `CaptionChoiceResult`.
    """
    template, ties = task.prompt, task.options.get("ties", "wrong")
    encoded = encoder.images(questions_of)
    asked = [
        (image, image if picture is None else picture, question)
        for image, (picture, questions) in enumerate(encoded.notes)
        for question in questions
    ]
    images, pictures, questions = zip(*asked, strict=True)
    number_of = {name: number for number, name in enumerate(dict.fromkeys(pictures))}
    texts = [fill_caption_template(template, text) for q in questions for text in q.captions]
    sizes = [len(question.captions) for question in questions]
    distinct, index_of_text = _distinct_texts(encoder.model, texts)
    text_emb = encoder.texts(distinct)
    # Summed row by row in a fixed order, so that equal texts have exactly equal similarities.
    similarities = [
        (encoded.image_emb[image] * text_emb[own]).sum(axis=1)
        for image, own in zip(images, np.split(index_of_text, np.cumsum(sizes)[:-1]), strict=True)
    ]
    own = np.array([row[0] for row in similarities])
    best_wrong = np.array([row[1:].max() for row in similarities])
    groups = np.array([question.group or "" for question in questions])
    result = CaptionChoiceResult(
        questions=list(questions),
        image_of_question=np.array(images),
        picture_of_question=np.array([number_of[picture] for picture in pictures]),
        similarities=similarities,
        is_right=own >= best_wrong if ties == "right" else own > best_wrong,
        groups={str(name): groups == name for name in np.unique(groups) if name},
    )
    return Measured(
        encoded=encoded,
        num_items=len(number_of),
        measure=result.measure,
        protocol={
            "caption_template": template,
            "decision": "the caption most similar to the image",
            "ties": TIES[ties],
            **({"macro_accuracy": "mean over the groups"} if result.groups else {}),
        },
        counts={
            "images": len(encoded.notes),
            "pictures": len(number_of),
            "questions": len(questions),
            "texts": sum(sizes),
        },
        details={"per_group": result.per_group()} if result.groups else {},
        result=result,
    )


def questions_of(pair: Pair) -> tuple[str | None, list[Question]]:
    """Returns a pair's picture and its questions; raises `UnusablePair` if there are none.

    `metadata["questions"]` lists questions with `captions` and an optional `group`. Without it
    there is one question over all captions of the pair, the first of which is right.
    `metadata["picture"]` names the picture; without it, the picture is None: the pair's own.
    """
    alone = {"captions": pair.metadata.get("captions") or [pair.caption]}
    stated = pair.metadata.get("questions")
    asked: list[dict[str, Any]] = [alone] if stated is None else stated
    try:
        questions = [Question(tuple(each["captions"]), each.get("group")) for each in asked]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"record '{pair.key}': expected metadata 'questions' to be a list of objects with "
            f"'captions', got {stated!r:.80}"
        ) from error
    questions = [question for question in questions if len(question.captions) > 1]
    if not questions:
        raise UnusablePair("no_wrong_caption")
    return pair.metadata.get("picture"), questions


def _distinct_texts(model: EmbeddingModel, texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Deduplicates texts by tokens; returns the distinct texts and each text's index in them."""
    tokenize = getattr(model, "tokenize", None)
    keys = texts if tokenize is None else [row.tobytes() for row in np.asarray(tokenize(texts))]
    text_of = dict(zip(reversed(keys), reversed(texts), strict=True))  # keeps the first duplicate
    distinct = {key: text_of[key] for key in keys}
    index_of = {key: index for index, key in enumerate(distinct)}
    return list(distinct.values()), np.array([index_of[key] for key in keys])


PROTOCOL = Protocol(
    run=run,
    metrics={
        "accuracy": Metric("share", "accuracy"),
        "macro_accuracy": Metric("share", "macro accuracy"),
    },
    options={"caption_template": parse_text, "ties": choice("ties", *TIES)},
    defaults={"caption_template": CAPTION_SLOT},
)
