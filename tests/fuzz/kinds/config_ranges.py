"""Numbers in a training config: from far below to far beyond the range of their key."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import ml_collections
from hypothesis import strategies as st
from hypothesis.strategies import sampled_from as one

from diht_jax import config as configs
from diht_jax.config.keys import Key, check_ranges
from diht_jax.training.recipe import all_keys
from tests.fuzz.damage import Draw
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, require

_RANGED = sorted(
    name
    for name, key in all_keys().items()
    if isinstance(key, Key) and key.range and not isinstance(key.default, tuple)
)
# Keys by what a number must be at the least to make sense; of the others only their type is known.
_COUNTS = (
    *("data.batch_size", "data.prefetch_batches", "log_every_steps", "checkpoint.every_steps"),
    *("checkpoint.keep_last", "evaluation.batch_size", "max_skipped_steps", "micro_batch"),
    *("total_steps", "total_examples", "concepts.top_k", "concepts.num_objects"),
    *("model.overrides.vision_layers", "model.overrides.context_length", "profile.start_step"),
)
_AT_LEAST_ZERO = (
    *("data.num_workers", "optimizer.warmup_steps", "optimizer.learning_rate", "loss.beta"),
    *("optimizer.weight_decay", "evaluation.every_steps", "seed", "model.patch_dropout"),
)
_BELOW_ONE = ("ema.decay", "optimizer.b1", "optimizer.b2", "model.patch_dropout")
_WHOLE = st.integers(-3, 3) | one([-(2**63), 2**31, 2**32, 2**63, 10**30])
_REAL = st.floats(-2, 2) | one([-1e308, 1e-308, 0.0, -0.0, 1.0, math.inf, -math.inf, math.nan])


def _check(values: dict[str, Any], *names: str) -> Any:
    """The outcome for a config without types of its own, as a recipe may build it."""
    defaults = configs.default_config()
    content = json.loads(defaults.to_json_best_effort())
    for name, value in values.items():
        node = content
        *sections, last = name.split(".")
        for section in sections:
            node = node[section]
        node[last] = value
    config = ml_collections.ConfigDict(content, convert_dict=True)

    def check() -> None:
        configs.validate_config(config, defaults)
        check_ranges(config, all_keys())

    return attempt(check, *names)


def _is_whole(name: str) -> bool:
    node = configs.default_config()
    *sections, last = name.split(".")
    for section in sections:
        node = node[section]
    return node.get_type(last) is int


def check_numbers(draw: Draw, folder: pathlib.Path) -> str:
    """No key takes a number that makes no sense, and what is refused is named as it is typed."""
    name = draw(one(_RANGED))
    value = draw(_WHOLE if _is_whole(name) else _REAL)
    result = _check({name: value}, f"config.{name}={value}", f"'{name}'")
    is_refused = isinstance(result, Refused)
    wrong = value != value
    wrong |= name in _COUNTS and value < 1
    wrong |= name in _AT_LEAST_ZERO and value < 0
    wrong |= name in _BELOW_ONE and value >= 1
    require(is_refused or not wrong, f"accepted: {name}={value}")
    is_plain = (name in _COUNTS and 1 <= value <= 3) or (name in _AT_LEAST_ZERO and value == 0)
    require(not (is_refused and is_plain), f"refused: {name}={value}: {result}")
    return ERROR if is_refused else SUCCESS


def check_several(draw: Draw, folder: pathlib.Path) -> str:
    """Several keys at once: one wrong number among them is enough, and is the one named."""
    good = {name: 1 for name in draw(st.sets(one(_COUNTS[:7]), max_size=3))}
    bad = draw(one([name for name in _COUNTS if name not in good]))
    require(not isinstance(_check(good, "nothing"), Refused), f"refused: {good}")
    value = draw(st.integers(max_value=0))
    result = _check({**good, bad: value}, f"config.{bad}={value}")
    require(isinstance(result, Refused), f"accepted: {bad}={value}")
    return ERROR


def check_crop_scale(draw: Draw, folder: pathlib.Path) -> str:
    """Two shares of the area, the lower one first."""
    scale = draw(st.lists(_REAL, max_size=3))
    result = _check({"data.crop_scale": tuple(scale)}, "crop_scale")
    is_right = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
    require(isinstance(result, Refused) != is_right, f"{scale}: {result}")
    return SUCCESS if is_right else ERROR
