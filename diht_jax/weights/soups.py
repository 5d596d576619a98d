"""Averages of models: weighted means of their parameters, and the greedy soup.

Model soups: Wortsman et al. 2022, arXiv 2203.05482. WiSE-FT, whose interpolation is a mean of two
models: Wortsman et al. 2021, arXiv 2109.01903. Works on NumPy arrays; a model is read when its turn
comes, so that not all of them are in memory.
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
    """The mean of models, `sum_i w_i p_i / sum_i w_i` for each parameter.

    Summed in float64, the logarithm of the logit scale as every other parameter. A model of weight
    0 is not read, so that weights 1 and 0 give a model itself, bit for bit. The mean is in the
    dtypes of the first model that counts, and has all else that this one has.

    Raises:
        ValueError: the models are not of one architecture; names the first difference.
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
    assert like is not None and sums is not None  # a weight is above 0
    params = jax.tree.map(lambda s, p: (s / total).astype(p.dtype), sums, like.params)
    return dataclasses.replace(like, params=params)


def check_same_architecture(first: ModelFiles, other: ModelFiles) -> None:
    """Raises ValueError where the parameters of two models mean different things.

    The message names the setting. Shapes follow from the settings: each model was read by its own.
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

    name: str  # of the model that was tried
    alone: float  # what it reaches alone
    with_it: float  # what the soup reaches with it
    kept: bool  # whether it stays in the soup


def greedy_soup(
    names: Sequence[str],
    read: Read,
    measure: Callable[[ModelFiles], float],
    *,
    lower_is_better: bool = False,
) -> tuple[ModelFiles, list[Trial]]:
    """The greedy soup (arXiv 2203.05482, recipe 1).

    The models are tried in the order of what they reach alone, the best first and of equal ones the
    first given. Each stays if the mean of all that stayed is then at least as good as before. How
    good a model is comes from data that are held out for this choice.

    Returns:
        The soup, and the decisions in their order.

    Raises:
        ValueError: the models are not of one architecture, or one measures NaN.
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
        # Of the first one it is known already.
        value = measure(_mean(first, candidate, size + 1)) if size else best
        is_kept = sign * value >= sign * best
        trials.append(Trial(names[i], alone[i], value, is_kept))
        if is_kept:
            sums, size, best = candidate, size + 1, value
    return _mean(first, sums, size), trials
