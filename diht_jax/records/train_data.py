"""The sources of `config.data.train`: one data set, or several with weights."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from diht_jax.config.checks import nearest_name

_CAPTION = "{caption}"
_KEYS = ("path", "weight", "text_template", "order", "labels")


@dataclasses.dataclass(frozen=True)
class TrainSource:
    """One source of a mixture; values that are None are those of `config.data`.

    Attributes:
        name: its key in `config.data.train`; "" of the only one.
        path: as `open_records` takes it.
        weights: step from which on it holds, and the weight; the first step is 0.
        text_template: of its captions.
        order: "global", "blocks" or "auto".
        labels: folder of `data_prep.label` with the labels of its records; None where the records
            have them, if any.
    """

    name: str
    path: str | list[str]
    weights: tuple[tuple[int, Fraction], ...] = ((0, Fraction(1)),)
    text_template: str | None = None
    order: str | None = None
    labels: str | None = None


def check_is_set(train: Any) -> None:
    """Raises ValueError where `config.data.train` is empty."""
    if not train:
        raise ValueError(
            "config.data.train is not set: expected a directory, a glob or a list of record "
            "shards, such as --config.data.train=/data/kept (written by data_prep.filter)"
        )


def parse_train(train: Any, labels: str | None = None) -> list[TrainSource]:
    """The sources of `config.data.train`.

    Args:
        train: a path, a list of paths, or a section for each source: `dict(laion=dict(path=...,
            weight=0.8), curated=dict(path=..., weight=0.2, text_template="a photo: {caption}",
            order="global"))`. A weight is a number, or a schedule such as ((0, 0.8), (10000, 0.5)):
            from step 10,000 on it is 0.5.

    Raises:
        ValueError: it is not set, or not of this form; names the key as it is typed.
    """
    check_is_set(train)
    if not _is_section(train):
        return [TrainSource("", train if isinstance(train, str) else list(train), labels=labels)]
    sources = [_parse_source(name, train[name], labels) for name in train]
    for step in switching_steps(sources):
        if not any(weight_at_step(source.weights, step) for source in sources):
            raise ValueError(f"config.data.train: all weights are 0 from step {step} on")
    for source in sources:
        if not any(weight for _, weight in source.weights):
            raise ValueError(
                f"config.data.train.{source.name}.weight=0: it is never used; leave the source out"
            )
    return sources


def describe_train(train: Any) -> str:
    """`config.data.train` in a message."""
    if not _is_section(train):
        return str(train)
    return ", ".join(f"{source.name}: {source.path}" for source in parse_train(train))


def switching_steps(sources: Sequence[TrainSource]) -> list[int]:
    """The steps from which on the weights are others, from 0."""
    return sorted({step for source in sources for step, _ in source.weights})


def weight_at_step(points: Sequence[tuple[int, Fraction]], step: int) -> Fraction:
    """The weight that holds at a step; see `TrainSource.weights` for the points."""
    return next(weight for first, weight in reversed(points) if first <= step)


def _is_section(train: Any) -> bool:
    return hasattr(train, "keys")


def _parse_source(name: str, section: Any, labels: str | None) -> TrainSource:
    where = f"config.data.train.{name}"
    if not _is_section(section):
        raise ValueError(
            f"{where}: expected a section such as dict(path='/data/kept', weight=0.8), got "
            f"{type(section).__name__} {section!r:.200}"
        )
    for key in section:
        if key not in _KEYS:
            nearest = nearest_name(str(key)[:200], _KEYS)
            hint = f"did you mean '{nearest}'?" if nearest else f"known: {', '.join(_KEYS)}"
            raise ValueError(f"{where}.{key}: no such key; {hint}")
    for key in ("path", "weight"):
        if section.get(key) is None:
            raise ValueError(
                f"{where}.{key} is not set: expected a section such as dict(path='/data/kept', "
                "weight=0.8)"
            )
    path = section["path"]
    paths = [path] if isinstance(path, str) else path
    if (
        not isinstance(paths, list | tuple)
        or not paths
        or not all(isinstance(each, str | os.PathLike) and os.fspath(each) for each in paths)
    ):
        raise ValueError(
            f"{where}.path: expected a directory, a glob or a list of shards, got {path!r:.200}"
        )
    template, order = section.get("text_template"), section.get("order")
    if template is not None and (not isinstance(template, str) or _CAPTION not in template):
        raise ValueError(f"{where}.text_template={template!r:.200}: lacks {_CAPTION}")
    if order not in (None, "auto", "global", "blocks"):
        raise ValueError(f"{where}.order={order!r:.200}: expected 'auto', 'global' or 'blocks'")
    own_labels = section.get("labels")
    if own_labels is not None and not (isinstance(own_labels, str) and own_labels):
        raise ValueError(
            f"{where}.labels={own_labels!r:.200}: expected a folder of `python -m data_prep.label`"
        )
    weights = parse_weights(f"{where}.weight", section["weight"])
    return TrainSource(
        name,
        path if isinstance(path, str) else [os.fspath(part) for part in path],
        weights,
        template,
        order,
        own_labels or labels,
    )


def parse_weights(where: str, weight: Any) -> tuple[tuple[int, Fraction], ...]:
    """A weight, or a schedule of weights, as points: step from which on it holds, and weight.

    Other forms are a ValueError that names `where`, the key as it is typed.
    """
    if not isinstance(weight, list | tuple):
        return ((0, _parse_weight(where, weight)),)
    points = []
    for point in weight:
        is_pair = isinstance(point, list | tuple) and len(point) == 2
        if not is_pair or type(point[0]) is not int or point[0] < 0:
            raise ValueError(
                f"{where}={weight!r:.200}: expected a number, or pairs of a step and a weight such "
                "as ((0, 0.8), (10000, 0.5))"
            )
        points.append((point[0], _parse_weight(where, point[1])))
    steps = [step for step, _ in points]
    if steps[:1] != [0] or steps != sorted(set(steps)):
        raise ValueError(
            f"{where}={weight!r:.200}: expected steps that begin with 0 and become larger"
        )
    return tuple(points)


def _parse_weight(where: str, weight: Any) -> Fraction:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight < 0:
        raise ValueError(f"{where}={weight!r:.200}: expected a finite number, at least 0")
    return Fraction(repr(weight))  # 0.2 is a fifth, as it was typed
