"""The table of filter steps. A new step is one file in this folder and one line here."""

from __future__ import annotations

import ml_collections

from data_prep.steps import (
    captions,
    clip,
    decontaminate,
    duplicates,
    heads,
    image,
    predicates,
    text,
)
from data_prep.steps.base import Step

STEPS: dict[str, type[Step]] = {
    "metadata": predicates.PredicateStep,
    "duplicates": duplicates.DuplicateStep,
    "caption": captions.CaptionStep,
    "image": image.ImageStep,
    "decontaminate": decontaminate.DecontaminateStep,
    "clip": clip.ClipStep,
    "aesthetic": heads.AestheticStep,
    "unsafe": heads.UnsafeStep,
    "text": text.TextStep,
}


def ordered_steps() -> list[type[Step]]:
    """All steps, in the order in which they run."""
    return sorted(STEPS.values(), key=lambda step: step.order)


def active_steps(config: ml_collections.ConfigDict) -> list[type[Step]]:
    """The steps that a config asks for, in the order in which they run."""
    return [
        step
        for step in ordered_steps()
        if step.is_active(config) and not (config.metadata_only and "image" in step.reads)
    ]
