"""The contrastive losses by name: `config.loss.kind` selects one of them."""

from __future__ import annotations

import copy
from typing import Any

from diht_jax.losses.fastclip import FastClip
from diht_jax.losses.objective import Objective
from diht_jax.losses.sigmoid import Sigmoid
from diht_jax.losses.softmax import Softmax

LOSSES: dict[str, type[Objective]] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "fastclip": FastClip,
}


def default_settings() -> dict[str, Any]:
    """The keys of `config.loss` that belong to losses, each a default or a `Key` with its range.

    A loss ignores those of the others.
    """
    found: dict[str, Any] = {}
    for kind, loss in LOSSES.items():
        for key, value in loss.settings.items():
            assert found.setdefault(key, value) == value, f"{kind}: another default of {key}"
    return copy.deepcopy(found)
