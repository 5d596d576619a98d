"""Registry of the contrastive losses; `config.loss.kind` selects one by name."""

from __future__ import annotations

from diht_jax.losses.fastclip import FastClip
from diht_jax.losses.objective import Objective
from diht_jax.losses.sigmoid import Sigmoid
from diht_jax.losses.softmax import Softmax

LOSSES: dict[str, type[Objective]] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "fastclip": FastClip,
}
