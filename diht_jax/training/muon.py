"""Muon: the momentum of a matrix, made orthogonal, is its update.

For the matrices of the towers' blocks; what else a model has goes the way of AdamW. The four
matrices of a block are the joined queries, keys and values, which count as three, the output of the
attention, and the two of the MLP. Each one is made orthogonal for itself: parameters are stored
layer by layer, so no axis of layers is ever taken for one of a matrix.

optax has Muon too (`optax.contrib.muon`), leaf by leaf. Here matrices of one kind are stacked, so
that a model of 36 layers compiles 8 chains of products and not 144, and a device that holds a slice
of every layer gets a few whole layers instead (one exchange along `fsdp`, and one back): products
of whole matrices need no sums over devices, and give the same numbers on any mesh.

Source: K. Jordan et al., https://kellerjordan.github.io/posts/muon; size of the update: Liu et al.,
arXiv 2502.16982.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from diht_jax import sharding
from diht_jax.sharding import path_name

# The quintic a x + (b A + c A A) x with A = x x^T brings singular values near 1 in five rounds.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5

_MATRIX = re.compile(r"^(\w+/blocks/)\d+(/.*(in_proj|[qkv]_proj|out_proj|fc_in|fc_out)/kernel)$")
_FSDP = "fsdp"


def is_block_matrix(name: str) -> bool:
    """Returns whether the parameter of this path is one of the matrices that Muon is for."""
    return _MATRIX.search(name) is not None


def scale_by_muon(
    momentum: float, rms: float, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Orthogonal updates from Nesterov's momentum, all of one root mean square.

    Args:
        momentum: factor on what was summed before.
        rms: of an update's elements, if its singular values were all 1; 0.2 is about that of
            AdamW's updates, whose learning rate and weight decay can then be kept.
        mesh: the devices, if the gradients are split by the partition rules; None for one device.
    """

    def update(updates, state, params=None):
        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        if not leaves:  # all of them are frozen
            return updates, state
        named = {path_name(path): leaf for path, leaf in leaves}
        orthogonal = _orthogonalize_all(named, rms, mesh)
        return structure.unflatten([orthogonal[name] for name in named]), state

    orthogonalize = optax.GradientTransformation(optax.init_empty_state, update)
    return optax.chain(optax.trace(momentum, nesterov=True), orthogonalize)


def orthogonalize(matrices: Float[Array, "*layers m n"]) -> Float[Array, "*layers m n"]:
    """Matrices with their singular values brought near 1; zeros stay zeros.

    Products have the default precision of the device, as fast as it can: the rounds forgive it.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = jnp.swapaxes(matrices, -1, -2) if is_tall else matrices
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-8)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -1, -2) if is_tall else x


def _orthogonalize_all(
    named: dict[str, jax.Array], rms: float, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """The updates by the names of their parameters: all layers of a kind at once."""
    kinds: dict[str, list[str]] = {}
    for name in named:
        kinds.setdefault(_MATRIX.sub(r"\1*\2", name), []).append(name)
    updates = {}
    for kind, names in kinds.items():
        layers = jnp.stack([named[name] for name in names])
        if mesh is None or mesh.shape[_FSDP] == 1:
            layers = _update_of_layers(kind, layers, rms)
        else:
            split = sharding.partition_spec(kind, layers.shape[1:], mesh)
            missing = -len(names) % mesh.shape[_FSDP]
            layers = jnp.pad(layers, [(0, missing), (0, 0), (0, 0)])
            # From a slice of every layer to a few whole layers on each device, and back.
            for spec in (PartitionSpec(None, *split), PartitionSpec(_FSDP)):
                layers = jax.lax.with_sharding_constraint(layers, NamedSharding(mesh, spec))
            layers = _update_of_layers(kind, layers, rms)
            for spec in (PartitionSpec(_FSDP), PartitionSpec(None, *split)):
                layers = jax.lax.with_sharding_constraint(layers, NamedSharding(mesh, spec))
        updates |= {name: layers[i] for i, name in enumerate(names)}
    return updates


def _update_of_layers(
    kind: str, layers: Float[Array, "layers m n"], rms: float
) -> Float[Array, "layers m n"]:
    """Orthogonal and scaled updates of the matrices of one kind."""
    dtype, shape = layers.dtype, layers.shape
    x = layers.astype(jnp.promote_types(dtype, jnp.float32))
    if "/in_proj/" in kind:  # [m, 3 n]: queries, keys and values side by side
        x = jnp.moveaxis(x.reshape(*shape[:2], 3, shape[2] // 3), 2, 1)
    x = rms * max(x.shape[-2:]) ** 0.5 * orthogonalize(x)
    if "/in_proj/" in kind:
        x = jnp.moveaxis(x, 1, 2).reshape(shape)
    return x.astype(dtype)
