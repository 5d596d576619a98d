"""The fields of an architecture that users may name, in a config or on a command line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from diht_jax.config.checks import nearest_name

# Fields of models.zoo.Architecture and their types.
ARCHITECTURE_FIELDS = {
    "image_size": int,
    "patch_size": int,
    "vision_layers": int,
    "vision_width": int,
    "vision_heads": int,
    "text_layers": int,
    "text_width": int,
    "text_heads": int,
    "embed_dim": int,
    "context_length": int,
    "vocab_size": int,
    "activation": str,
    "layer_norm_epsilon": float,
    "vision_mlp_width": int,
    "text_mlp_width": int,
    "end_of_text_id": int,
    "text_activation": str,
    "class_token": bool,
    "vision_pool_heads": int,
    "rotary_grid": int,
    "vision_projection": str,
    "text_projection": str,
    "causal_text": bool,
    "text_pool": str,
}
_BOOLEANS = {"true": True, "false": False}
_FIELD_NAMES = ", ".join(ARCHITECTURE_FIELDS)


def parse_fields(settings: Iterable[str]) -> dict[str, Any]:
    """Fields of an architecture, as a command line gives them.

    Returns:
        Names and values, of the types of `ARCHITECTURE_FIELDS`.
    """
    fields = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if equals and name and name not in ARCHITECTURE_FIELDS:
            nearest = nearest_name(name[:200], ARCHITECTURE_FIELDS)
            hint = f"did you mean '{nearest}'?" if nearest else f"known: {_FIELD_NAMES}"
            raise ValueError(f"--architecture {setting[:200]}: no field '{name[:200]}'; {hint}")
        kind = ARCHITECTURE_FIELDS.get(name, str)
        try:
            value = _BOOLEANS[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            equals = ""
        if not name or not equals or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(
                f"--architecture: expected a pair like activation=quick_gelu, got '{setting[:200]}'"
            )
        fields[name] = value
    return fields
