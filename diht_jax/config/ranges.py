"""The range of every number in a training config, checked before anything else is done.

Keys of losses and of terms of the objective are checked by their own files as well; a new one needs
no entry here. What depends on the machine, the data or other keys is checked where it is used.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_collections

from diht_jax.config import ARCHITECTURE_FIELDS


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    Attributes:
        low: the least.
        high: the greatest; None leaves it open, but for infinity.
        excludes_low: `low` itself is outside.
        excludes_high: `high` itself is outside.
        also: a value outside of the range that is right all the same.
    """

    low: float
    high: float | None = None
    excludes_low: bool = False
    excludes_high: bool = False
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        if value == self.also:
            return True
        above = value > self.low if self.excludes_low else value >= self.low
        high = math.inf if self.high is None else self.high
        below = value < high if self.excludes_high or self.high is None else value <= high
        return above and below

    def __str__(self) -> str:
        text = f"more than {self.low}" if self.excludes_low else f"at least {self.low}"
        if self.high is not None and self.high < math.inf:
            text += (" and less than " if self.excludes_high else ", at most ") + str(self.high)
        return text if self.also is None else f"{self.also}, or {text}"


_COUNT = Range(1)
_NOT_NEGATIVE = Range(0)
_POSITIVE = Range(0, excludes_low=True)
_SHARE = Range(0, 1, excludes_high=True)
_DURATIONS = {
    f"{prefix}_{unit}": _POSITIVE if unit == "epochs" else _COUNT
    for prefix in ("total", "no_patch_dropout")
    for unit in ("steps", "examples", "epochs")
}

RANGES = {
    "seed": Range(0, 2**32, excludes_high=True),
    **_DURATIONS,
    "micro_batch": _COUNT,
    "model.patch_dropout": _SHARE,
    "model.texts_per_row": _COUNT,
    **{
        f"model.overrides.{field}": _COUNT
        for field, kind in ARCHITECTURE_FIELDS.items()
        if kind is int
    },
    "model.overrides.end_of_text_id": _NOT_NEGATIVE,
    "model.overrides.layer_norm_epsilon": _NOT_NEGATIVE,
    "lora.rank": _NOT_NEGATIVE,
    "lora.alpha": _POSITIVE,
    "loss.weight": _NOT_NEGATIVE,
    "loss.alpha": Range(0, 1),
    "loss.beta": _NOT_NEGATIVE,
    "loss.noise_share": Range(0, 0.5),
    "concepts.object_weight": _NOT_NEGATIVE,
    "concepts.attribute_weight": _NOT_NEGATIVE,
    "concepts.num_objects": _COUNT,
    "concepts.num_attributes": _COUNT,
    "concepts.top_k": _COUNT,
    "concepts.learning_rate_multiplier": _NOT_NEGATIVE,
    "concepts.weight_decay_multiplier": _NOT_NEGATIVE,
    "concepts.chunk_rows": _COUNT,
    "optimizer.learning_rate": _NOT_NEGATIVE,
    "optimizer.warmup_steps": _NOT_NEGATIVE,
    "optimizer.decay_steps": _COUNT,
    "optimizer.final_learning_rate": _NOT_NEGATIVE,
    "optimizer.b1": _SHARE,
    "optimizer.b2": _SHARE,
    "optimizer.eps": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_global_norm": Range(0, math.inf, excludes_low=True),
    "optimizer.max_logit_scale": Range(0, math.inf, excludes_low=True),
    "optimizer.layer_decay": Range(0, 1, excludes_low=True),
    "optimizer.muon.momentum": _SHARE,
    "optimizer.muon.rms": _POSITIVE,
    "ema.decay": _SHARE,
    "mesh.data": Range(1, also=-1),
    "mesh.fsdp": Range(1, also=-1),
    "data.batch_size": _COUNT,
    "data.num_workers": _NOT_NEGATIVE,
    "data.prefetch_batches": _COUNT,
    "data.block_records": _COUNT,
    "data.num_streams": _COUNT,
    "data.window_blocks": _COUNT,
    "data.max_in_flight_gib": _POSITIVE,
    "data.read_ahead_gib": _POSITIVE,
    "data.read_threads": _COUNT,
    "data.read_timeout_secs": _POSITIVE,
    "compilation_cache_max_gib": Range(0, math.inf, excludes_low=True),
    "log_every_steps": _COUNT,
    "max_skipped_steps": _COUNT,
    "profile.start_step": _COUNT,
    "profile.stop_step": _COUNT,
    "checkpoint.every_steps": _COUNT,
    "checkpoint.keep_last": _COUNT,
    "evaluation.every_steps": _NOT_NEGATIVE,  # 0 as None: at the end only
    "evaluation.batch_size": _COUNT,
}
_CROP_SCALE = Range(0, 1, excludes_low=True)


def check_ranges(config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict) -> None:
    """Checks every number of a training config against `RANGES`.

    Args:
        config: of names and types that `validate_config` has checked.
        defaults: None is right for those numbers alone whose default it is.

    Raises:
        ValueError: names the first key whose value is outside of its range, and the range.
    """
    for name, allowed in RANGES.items():
        value = _value_of(config, name)
        if value is None and _value_of(defaults, name) is None:
            continue
        if value is None or value not in allowed:
            finite = "a finite number, " if value == math.inf else ""
            raise ValueError(f"config.{name}={value}: expected {finite}{allowed}")
    scale = config.data.crop_scale
    if len(scale) != 2 or not scale[0] <= scale[1] or any(x not in _CROP_SCALE for x in scale):
        raise ValueError(
            f"config.data.crop_scale={tuple(scale)}: expected two numbers, the lower first, each "
            f"{_CROP_SCALE}"
        )


def _value_of(config: ml_collections.ConfigDict, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value.get(part)
        if value is None:
            return None
    return value
