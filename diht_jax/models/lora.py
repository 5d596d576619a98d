"""Low-rank adapters on the linear layers of the towers' blocks: LoRA (Hu et al. 2021, 2106.09685).

An adapted layer computes `x W + b + (alpha / rank) (x A) B` with A [in, rank] and B [rank, out]
next to its own W; B starts at 0, so that the model starts as it was. Once merged, `W + (alpha /
rank) A B` is an ordinary kernel, and nothing of the adapters is left.

Adapters are parameters of the layer, `vision/blocks/0/mlp/fc_in/lora_a` and `lora_b`. Where there
are any, they alone are trained of the model: `frozen_by_adapters`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

if TYPE_CHECKING:
    from diht_jax.models.dual_encoder import DualEncoder

A, B = "lora_a", "lora_b"
# The linear layers of a block, and the part of the block that each belongs to.
MATRICES = {"in_proj": "attention", "out_proj": "attention", "fc_in": "mlp", "fc_out": "mlp"}
_TOWERS = ("vision", "text")
_OF_THE_MODEL = (*(f"{tower}/" for tower in _TOWERS), "log_logit_scale")


@dataclasses.dataclass(frozen=True)
class Lora:
    """The layers that have adapters, and the size of these.

    Attributes:
        rank: of `A B`.
        alpha: what `A B` is multiplied with, times the rank.
        towers: "vision", "text" or both.
        matrices: of each block, keys of `MATRICES`; `in_proj` makes queries, keys and values.
    """

    rank: int
    alpha: float
    towers: tuple[str, ...]
    matrices: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor on `A B`."""
        return self.alpha / self.rank


def lora_of(section: ml_collections.ConfigDict) -> Lora | None:
    """The adapters that the section `lora` of a config describes; None for rank 0.

    Raises:
        ValueError: an unknown tower or matrix, or none.
    """
    if not section.rank:
        return None
    for key, known in (("towers", _TOWERS), ("matrices", tuple(MATRICES))):
        names = tuple(section[key])
        if not names or not set(names) <= set(known):
            raise ValueError(f"config.lora.{key}={names}: expected some of {', '.join(known)}")
    return Lora(section.rank, section.alpha, tuple(section.towers), tuple(section.matrices))


def add_adapters(model: DualEncoder, lora: Lora, key: jax.Array) -> None:
    """Puts adapters on the layers of a model, in place.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)), as in the authors' code, and B is 0. Each A follows
    from the key and the name of its layer, independently of other layers.

    Args:
        model: with blocks layer by layer, or stacked (for its structure; all then draw alike).
        lora: what to add.
        key: for A.
    """
    for tower in lora.towers:
        blocks = getattr(model, tower).blocks
        stacked = not isinstance(blocks, nnx.List)
        for number, block in enumerate([blocks] if stacked else blocks):
            for matrix in lora.matrices:
                name = f"{tower}/{number}/{matrix}"
                layer = getattr(getattr(block, MATRICES[matrix]), matrix)
                _add(layer, lora, jax.random.fold_in(key, zlib.crc32(name.encode())))


def _add(layer: nnx.Linear, lora: Lora, key: jax.Array) -> None:
    *stack, size_in, size_out = layer.kernel[...].shape
    dtype, bound = layer.param_dtype, size_in**-0.5
    shape = (*stack, size_in, lora.rank)
    adapted: Any = layer  # gets the attributes that `models.layers.Linear` looks for
    adapted.lora_a = nnx.Param(jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound))
    adapted.lora_b = nnx.Param(jnp.zeros((*stack, lora.rank, size_out), dtype))
    adapted.lora_scale = lora.scale


def merge_adapters(params: dict[str, Any], lora: Lora | None) -> dict[str, Any]:
    """The parameters of the model without adapters that computes the same.

    Args:
        params: nested dict, layer by layer.
        lora: as trained; None returns `params`.
    """
    if lora is None:
        return params

    def merge(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if A not in tree:
            return {name: merge(value) for name, value in tree.items()}
        kernel = tree["kernel"]
        a, b = (tree[name].astype(jnp.float32) for name in (A, B))
        change = lora.scale * jnp.matmul(a, b, precision="highest")
        merged = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
        return {**{k: v for k, v in tree.items() if k not in (A, B)}, "kernel": merged}

    return merge(params)


def frozen_by_adapters(names: Iterable[str]) -> set[str]:
    """Names of the parameters that adapters freeze; empty without adapters.

    All of the model but its adapters: what the objective adds to the model is trained.
    """
    names = list(names)
    if not any(map(_is_adapter, names)):
        return set()
    return {name for name in names if name.startswith(_OF_THE_MODEL) and not _is_adapter(name)}


def _is_adapter(name: str) -> bool:
    return name.rpartition("/")[2] in (A, B)
