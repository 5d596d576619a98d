"""NNX models and their parameters as plain nested dicts, which checkpoints and steps work on.

Used wherever a model meets jitted code: the training state and `diht_jax.inference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from diht_jax.models.dual_encoder import DualEncoder
from diht_jax.models.zoo import Architecture


def model_parameters(model: DualEncoder) -> dict[str, Any]:
    """The parameters of an NNX model as a nested dict with string keys."""
    return _string_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def model_definition(
    arch: Architecture, dtype: DTypeLike, param_dtype: DTypeLike
) -> tuple[nnx.GraphDef, Callable[[jax.Array], dict[str, Any]]]:
    """The static half of the model, and a function that draws its parameters from a key."""

    def build(key: jax.Array) -> DualEncoder:
        return DualEncoder(arch, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(params=key))

    abstract = nnx.eval_shape(lambda: build(jax.random.key(0)))
    graphdef, _ = nnx.split(abstract, nnx.Param)
    return graphdef, lambda key: model_parameters(build(key))


def merge_model(graphdef: nnx.GraphDef, params: dict[str, Any]) -> DualEncoder:
    """The NNX model with these parameters; the inverse of `model_parameters`."""
    return nnx.merge(graphdef, nnx.restore_int_paths(params))


def parameter_shapes(params: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path such as `text/blocks/0/mlp/fc_in/kernel` -> shape."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree
