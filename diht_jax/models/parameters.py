"""NNX models and their parameters as plain nested dicts, which checkpoints and steps work on.

Parameters are stored layer by layer (`vision/blocks/0/mlp/fc_in/kernel`), also where the model
scans its layers: names, optimiser rules and checkpoints know nothing of scanned layers. A model
that scans takes the blocks of a tower stacked along a new first axis
(`vision/blocks/mlp/fc_in/kernel`); `stack_blocks` makes that form when a step begins.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from diht_jax.models.dual_encoder import DualEncoder
from diht_jax.models.lora import Lora, add_adapters
from diht_jax.models.transformer import Execution
from diht_jax.models.zoo import Architecture

TOWERS = ("vision", "text")


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """All of a model but its parameters.

    Attributes:
        arch: sizes.
        dtype: of the computation.
        param_dtype: of the stored parameters.
        execution: how to compute.
        lora: the adapters on its layers, or None.
    """

    arch: Architecture
    dtype: DTypeLike
    param_dtype: DTypeLike
    execution: Execution = Execution()
    lora: Lora | None = None

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The static half of the NNX model."""
        return _make_graphdef(self)

    def init_params(self, key: jax.Array) -> dict[str, Any]:
        """Draws the parameters, layer by layer; the same under every `execution`."""
        return model_parameters(self.build(key, Execution()))

    def build(self, key: jax.Array, execution: Execution) -> DualEncoder:
        """The NNX model with parameters drawn from a key."""
        model = DualEncoder(
            self.arch,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            execution=execution,
            rngs=nnx.Rngs(params=key),
        )
        if self.lora is not None:
            add_adapters(model, self.lora, key)
        return model


@functools.lru_cache(maxsize=16)
def _make_graphdef(definition: ModelDefinition) -> nnx.GraphDef:
    """Kept, as it takes the time of building the model."""
    abstract = nnx.eval_shape(lambda: definition.build(jax.random.key(0), definition.execution))
    return nnx.split(abstract, nnx.Param)[0]


def model_definition(
    arch: Architecture,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    execution: Execution | None = None,
    lora: Lora | None = None,
) -> tuple[ModelDefinition, Callable[[jax.Array], dict[str, Any]]]:
    """All of a model but its parameters, and a function that draws these from a key."""
    definition = ModelDefinition(arch, dtype, param_dtype, execution or Execution(), lora)
    return definition, definition.init_params


def model_parameters(model: nnx.Module) -> dict[str, Any]:
    """The parameters of an NNX model as a nested dict with string keys."""
    return _string_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def merge_model(definition: ModelDefinition, params: dict[str, Any]) -> DualEncoder:
    """The NNX model with these parameters, which may be stacked if the model scans its layers.

    Arrays that are no parameters of the model, such as those of the objective, are left out.
    """
    params = {name: params[name] for name in (*TOWERS, "log_logit_scale")}
    if definition.execution.scan_layers:
        params = stack_blocks(params)
    return nnx.merge(definition.graphdef, nnx.restore_int_paths(params))


def stack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the blocks of each tower stacked; stacked ones stay as they are.

    Args:
        params: nested dict; layer `i` of a tower at `params[tower]["blocks"][str(i)]`.

    Returns:
        The same with leaves [layers, ...] at `params[tower]["blocks"]`.
    """
    stacked = dict(params)
    for tower in TOWERS:
        blocks = params[tower]["blocks"]
        if "0" in blocks:
            layers = [blocks[str(i)] for i in range(len(blocks))]
            stacked[tower] = {
                **params[tower],
                "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
            }
    return stacked


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
