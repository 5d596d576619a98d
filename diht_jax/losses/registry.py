"""The contrastive losses by name: `config.loss.kind` selects one of them."""

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
