"""Parameters of NNX models as nested dicts: layout, resized positions and low-rank adapters.

Parameters are stored layer by layer (`vision/blocks/0/mlp/fc_in/kernel`), even if the model scans
its layers: names, optimiser rules and checkpoints do not depend on scanning. A model that scans
needs the blocks of a tower stacked along a new first axis (`vision/blocks/mlp/fc_in/kernel`);
`stack_blocks` stacks them at the beginning of a step.

`fit_positions` adapts learned positions to another image size or text length than the model was
trained with.

Low-rank adapters on the linear layers of the blocks are LoRA (docs/guides/train/finetuning.md).
They are parameters of the layer, `vision/blocks/0/mlp/fc_in/lora_a` [in, rank] and `lora_b`
[rank, out]. If a model has adapters, its other parameters are frozen (`frozen_by_adapters`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx, traverse_util
from jax.typing import DTypeLike

from diht_jax.models.dual_encoder import DualEncoder
from diht_jax.models.transformer import Execution
from diht_jax.models.zoo import Architecture

TOWERS = ("vision", "text")
# Stretching of the text tower's positions, with Long-CLIP's values.
_KEPT_POSITIONS = 20
_STRETCHING_FACTOR = 4
A, B = "lora_a", "lora_b"  # names of the parameters of an adapter
_ADAPTER = re.compile(rf"(^|/)({A}|{B})$")
# The linear layers of a block, and the part of the block that each belongs to.
MATRICES = {"in_proj": "attention", "out_proj": "attention", "fc_in": "mlp", "fc_out": "mlp"}
_OF_THE_MODEL = (*(f"{tower}/" for tower in TOWERS), "log_logit_scale")


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """The definition of a model, without its parameters."""

    arch: Architecture
    dtype: DTypeLike  # of the computation
    param_dtype: DTypeLike  # of the stored parameters
    execution: Execution = Execution()
    lora: Lora | None = None  # the adapters on its layers

    def init_params(self, key: jax.Array) -> dict[str, Any]:
        """Draws the parameters, layer by layer; the same under every `execution`."""
        return model_parameters(self.build(key, Execution()))

    def build(self, key: jax.Array, execution: Execution) -> DualEncoder:
        """Builds the NNX model with parameters drawn from a key."""
        model = DualEncoder(
            self.arch,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            execution=execution,
            rngs=ParameterKeys(key),
        )
        if self.lora is not None:
            add_adapters(model, self.lora, key)
        return model


class _KeyStream(nnx.RngStream):
    """`nnx.RngStream` with the same keys, counted in Python rather than in the traced program.

    Flax asks each traced count for its sharding. JAX answers with an error, and formatting its
    message, which lists the program so far, takes four fifths of the time to build a ViT-L/14.
    """

    _drawn = 0

    def __call__(self) -> jax.Array:
        self._drawn += 1
        return jax.random.fold_in(self.key[...], self._drawn - 1)


class ParameterKeys(nnx.Rngs):
    """Like `nnx.Rngs(params=key)`, with the same keys, but faster to trace for large models."""

    params: nnx.RngStream

    def __init__(self, key: jax.Array | int):
        super().__init__()
        self.params = _KeyStream(key, tag="params")


@functools.lru_cache(maxsize=16)
def _make_graphdef(definition: ModelDefinition) -> nnx.GraphDef:
    """Returns the static half of the NNX model; cached, because it requires building the model."""
    build = functools.partial(definition.build, jax.random.key(0), definition.execution)
    abstract = nnx.eval_shape(build)
    return nnx.split(abstract, nnx.Param)[0]


def model_parameters(model: nnx.Module) -> dict[str, Any]:
    """Returns the parameters of an NNX model as a nested dict with string keys."""
    leaves = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    named = {tuple(map(str, path)): leaf for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(named)


def merge_model(definition: ModelDefinition, params: dict[str, Any]) -> DualEncoder:
    """Returns the NNX model with the given parameters, whose blocks may be stacked for a scan.

    Entries that are not parameters of the model, such as those of the objective, are ignored.
    """
    params = {name: params[name] for name in (*TOWERS, "log_logit_scale")}
    if definition.execution.scan_layers:
        params = stack_blocks(params)
    return nnx.merge(_make_graphdef(definition), nnx.restore_int_paths(params))


def stack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Stacks the blocks of each tower; blocks that are already stacked are returned unchanged.

    The leaves of `params[tower]["blocks"][str(i)]` become leaves [layers, ...] one level above.
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
    """Returns the shape of each parameter by its path, such as `text/blocks/0/mlp/fc_in/kernel`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def fit_model(
    params: dict[str, Any],
    arch: Architecture,
    *,
    image_size: int | None = None,
    context_length: int | None = None,
) -> tuple[dict[str, Any], Architecture]:
    """Fits a model to another image size or context length; None leaves that size unchanged."""
    fitted = dataclasses.replace(
        arch,
        image_size=arch.image_size if image_size is None else image_size,
        context_length=arch.context_length if context_length is None else context_length,
    )
    if fitted == arch:
        return params, arch
    return fit_positions(params, fitted.num_patches, fitted.context_length), fitted


def fit_positions(params: dict[str, Any], num_patches: int, context_length: int) -> dict[str, Any]:
    """Fits the positions of both towers to another number of patches and another context length.

    See `resize_positions` and `stretch_positions`.
    """
    vision, text = params["vision"], params["text"]
    of_images = resize_positions(
        vision["positional_embedding"], num_patches, class_token="class_embedding" in vision
    )
    of_texts = stretch_positions(text["positional_embedding"], context_length)
    return {
        **params,
        "vision": {**vision, "positional_embedding": of_images},
        "text": {**text, "positional_embedding": of_texts},
    }


def resize_positions(
    embedding: jax.Array, num_patches: int, *, class_token: bool = True
) -> jax.Array:
    """Resizes the grid part of a ViT's position embeddings; the class token's is unchanged.

    The interpolation on the square grid is bicubic with antialiasing, like that of open_clip for a
    checkpoint of another image size.

    Args:
        embedding: [1 + g * g, width], class token first.
        num_patches: of the new grid, a square number.
        class_token: if False, there is none and `embedding` is [g * g, width].

    Returns:
        [1 + num_patches, width], or [num_patches, width]; same dtype.
    """
    old_side = math.isqrt(embedding.shape[0] - class_token)
    new_side = math.isqrt(num_patches)
    if old_side == new_side:
        return embedding
    width = embedding.shape[1]
    first = int(class_token)
    grid = embedding[first:].reshape(old_side, old_side, width).astype(jnp.float32)
    grid = jax.image.resize(grid, (new_side, new_side, width), method="cubic", antialias=True)
    grid = grid.reshape(num_patches, width).astype(embedding.dtype)
    return jnp.concatenate([embedding[:first], grid])


def stretch_positions(embedding: jax.Array, context_length: int) -> jax.Array:
    """Stretches or truncates the text tower's position embeddings to another context length.

    Long-CLIP's rule (arXiv 2403.15378, "Knowledge-Preserved Stretching"): most texts are shorter
    than 20 tokens, so the first 20 positions are well trained and are kept. The others are
    interpolated linearly with a factor of 4, and extrapolated at the end: 77 positions become 248.
    Longer contexts have a larger factor. Shorter ones are a prefix of the stretched positions, or
    of the original ones if these suffice.

    Args:
        embedding: [t, width].
        context_length: of the new texts, in tokens.

    Returns:
        [context_length, width], same dtype.

    Raises:
        ValueError: there are too few positions to stretch them.
    """
    known = embedding.shape[0]
    if context_length <= known:
        return embedding[:context_length]
    if known < _KEPT_POSITIONS + 2:
        raise ValueError(
            f"position embeddings of {known} tokens cannot be stretched to {context_length}: the "
            f"first {_KEPT_POSITIONS} stay, and two behind them are needed"
        )
    factor = max(_STRETCHING_FACTOR, (context_length - _KEPT_POSITIONS) / (known - _KEPT_POSITIONS))
    source = _KEPT_POSITIONS + np.arange(context_length - _KEPT_POSITIONS) / factor
    before = np.minimum(source.astype(int), known - 2)
    share = jnp.asarray((source - before)[:, None], jnp.float32)
    table = embedding.astype(jnp.float32)
    stretched = (1 - share) * table[before] + share * table[before + 1]
    return jnp.concatenate([embedding[:_KEPT_POSITIONS], stretched.astype(embedding.dtype)])


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters: their size, and the layers that have them."""

    rank: int  # of `A B`
    alpha: float  # `A B` is multiplied by alpha / rank
    towers: tuple[str, ...]
    matrices: tuple[str, ...]  # of each block; `in_proj` makes queries, keys and values

    @property
    def scale(self) -> float:
        """The factor of `A B`, alpha / rank."""
        return self.alpha / self.rank


def lora_of(section: ml_collections.ConfigDict) -> Lora | None:
    """Returns the adapters that the config section `lora` describes, or None for rank 0.

    Raises:
        ValueError: a tower or matrix is unknown, or none is given.
    """
    if not section.rank:
        return None
    for key, known in (("towers", TOWERS), ("matrices", tuple(MATRICES))):
        names = tuple(section[key])
        if not names or not set(names) <= set(known):
            raise ValueError(f"config.lora.{key}={names}: expected some of {', '.join(known)}")
    return Lora(section.rank, section.alpha, tuple(section.towers), tuple(section.matrices))


def add_adapters(model: DualEncoder, lora: Lora, key: jax.Array) -> None:
    """Adds adapters to the layers of a model, in place.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)), as in the authors' code, and B is 0. Each A depends
    only on the key and the name of its layer. Stacked blocks share one draw; they are only used
    for the structure of a model.
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


def merge_adapters(params: dict[str, Any], lora: Lora) -> dict[str, Any]:
    """Returns the parameters, layer by layer, with the adapters merged into the kernels."""

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
    """Returns the names of the parameters that are frozen if there are adapters, else none.

    These are all parameters of the model but its adapters. Parameters of the objective are trained.
    """
    names = set(names)
    adapters = set(filter(_ADAPTER.search, names))
    if not adapters:
        return set()
    return {name for name in names - adapters if name.startswith(_OF_THE_MODEL)}
