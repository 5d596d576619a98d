"""Tasks beside classification and retrieval, as `tasks.evaluate_task` runs them.

Called by `tasks`. Each function takes a task's entries, measures, and words the protocol; the
measuring itself is in `label_scores`, `winoground` and `answers`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from diht_jax.data.readers.base import Skipped
from diht_jax.data.records.schema import Pair
from diht_jax.evaluation.embedding.encoding import EmbeddingModel, EncodedImages
from diht_jax.evaluation.protocols.answers import (
    ENTAILMENT_PROMPTS,
    answer_entailment,
    answer_questions,
)
from diht_jax.evaluation.protocols.label_scores import score_labels
from diht_jax.evaluation.protocols.winoground import evaluate_winoground
from diht_jax.evaluation.suite import BINARY, ENTAILMENT, MULTILABEL, VQA, WINOGROUND
from diht_jax.evaluation.task_parsing import Task


class TaskResult(Protocol):
    """What every kind of task gives."""

    encoded: EncodedImages

    @property
    def num_items(self) -> int: ...

    def resampled_metrics(self, counts: np.ndarray) -> dict[str, float]: ...


# The result, what goes into the results file, and what draws its page, where there is one.
Measured = tuple[TaskResult, dict[str, Any], Callable[[pathlib.Path], None] | None]


def _evaluate_label_scores(
    model: EmbeddingModel,
    task: Task,
    entries: Iterable[Pair | Skipped],
    **batching: Any,
) -> Measured:
    binary = task.kind == BINARY
    result = score_labels(
        model,
        entries,
        task.class_names,
        task.templates,
        binary=binary,
        label_field=task.label_field,
        **batching,
    )
    measured = {
        "protocol": {
            "class_names": list(task.class_names) if binary else "names given",
            "label_field": task.label_field or ("label" if binary else "labels"),
            "templates": list(task.templates),
            "text_embedding": "normalised, averaged over the templates, normalised",
            "score": "cosine to the second class minus cosine to the first"
            if binary
            else "cosine to the class",
        },
        "metrics": result.metrics,
        "counts": {
            "images": len(result.scores),
            "classes": len(task.class_names),
            "positives": int(result.targets.sum()),
            "classes_without_images": int((~result.targets.any(axis=0)).sum()),
        },
    }
    return result, measured, None


def _evaluate_winoground(
    model: EmbeddingModel,
    task: Task,
    entries: Iterable[Pair | Skipped],
    **batching: Any,
) -> Measured:
    result = evaluate_winoground(model, entries, task.caption_template, **batching)
    measured = {
        "protocol": {
            "caption_template": task.caption_template,
            "text": "for each image its own caption is the more similar one, in both cases",
            "image": "for each caption its own image is the more similar one, in both cases",
            "group": "both; equal similarities are wrong",
        },
        "metrics": result.metrics,
        "counts": {
            "images": len(result.encoded.positions),
            "examples": result.num_items,
            "incomplete_examples": result.incomplete,
        },
    }
    return result, measured, None


def _evaluate_answers(
    model: EmbeddingModel,
    task: Task,
    entries: Iterable[Pair | Skipped],
    **batching: Any,
) -> Measured:
    if task.kind == ENTAILMENT:
        prompts = dict(zip(ENTAILMENT_PROMPTS, task.templates, strict=True))
        result = answer_entailment(model, entries, prompts, **batching)
        protocol: dict[str, Any] = {
            "prompts": prompts,
            "decision": "the prompt most similar to the image",
        }
    else:
        result = answer_questions(
            model, entries, task.class_names, task.answer_template, **batching
        )
        protocol = {
            "answer_template": task.answer_template,
            "candidates": len(task.class_names),
            "decision": "the answer whose prompt is most similar to the image",
            "accuracy": "VQA v2's, answers without case, punctuation and articles",
        }
    measured = {
        "protocol": protocol,
        "metrics": result.metrics,
        "counts": {
            "images": result.num_items,
            "questions": len(result.answers),
            "texts": result.num_texts,
        },
    }
    return result, measured, None


OTHER_KINDS = {
    MULTILABEL: _evaluate_label_scores,
    BINARY: _evaluate_label_scores,
    WINOGROUND: _evaluate_winoground,
    ENTAILMENT: _evaluate_answers,
    VQA: _evaluate_answers,
}
