"""The pre-LayerNorm transformer block that both towers are built of.

Used by `vit.py` and `text.py` only. Layout and initialisation follow CLIP (Radford et al. 2021,
arXiv 2103.00020, and its released code) with exact GELU, as DiHT's official code has it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

# torch's LayerNorm default, which released CLIP weights were trained with.
LAYER_NORM_EPSILON = 1e-5


def uniform_init(bound: float) -> nnx.Initializer:
    """Initialiser drawing from U(-bound, bound)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init


def normal_init(stddev: float) -> nnx.Initializer:
    """Initialiser drawing from N(0, stddev^2)."""
    return nnx.initializers.normal(stddev)


def layer_norm(width: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
    """LayerNorm over the last axis; statistics in float32 whatever `dtype` is."""
    return nnx.LayerNorm(
        width,
        epsilon=LAYER_NORM_EPSILON,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class BlockInit:
    """Weight initialisers of one block.

    CLIP's code scales the text tower's weights with width and depth, and leaves the image
    tower's blocks at torch's defaults; both choices are kept.

    Attributes:
        attention_in, attention_out, mlp_in, mlp_out: initialisers of the four kernels.
    """

    def __init__(self, attention_in, attention_out, mlp_in, mlp_out):
        self.attention_in = attention_in
        self.attention_out = attention_out
        self.mlp_in = mlp_in
        self.mlp_out = mlp_out

    @classmethod
    def scaled_by_depth(cls, width: int, layers: int) -> BlockInit:
        """CLIP's text tower: N(0, s^2), residual branches smaller by sqrt(2 * layers)."""
        residual = width**-0.5 * (2 * layers) ** -0.5
        return cls(
            attention_in=normal_init(width**-0.5),
            attention_out=normal_init(residual),
            mlp_in=normal_init((2 * width) ** -0.5),
            mlp_out=normal_init(residual),
        )

    @classmethod
    def torch_default(cls, width: int) -> BlockInit:
        """CLIP's image tower: torch's defaults for attention (Xavier) and linear layers."""
        return cls(
            attention_in=uniform_init(math.sqrt(6 / (width + 3 * width))),
            attention_out=uniform_init(width**-0.5),
            mlp_in=uniform_init(width**-0.5),
            mlp_out=uniform_init((4 * width) ** -0.5),
        )


class Attention(nnx.Module):
    """Multi-head self-attention with one fused input projection, as torch's and CLIP's."""

    def __init__(
        self,
        width: int,
        heads: int,
        init: BlockInit,
        *,
        causal: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.causal = causal
        linear = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.in_proj = nnx.Linear(width, 3 * width, kernel_init=init.attention_in, **linear)
        self.out_proj = nnx.Linear(width, width, kernel_init=init.attention_out, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, width] -> [b, t, width]; softmax in float32."""
        b, t, width = x.shape
        qkv = self.in_proj(x).reshape(b, t, 3, self.heads, width // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        out = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(out.reshape(b, t, width))


class Mlp(nnx.Module):
    """Two linear layers, four times wider inside, exact GELU between."""

    def __init__(
        self,
        width: int,
        init: BlockInit,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        linear = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc_in = nnx.Linear(
            width,
            4 * width,
            kernel_init=init.mlp_in,
            bias_init=uniform_init(width**-0.5),
            **linear,
        )
        self.fc_out = nnx.Linear(
            4 * width,
            width,
            kernel_init=init.mlp_out,
            bias_init=uniform_init((4 * width) ** -0.5),
            **linear,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, width] -> [b, t, width]."""
        return self.fc_out(jax.nn.gelu(self.fc_in(x), approximate=False))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        init: BlockInit,
        *,
        causal: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = layer_norm(width, **dtypes)
        self.attention = Attention(width, heads, init, causal=causal, **dtypes)
        self.mlp_norm = layer_norm(width, **dtypes)
        self.mlp = Mlp(width, init, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, width] -> [b, t, width]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))
