"""The pre-LayerNorm transformer block of both towers, and the functions that build and run them.

Layout and initialisation follow CLIP (Radford et al. 2021, arXiv 2103.00020, and its released
code). The activation depends on the architecture: exact GELU in DiHT's official code, QuickGELU in
OpenAI's weights. The `dtypes` of a layer are its keyword arguments `dtype` (of the computation),
`param_dtype` (of the stored parameters) and `rngs`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from diht_jax.models.attention import (
    Rotary,
    Target,
    attend,
    attention_implementation,
    rotate,
)
from diht_jax.models.layers import (
    ACTIVATIONS,
    ATTENTION_OUT,
    QKV,
    Linear,
    apply_columns,
    checkpointed,
    product_and_bias,
)
from diht_jax.models.tpu_attention import attend_short

normal_init = nnx.initializers.normal  # of N(0, stddev^2)
Gather = Callable[[dict[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Execution:
    """Ways to compute a model that do not change its results.

    Attributes:
        scan_layers: stack the parameters of a tower's blocks and compile only one block.
        remat: rematerialisation policy, one of `layers.POLICIES`.
        attention: see `attention.attention_implementation`.
        target: devices that the model runs on; None is this process's default backend.
    """

    scan_layers: bool = False
    remat: str = "none"
    attention: str = "auto"
    target: Target | None = None


def uniform_init(bound: float) -> nnx.Initializer:
    """Returns an initialiser that draws from U(-bound, bound)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init


# Statistics are float32 for every dtype. `use_fast_variance` (the mean of squares minus the square
# of the mean) needs one pass instead of two; its relative error is 1e-7 (mean / deviation)^2.
layer_norm = functools.partial(nnx.LayerNorm, use_fast_variance=False)


class BlockInit(NamedTuple):
    """Initialisers of the four kernels of one block.

    As in CLIP's code, the text tower's weights are scaled by width and depth, and the image tower's
    blocks have torch's defaults.
    """

    attention_in: nnx.Initializer
    attention_out: nnx.Initializer
    mlp_in: nnx.Initializer
    mlp_out: nnx.Initializer

    @classmethod
    def scaled_by_depth(cls, width: int, layers: int) -> BlockInit:
        """CLIP's text tower: N(0, s^2), with residual branches scaled by 1 / sqrt(2 * layers)."""
        residual = width**-0.5 * (2 * layers) ** -0.5
        return cls(
            attention_in=normal_init(width**-0.5),
            attention_out=normal_init(residual),
            mlp_in=normal_init((2 * width) ** -0.5),
            mlp_out=normal_init(residual),
        )

    @classmethod
    def torch_default(cls, width: int, mlp_width: int) -> BlockInit:
        """CLIP's image tower: torch's defaults for attention (Xavier) and linear layers."""
        return cls(
            attention_in=uniform_init(math.sqrt(6 / (width + 3 * width))),
            attention_out=uniform_init(width**-0.5),
            mlp_in=uniform_init(width**-0.5),
            mlp_out=uniform_init(mlp_width**-0.5),
        )


class Attention(nnx.Module):
    """Multi-head self-attention with one fused input projection, like that of torch and CLIP."""

    def __init__(
        self,
        width: int,
        heads: int,
        init: BlockInit,
        *,
        causal: bool,
        implementation: str,
        **dtypes: Any,
    ):
        self.heads = heads
        self.causal = causal
        self.implementation = implementation
        self.in_proj = Linear(width, 3 * width, kernel_init=init.attention_in, **dtypes)
        self.out_proj = Linear(width, width, kernel_init=init.attention_out, **dtypes)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None = None,
        rotary: Rotary | None = None,
    ) -> jax.Array:
        """[b, t, width] -> [b, t, width]; softmax in float32. For the arguments see `Block`."""
        if positions is not None:
            return self._at(x, positions)
        b, t, width = x.shape
        head_dim = width // self.heads
        if self.implementation == "pallas" and in_shard_map() and rotary is None:
            qkv, bias = product_and_bias(self.in_proj, x)
            out = attend_short(
                checkpoint_name(qkv, QKV), bias, num_heads=self.heads, causal=self.causal
            )
            return checkpoint_name(self.out_proj(out), ATTENTION_OUT)
        qkv = checkpoint_name(self.in_proj(x), QKV).reshape(b, t, 3, self.heads, head_dim)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        kernel = self.implementation
        if kernel == "pallas" and not in_shard_map():
            kernel = "xla"
        out = attend(q, k, v, causal=self.causal, implementation=kernel)
        return checkpoint_name(self.out_proj(out.reshape(b, t, width)), ATTENTION_OUT)

    def _at(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """[b, t, width] -> [b, 1, width]: attention of one token of each row to all tokens."""
        b, t, width = x.shape
        q = apply_columns(self.in_proj, pick_tokens(x, positions), slice(0, width))
        kv = checkpoint_name(apply_columns(self.in_proj, x, slice(width, None)), QKV)
        q = checkpoint_name(q, QKV).reshape(b, 1, self.heads, -1)
        kv = kv.reshape(b, t, 2, self.heads, -1)
        mask = None
        if self.causal:
            mask = (jnp.arange(t) <= positions[:, None])[:, None, None, :]
        out = jax.nn.dot_product_attention(q, kv[:, :, 0], kv[:, :, 1], mask=mask)
        return checkpoint_name(self.out_proj(out.reshape(b, 1, width)), ATTENTION_OUT)


class Mlp(nnx.Module):
    """Two linear layers with an activation in between."""

    def __init__(
        self,
        width: int,
        inner_width: int,
        init: BlockInit,
        *,
        activation: str,
        **dtypes: Any,
    ):
        self.activation = ACTIVATIONS[activation]
        self.fc_in = Linear(
            width,
            inner_width,
            kernel_init=init.mlp_in,
            bias_init=uniform_init(width**-0.5),
            **dtypes,
        )
        self.fc_out = Linear(
            inner_width,
            width,
            kernel_init=init.mlp_out,
            bias_init=uniform_init(inner_width**-0.5),
            **dtypes,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, width] -> [b, t, width]."""
        return self.fc_out(self.activation(self.fc_in(x)))


class Block(nnx.Module):
    """Transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    With `for_tpu`, LayerNorm needs one pass and gradients of biases are summed in float32.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        init: BlockInit,
        *,
        causal: bool,
        activation: str,
        epsilon: float,
        attention: str = "xla",
        for_tpu: bool = False,
        **dtypes: Any,
    ):
        norm = {"epsilon": epsilon, "use_fast_variance": for_tpu, **dtypes}
        self.attention_norm = layer_norm(width, **norm)
        self.attention = Attention(
            width, heads, init, causal=causal, implementation=attention, **dtypes
        )
        self.mlp_norm = layer_norm(width, **norm)
        self.mlp = Mlp(width, mlp_width, init, activation=activation, **dtypes)
        linear = (self.attention.in_proj, self.attention.out_proj, self.mlp.fc_in, self.mlp.fc_out)
        for layer in linear if for_tpu else ():
            layer.float32_bias_gradient = True

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None = None,
        rotary: Rotary | None = None,
    ) -> jax.Array:
        """Runs the block.

        Args:
            x: [b, t, width].
            positions: int32 [b], the one token of each row to compute; all tokens by default.
            rotary: rotary positions of queries and keys; not together with `positions`.

        Returns:
            [b, t, width], or [b, 1, width] of the tokens at `positions`.
        """
        attended = self.attention(self.attention_norm(x), positions, rotary)
        x = (x if positions is None else pick_tokens(x, positions)) + attended
        return x + self.mlp(self.mlp_norm(x))


def in_shard_map() -> bool:
    """Returns true inside `shard_map`; outside, a Pallas kernel cannot be split over devices."""
    return jax.sharding.get_abstract_mesh().are_all_axes_manual


def pick_tokens(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Selects one token of each row, [b, t, width] and int32 [b] -> [b, 1, width]."""
    return jnp.take_along_axis(x, positions[:, None, None], axis=1)


def make_blocks(
    execution: Execution,
    layers: int,
    width: int,
    heads: int,
    *,
    num_tokens: int | None,
    **settings: Any,
) -> nnx.List | Block:
    """Builds the blocks of a tower for `run_blocks`; `settings` are further arguments of `Block`.

    With `execution.scan_layers` the result is one block, with the parameters of all layers stacked
    along a new first axis. If `num_tokens` is None, the TPU kernel is not used.
    """
    attention = attention_implementation(
        execution.attention,
        settings["dtype"],
        width // heads,
        execution.target,
        num_tokens=num_tokens,
        num_heads=heads,
    )
    for_tpu = execution.target is not None and execution.target.platform == "tpu"
    settings = {"attention": attention, "for_tpu": for_tpu, **settings}
    blocks = [Block(width, heads, **settings) for _ in range(layers)]
    if not execution.scan_layers:
        return nnx.List(blocks)
    graphdef = nnx.split(blocks[0], nnx.Param)[0]
    states = [nnx.state(block, nnx.Param) for block in blocks]
    return nnx.merge(graphdef, jax.tree.map(lambda *layers: jnp.stack(layers), *states))


def run_blocks(
    blocks: nnx.List | Block,
    x: jax.Array,
    *,
    pooled: jax.Array | None = None,
    rotary: Rotary | None = None,
    remat: str = "none",
    gather: Gather | None = None,
) -> jax.Array:
    """Runs the blocks of a tower.

    Args:
        blocks: from `make_blocks`: a list of layers, which is unrolled, or one block with stacked
            parameters, which is run by `jax.lax.scan`.
        x: [b, t, width].
        pooled: int32 [b], the one token of each row to return. If the layers are unrolled, the last
            block computes only this token, which saves 7% of the work of 12 layers.
        rotary: see `Block`; not together with `pooled`.
        remat: rematerialisation policy, one of `layers.POLICIES`.
        gather: all-gathers a block's sharded parameters (a nested dict) before use. The backward
            pass calls it again, so at most one layer is unsharded at a time.

    Returns:
        [b, t, width], or [b, width] of the pooled tokens.
    """
    scanned = isinstance(blocks, Block)

    def apply(
        graphdef: nnx.GraphDef,
        params: dict[str, Any],
        x: jax.Array,
        positions: jax.Array | None,
        rotary: Rotary | None,
    ) -> jax.Array:
        block = nnx.merge(graphdef, gather(params) if gather else params)
        return block(x, positions, rotary)

    def layer(block: Block):
        graphdef, params = nnx.split(block, nnx.Param)
        run = functools.partial(apply, graphdef)
        if remat != "none" or scanned or gather:
            run = checkpointed(run, remat, scanned=scanned)
        return run, nnx.to_pure_dict(params)

    if scanned:
        run, stacked = layer(blocks)
        x = jax.lax.scan(lambda x, p: (run(p, x, None, rotary), None), x, stacked)[0]
        return x if pooled is None else pick_tokens(x, pooled)[:, 0]
    for i, block in enumerate(blocks):
        run, params = layer(block)
        x = run(params, x, pooled if i == len(blocks) - 1 else None, rotary)
    return x if pooled is None else x[:, 0]
