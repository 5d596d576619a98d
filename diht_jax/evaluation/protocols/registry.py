"""The protocols, keyed by the kind of their tasks: the prefix in "KIND:SOURCE"."""

from __future__ import annotations

from diht_jax.evaluation.protocols import (
    answers,
    caption_choice,
    classification,
    label_scores,
    matching,
    retrieval,
)
from diht_jax.evaluation.protocols.base import Protocol

PROTOCOLS: dict[str, Protocol] = {
    "classification": classification.PROTOCOL,
    "retrieval": retrieval.PROTOCOL,
    "multilabel": label_scores.MULTILABEL,
    "binary": label_scores.BINARY,
    "winoground": matching.WINOGROUND,
    "caption_choice": caption_choice.PROTOCOL,
    "winogavil": matching.WINOGAVIL,
    "entailment": answers.ENTAILMENT,
    "vqa": answers.VQA,
}
