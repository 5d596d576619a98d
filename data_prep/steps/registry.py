"""Table of filter steps. To add a step, write one file in this folder and one line here."""

from __future__ import annotations

import operator

import ml_collections

from data_prep.steps import cat, known_pictures, predicates, scores
from data_prep.steps.base import Step

STEPS: dict[str, type[Step]] = {
    "metadata": predicates.PredicateStep,
    "duplicates": known_pictures.DuplicateStep,
    "caption": cat.CaptionStep,
    "image": cat.ImageStep,
    "decontaminate": known_pictures.DecontaminateStep,
    "clip": scores.ClipStep,
    "aesthetic": scores.AestheticStep,
    "unsafe": scores.UnsafeStep,
    "text": cat.TextStep,
}


def ordered_steps() -> list[type[Step]]:
    """Returns all steps in running order."""
    return sorted(STEPS.values(), key=operator.attrgetter("order"))


def active_steps(config: ml_collections.ConfigDict) -> list[type[Step]]:
    """Returns the steps that a config enables, in running order."""
    return [
        step
        for step in ordered_steps()
        if step.is_active(config) and not (config.metadata_only and "image" in step.reads)
    ]
