"""Questions on images, answered by the most similar of some filled prompts: SNLI-VE and VQA v2.

DiHT (arXiv 2301.02280) reports both zero-shot; its prompts are not public. Ours:

- **Entailment**: the hypothesis goes into one prompt for each of the three relations, and the
  prompt most similar to the image decides (`ENTAILMENT_PROMPTS`). Accuracy.
- **VQA**: every candidate answer goes into the prompt together with the question. Accuracy as VQA
  v2 defines it (`vqa_credit`).

Each image is embedded once, and each question with its answers once for all its images.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.encoding import (
    EmbeddingModel,
    EncodedImages,
    UnusablePair,
    encode_images,
    encode_texts,
)
from diht_jax.evaluation.protocols.base import (
    CLASS_NAMES,
    TEMPLATES,
    Measured,
    Metric,
    Option,
    Protocol,
    Task,
    check_has_class_names,
    parse_text,
)
from diht_jax.evaluation.protocols.vqa_credit import vqa_credit
from diht_jax.progress import ProgressBar
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

ENTAILMENT_PROMPTS = {
    "entailment": "{}",
    "neutral": "maybe {}",
    "contradiction": "it is not true that {}",
}
ANSWER_TEMPLATE = "question: {question} answer: {answer}"


@dataclasses.dataclass(frozen=True)
class AnswersResult:
    """What was answered; q questions.

    Attributes:
        encoded: the images.
        image_of_question: int [q].
        answers: q texts.
        credits: float [q], between 0 and 1.
        num_texts: how many prompts were encoded.
    """

    encoded: EncodedImages
    image_of_question: np.ndarray
    answers: list[str]
    credits: np.ndarray
    num_texts: int

    @property
    def num_items(self) -> int:
        """Independent items: the images."""
        return len(self.encoded.positions)

    @property
    def metrics(self) -> dict[str, float]:
        """A fraction: `accuracy`."""
        return {"accuracy": float(self.credits.mean())}

    def resampled_metrics(self, counts: np.ndarray) -> dict[str, float]:
        """The metrics if image i and its questions had been there `counts[i]` times."""
        weights = counts[self.image_of_question]
        return {"accuracy": float((weights * self.credits).sum() / weights.sum())}


def answer_entailment(
    model: EmbeddingModel,
    pairs: Iterable[Pair | Skipped],
    prompts: dict[str, str] | None = None,
    **batching: Any,
) -> AnswersResult:
    """Decides between the relations for every row with `sentence` and `label`.

    Args:
        model: see `EmbeddingModel`.
        pairs: of `annotations.annotation_units`, consumed once.
        prompts: relation -> prompt with "{}" for the hypothesis; `ENTAILMENT_PROMPTS` by default.
        **batching: `batch_size`, `num_threads` and `progress`, as `retrieval.retrieve` has them.

    Raises:
        ValueError: a row lacks a field or has another label; no usable row.
    """
    prompts = prompts or ENTAILMENT_PROMPTS

    def check(row: dict[str, Any]) -> bool:
        if row["label"] not in prompts:
            raise ValueError(f"label '{row['label']}': expected one of {', '.join(prompts)}")
        return True

    return _answer(
        model,
        pairs,
        ("sentence", "label"),
        check,
        list(prompts),
        lambda sentence, relation: prompts[relation].replace("{}", sentence),
        lambda row, answer: float(row["label"] == answer),
        **batching,
    )


def answer_questions(
    model: EmbeddingModel,
    pairs: Iterable[Pair | Skipped],
    candidates: Sequence[str],
    template: str = ANSWER_TEMPLATE,
    **batching: Any,
) -> AnswersResult:
    """Chooses among candidate answers for every row with `question` and `answer`.

    Args:
        model: see `EmbeddingModel`.
        pairs: of `annotations.annotation_units`, consumed once. `answer` lists what people said;
            a row without it (a test split) is left out.
        candidates: answers to choose from, the same for all questions.
        template: with "{question}" and "{answer}".
        **batching: `batch_size`, `num_threads` and `progress`, as `retrieval.retrieve` has them.

    Raises:
        ValueError: a bad template, no candidate, no usable row.
    """
    if not candidates:
        raise ValueError("expected candidate answers (class_names=FILE), got none")
    check_answer_template(template)
    return _answer(
        model,
        pairs,
        ("question",),
        lambda row: bool(row.get("answer")),
        list(candidates),
        lambda question, answer: template.replace("{question}", question).replace(
            "{answer}", answer
        ),
        lambda row, answer: vqa_credit(answer, row["answer"]),
        **batching,
    )


def check_answer_template(template: str) -> str:
    """The template; raises ValueError where it lacks "{question}" or "{answer}"."""
    if template.count("{question}") != 1 or template.count("{answer}") != 1:
        raise ValueError(
            f"answer template {template!r}: expected '{{question}}' and '{{answer}}' once each, "
            f"such as '{ANSWER_TEMPLATE}'"
        )
    return template


def _answer(
    model: EmbeddingModel,
    pairs: Iterable[Pair | Skipped],
    needed: tuple[str, ...],
    is_usable: Callable[[dict[str, Any]], bool],
    choices: list[str],
    fill: Callable[[str, str], str],
    credit: Callable[[dict[str, Any], str], float],
    *,
    batch_size: int = 256,
    num_threads: int | None = None,
    progress: bool = False,
) -> AnswersResult:
    def describe(pair: Pair) -> list[dict[str, Any]]:
        rows = pair.metadata.get("rows")
        if rows is None:
            raise ValueError(f"record '{pair.key}': expected a source 'annotations:FILE'")
        for row in rows:
            for field in needed:
                if not isinstance(row.get(field), str):
                    raise ValueError(f"record '{pair.key}': expected a text as '{field}' in {row}")
        usable = [row for row in rows if is_usable(row)]
        if not usable:
            raise UnusablePair("no_answer")
        return usable

    encoded = encode_images(model, pairs, describe, batch_size=batch_size, num_threads=num_threads)
    rows = [(image, row) for image, note in enumerate(encoded.notes) for row in note]
    by_text: dict[str, list[int]] = collections.defaultdict(list)
    for number, (_, row) in enumerate(rows):
        by_text[row[needed[0]]].append(number)
    answers: list[str] = [""] * len(rows)
    texts = list(by_text)
    at_once = max(1, batch_size // len(choices))
    starts = range(0, len(texts), at_once)
    hidden = not progress or len(starts) < 2
    for start in ProgressBar(starts, "questions", unit=" batches", disable=hidden):
        part = texts[start : start + at_once]
        prompts = [fill(text, choice) for text in part for choice in choices]
        prompts += [""] * (at_once * len(choices) - len(prompts))  # one shape: compiled once
        text_emb = encode_texts(model.encode_text, prompts, batch_size=batch_size)
        for index, text in enumerate(part):
            own = text_emb[index * len(choices) : (index + 1) * len(choices)]
            images = [rows[number][0] for number in by_text[text]]
            best = (encoded.image_emb[images] @ own.T).argmax(axis=1)
            for number, choice in zip(by_text[text], best, strict=True):
                answers[number] = choices[choice]
    return AnswersResult(
        encoded=encoded,
        image_of_question=np.array([image for image, _ in rows], np.int32),
        answers=answers,
        credits=np.array(
            [credit(row, answer) for (_, row), answer in zip(rows, answers, strict=True)]
        ),
        num_texts=len(texts) * len(choices),
    )


def _measured(result: AnswersResult, protocol: dict[str, Any]) -> Measured:
    return Measured(
        encoded=result.encoded,
        num_items=result.num_items,
        measure=result.resampled_metrics,
        protocol=protocol,
        counts={
            "images": result.num_items,
            "questions": len(result.answers),
            "texts": result.num_texts,
        },
    )


def _run_entailment(
    model: EmbeddingModel, task: Task, entries: Iterable[Pair | Skipped], **batching: Any
) -> Measured:
    prompts = dict(zip(ENTAILMENT_PROMPTS, task.templates, strict=True))
    result = answer_entailment(model, entries, prompts, **batching)
    decision = "the prompt most similar to the image"
    return _measured(result, {"prompts": prompts, "decision": decision})


def _run_vqa(
    model: EmbeddingModel, task: Task, entries: Iterable[Pair | Skipped], **batching: Any
) -> Measured:
    template = task.options.get("answer_template", ANSWER_TEMPLATE)
    result = answer_questions(model, entries, task.class_names, template, **batching)
    protocol = {
        "answer_template": template,
        "candidates": len(task.class_names),
        "decision": "the answer whose prompt is most similar to the image",
        "accuracy": "VQA v2's, answers normalised as in its official evaluation code",
    }
    return _measured(result, protocol)


def _check_three_prompts(task: Task) -> None:
    if len(task.templates) != len(ENTAILMENT_PROMPTS):
        raise ValueError(
            f"expected {len(ENTAILMENT_PROMPTS)} templates, for {', '.join(ENTAILMENT_PROMPTS)}; "
            f"got {list(task.templates)}"
        )


_METRICS = {"accuracy": Metric("share", "accuracy")}
ENTAILMENT = Protocol(
    run=_run_entailment,
    metrics=_METRICS,
    options={"templates": TEMPLATES},
    defaults={"templates": tuple(ENTAILMENT_PROMPTS.values())},
    check=_check_three_prompts,
)
VQA = Protocol(
    run=_run_vqa,
    metrics=_METRICS,
    options={
        "class_names": CLASS_NAMES,
        "answer_template": Option(lambda value: check_answer_template(parse_text(value))),
    },
    check=lambda task: check_has_class_names(task, "candidate answers"),
)
