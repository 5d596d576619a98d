"""The sources of `config.data.train`: one data set, or several with weights; what they hold out."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import ml_collections
import numpy as np

from diht_jax.config.checks import nearest_name

_CAPTION = "{caption}"
# Numbers of records of which none is held out.
NO_RECORDS = np.zeros(0, np.int64)
_KEYS = ("path", "weight", "text_template", "order", "labels")


@dataclasses.dataclass(frozen=True)
class TrainSource:
    """One source of a mixture; values that are None are those of `config.data`."""

    name: str  # its key in `config.data.train`; "" of the only one
    path: str | list[str]  # as `open_records` takes it
    # Step from which on it holds, and the weight; the first step is 0.
    weights: tuple[tuple[int, Fraction], ...] = ((0, Fraction(1)),)
    text_template: str | None = None  # of its captions
    order: str | None = None  # "global", "blocks" or "auto"
    # Folder of `data_prep.label` with the labels of its records; None where the records have them,
    # if any.
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
    example = "a section such as dict(path='/data/kept', weight=0.8)"
    if not _is_section(section):
        kind = type(section).__name__
        raise ValueError(f"{where}: expected {example}, got {kind} {section!r:.200}")
    for key in section:
        if key not in _KEYS:
            nearest = nearest_name(str(key)[:200], _KEYS)
            hint = f"did you mean '{nearest}'?" if nearest else f"known: {', '.join(_KEYS)}"
            raise ValueError(f"{where}.{key}: no such key; {hint}")
    for key in ("path", "weight"):
        if section.get(key) is None:
            raise ValueError(f"{where}.{key} is not set: expected {example}")
    path, template, order, own_labels = (
        section.get(key) for key in ("path", "text_template", "order", "labels")
    )
    is_text = isinstance(path, str)
    paths = [path] if is_text else path
    is_list = isinstance(paths, list | tuple) and bool(paths)

    def check(key: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise ValueError(f"{where}.{key}={section[key]!r:.200}: {expected}")

    is_path = is_list and all(isinstance(p, str | os.PathLike) and os.fspath(p) for p in paths)
    check("path", is_path, "expected a directory, a glob or a list of shards")
    has_caption = template is None or (isinstance(template, str) and _CAPTION in template)
    check("text_template", has_caption, f"lacks {_CAPTION}")
    orders = (None, "auto", "global", "blocks")
    check("order", order in orders, "expected 'auto', 'global' or 'blocks'")
    is_folder = own_labels is None or (isinstance(own_labels, str) and own_labels != "")
    check("labels", is_folder, "expected a folder of `python -m data_prep.label`")
    return TrainSource(
        name,
        path if is_text else [os.fspath(part) for part in paths],
        parse_weights(f"{where}.weight", section["weight"]),
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


def held_out_records(records: Any, data: ml_collections.ConfigDict, seed: int) -> np.ndarray:
    """Numbers of the records of a source that `config.data.validation_share` holds out.

    Whether a record is held out is a function of `config.seed`, the name of its shard (without the
    folder) and its place there alone, so that shards may be moved or added.

    Returns:
        int64, rising.

    Raises:
        ValueError: the share is of so few records that it is none of them, or all.
    """
    share = data.get("validation_share")
    if not share:
        return NO_RECORDS
    found, start = [NO_RECORDS], 0
    for path, length in zip(records.paths, map(int, records.shard_lengths), strict=True):
        bits = np.random.PCG64([seed, *os.path.basename(path).encode()]).random_raw(length)
        found.append(start + np.flatnonzero(bits < np.uint64(share * 2**64)))
        start += length
    held_out = np.concatenate(found)
    if not 0 < len(held_out) < start:
        raise ValueError(
            f"config.data.validation_share={share} holds out {len(held_out)} of the {start} "
            "records; expected a share that leaves some of both, or 0"
        )
    return held_out
