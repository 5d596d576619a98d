"""Model averaging: weighted means of parameters, and the greedy soup.

Model soups: Wortsman et al. 2022, arXiv 2203.05482. WiSE-FT, which interpolates between two models:
Wortsman et al. 2021, arXiv 2109.01903. Works on NumPy arrays; models are read one at a time to save
memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diht_jax.models.zoo import ARCHITECTURE_FIELDS
from diht_jax.weights.settings import field_value
from diht_jax.weights.source import ModelFiles

Parameters = dict[str, Any]
Read = Callable[[str], ModelFiles]  # reads a model by its name


def average_models(names: Sequence[str], weights: Sequence[float], read: Read) -> ModelFiles:
    """Returns the weighted mean of models, `sum_i w_i p_i / sum_i w_i` for each parameter.

    Sums are in float64; the logarithm of the logit scale is averaged like any parameter. A model of
    weight 0 is not read, so weights 1 and 0 return a model bit for bit. Dtypes and all other
    properties are those of the first model with a positive weight.

    Raises:
        ValueError: the architectures differ; names the first difference.
    """
    first, sums, total = None, None, 0.0
    for name, weight in zip(names, weights, strict=True):
        if not weight:
            continue
        model = read(name)
        first = first or _without_values(model)
        check_same_architecture(first, model)
        sums, total = _add(sums, model.params, weight), total + weight
    return _mean(first, sums, total)


def _without_values(model: ModelFiles) -> ModelFiles:
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), model.params)
    return dataclasses.replace(model, params=shapes)


def _add(sums: Parameters | None, params: Parameters, weight: float = 1.0) -> Parameters:
    added = jax.tree.map(lambda p: weight * np.asarray(p, np.float64), params)
    return added if sums is None else jax.tree.map(np.add, sums, added)


def _mean(like: ModelFiles | None, sums: Parameters | None, total: float) -> ModelFiles:
    assert like is not None and sums is not None  # some weight is positive
    params = jax.tree.map(lambda s, p: (s / total).astype(p.dtype), sums, like.params)
    return dataclasses.replace(like, params=params)


def check_same_architecture(first: ModelFiles, other: ModelFiles) -> None:
    """Raises ValueError if the parameters of two models have different meanings; names the setting.

    Shapes need no check: they follow from the settings, by which each model was read.
    """
    expected = _settings_of(first)
    for name, value in _settings_of(other).items():
        if value != expected[name]:
            raise ValueError(
                f"{other.path}: {name} is {value!r}, and {expected[name]!r} in {first.path}; "
                "models to average must have one architecture"
            )


def _settings_of(model: ModelFiles) -> dict[str, Any]:
    return {field: field_value(model.arch, field) for field in ARCHITECTURE_FIELDS} | {
        "preprocessing": model.preprocessing,
        "tokenizer": model.tokenizer and model.tokenizer.describe(),
    }


class Trial(NamedTuple):
    """One decision of the greedy soup."""

    name: str  # name of the model
    alone: float  # its score alone
    with_it: float  # the soup's score with it
    kept: bool  # whether it stays in the soup


def greedy_soup(
    names: Sequence[str],
    read: Read,
    measure: Callable[[ModelFiles], float],
    *,
    lower_is_better: bool = False,
) -> tuple[ModelFiles, list[Trial]]:
    """Builds the greedy soup (arXiv 2203.05482, recipe 1).

    Models are tried in the order of their own scores, best first; ties keep the given order. A
    model stays if the mean of all that stayed is then at least as good as before. Scores come from
    data that are held out for this choice.

    Returns:
        The soup, and the decisions in order.

    Raises:
        ValueError: the architectures differ, or a score is NaN.
    """
    sign = -1 if lower_is_better else 1
    first, alone = None, []
    for name in names:
        model = read(name)
        first = first or _without_values(model)
        check_same_architecture(first, model)
        alone.append(measure(model))
        if math.isnan(alone[-1]):
            raise ValueError(f"{name}: what the soup is chosen by is not a number for this model")
    order = sorted(range(len(names)), key=lambda i: -sign * alone[i])
    best, sums, size, trials = alone[order[0]], None, 0, []
    for i in order:
        candidate = _add(sums, read(names[i]).params)
        # The score of the first one is already known.
        value = measure(_mean(first, candidate, size + 1)) if size else best
        is_kept = sign * value >= sign * best
        trials.append(Trial(names[i], alone[i], value, is_kept))
        if is_kept:
            sums, size, best = candidate, size + 1, value
    return _mean(first, sums, size), trials
