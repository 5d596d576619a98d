"""Attention over short sequences on TPUs, as two Pallas kernels: forward and backward.

A step of XLA's attention on a TPU is bound by memory traffic, most of it the attention weights.
Here a grid step holds all heads of one example in on-chip memory (VMEM), read in the layout that
the projection leaves, so that neither weights nor transposed nor padded tokens reach main memory.
The backward pass computes the weights again; nothing but the kernel's inputs is kept. The bias of
the projection is added inside, because what is kept for the backward pass (`remat`) is the
product without it: added outside, it would be a second array of queries, keys and values.

Blocks span the whole token axis, so any number of tokens is allowed. Ours.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

# VMEM of one core, in MiB, by a regular expression for the device kind (the table of
# https://docs.jax.dev/en/latest/pallas/tpu/hardware.html). A row needs to fit.
_VMEM_MIB = (
    (r"TPU v5 ?(lite|e)", 128),
    (r"TPU v6 ?(lite|e)", 128),
    (r"TPU v5p?", 64),
    (r"TPU ?v?7x?", 64),
)
_SMALLEST_VMEM_MIB = 16

# Longer rows would need their weights in parts.
_MAX_TOKENS = 640
# Arrays of [tokens, tokens] in float32 that the backward kernel holds at once, with room to spare.
_WEIGHT_ARRAYS = 8
_MASKED = -1e30
# Of a vector register.
_LANES = 128


def short_attention_obstacle(
    dtype: DTypeLike, num_tokens: int, num_heads: int, head_dim: int, device_kind: str
) -> str | None:
    """Why a TPU cannot run `attend_short`, or None.

    Args:
        dtype: of queries, keys and values.
        num_tokens, num_heads, head_dim: of the tower.
        device_kind: of the TPU, as JAX names it.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it needs bfloat16 or float32, and config.model.dtype is {jnp.dtype(dtype)}"
    if num_tokens > _MAX_TOKENS:
        return f"it takes at most {_MAX_TOKENS} tokens, and there are {num_tokens}"
    available = vmem_mib(device_kind)
    needed = _vmem_bytes(num_tokens, num_heads * head_dim, jnp.dtype(dtype).itemsize) / 2**20
    if needed > available:
        return f"it needs {needed:.0f} MiB of VMEM, and {device_kind} has {available}"
    return None


def vmem_mib(device_kind: str) -> int:
    """On-chip memory of one core, in MiB; the smallest there is for a kind that is not known."""
    found = (mib for pattern, mib in _VMEM_MIB if re.fullmatch(pattern, device_kind))
    return next(found, _SMALLEST_VMEM_MIB)


def attend_short(
    qkv: jax.Array, bias: jax.Array, *, num_heads: int, causal: bool, interpret: bool = False
) -> jax.Array:
    """Softmax attention of every row's tokens with each other, softmax in float32.

    Args:
        qkv: [b, t, 3 * heads * d], the projection's product: queries, keys and values, each
            [heads, d]; bfloat16 or float32.
        bias: [3 * heads * d] of the projection, of the same dtype.
        num_heads: of the tower.
        causal: whether a token sees those before it and itself only.
        interpret: run without a TPU, for tests.

    Returns:
        [b, t, heads * d], of the same dtype.
    """
    # One device's share of a bias that all have: its gradient is then summed over the devices.
    missing = tuple(_varying_axes(qkv) - _varying_axes(bias))
    if missing:
        bias = jax.lax.pcast(bias, missing, to="varying")
    return _attend(qkv, bias, num_heads, causal, interpret)


def _varying_axes(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attend(qkv, bias, num_heads, causal, interpret):
    kernel = functools.partial(_forward_kernel, num_heads=num_heads, causal=causal)
    return _run(kernel, "attention", qkv.shape[-1] // 3, interpret, qkv, bias)


def _forward(qkv, bias, num_heads, causal, interpret):
    return _attend(qkv, bias, num_heads, causal, interpret), (qkv, bias)


def _backward(num_heads, causal, interpret, kept, gradient):
    qkv, bias = kept
    kernel = functools.partial(_backward_kernel, num_heads=num_heads, causal=causal)
    qkv_gradient = _run(kernel, "attention_gradient", qkv.shape[-1], interpret, qkv, bias, gradient)
    bias_gradient = jnp.sum(qkv_gradient, axis=(0, 1), dtype=jnp.float32)
    return qkv_gradient, bias_gradient.astype(bias.dtype)


_attend.defvjp(_forward, _backward)


def _run(
    kernel: Callable[..., None],
    name: str,
    out_width: int,
    interpret: bool,
    qkv: jax.Array,
    bias: jax.Array,
    *gradient: jax.Array,
) -> jax.Array:
    """The kernel on every row of the batch -> [b, t, out_width]."""
    b, t, _ = qkv.shape

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, t, width), lambda row: (row, 0, 0))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(
            (b, t, out_width), qkv.dtype, manual_axis_type=jax.typeof(qkv).manual_axis_type
        ),
        grid=(b,),
        in_specs=[
            rows(qkv.shape[-1]),
            pl.BlockSpec((1, bias.size), lambda row: (0, 0)),
            *(rows(x.shape[-1]) for x in gradient),
        ],
        out_specs=rows(out_width),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=_vmem_bytes(t, qkv.shape[-1] // 3, qkv.dtype.itemsize),
        ),
        interpret=interpret,
        name=name,
    )(qkv, bias[None], *gradient)


def _vmem_bytes(num_tokens: int, width: int, itemsize: int) -> int:
    """Memory of the backward kernel, the larger one: two rows at a time of input and output."""
    tokens = -(-num_tokens // 16) * 16
    lanes = -(-num_tokens // 128) * 128
    rows = 2 * 7 * tokens * width * itemsize
    return rows + _WEIGHT_ARRAYS * tokens * lanes * 4 + (2 << 20)


def _forward_kernel(qkv_ref, bias_ref, out_ref, *, num_heads: int, causal: bool):
    width = out_ref.shape[-1]
    head_dim = width // num_heads

    def attend_group(read, write):
        outs = []
        for q, k, v in read(qkv_ref, bias_ref):
            weights, total = _exponentials(q, k, causal)
            outs.append(_product(weights.astype(v.dtype), v, 1, 0) / total)
        write(out_ref, 0, outs)

    _for_each_group(attend_group, num_heads, head_dim)


def _backward_kernel(qkv_ref, bias_ref, g_ref, out_ref, *, num_heads: int, causal: bool):
    width = g_ref.shape[-1]
    head_dim = width // num_heads

    def attend_group(read, write):
        gradients = [], [], []
        for (q, k, v), (g,) in zip(read(qkv_ref, bias_ref), read(g_ref), strict=True):
            weights, total = _exponentials(q, k, causal)
            weights = weights / total
            by_weights = _product(g, v, 1, 1)
            mean = jnp.sum(weights * by_weights, axis=1, keepdims=True)
            by_scores = (weights * (by_weights - mean) * head_dim**-0.5).astype(q.dtype)
            gradients[0].append(_product(by_scores, k, 1, 0))
            gradients[1].append(_product(by_scores, q, 0, 0))
            gradients[2].append(_product(weights.astype(g.dtype), g, 0, 0))
        for part, heads in enumerate(gradients):
            write(out_ref, part * width, heads)

    _for_each_group(attend_group, num_heads, head_dim)


def _for_each_group(run: Callable[..., None], num_heads: int, head_dim: int) -> None:
    """Calls `run(read, write)` in a loop over the smallest groups of heads that fill whole lanes.

    A loop, since the compiler takes minutes for the heads one after the other. `read` gives for
    each head of the group its [t, d] in every `width` columns of a row, a bias added; `write`
    puts the [t, d] of the group's heads next to each other, from a first column on.
    """
    width = num_heads * head_dim
    group = math.lcm(head_dim, _LANES) // head_dim
    if num_heads % group:
        group = num_heads
    columns = group * head_dim

    def body(index, _):
        start = index * columns if columns == width else pl.multiple_of(index * columns, _LANES)

        def read(ref, bias_ref=None):
            parts = []
            for part in range(ref.shape[-1] // width):
                window = pl.ds(start + part * width, columns)
                part_of_row = ref[0, :, window]
                if bias_ref is not None:
                    # In float32, since not every TPU adds in bfloat16; rounded, it is the same.
                    biased = part_of_row.astype(jnp.float32)
                    biased = biased + bias_ref[:, window].astype(jnp.float32)
                    part_of_row = biased.astype(ref.dtype)
                parts.append(part_of_row)
            for first in range(0, columns, head_dim):
                yield [part[:, first : first + head_dim] for part in parts]

        def write(ref, first, heads):
            ref[0, :, pl.ds(start + first, columns)] = jnp.concatenate(heads, axis=1).astype(
                ref.dtype
            )

        run(read, write)
        return _

    if columns == width:
        body(0, None)
    else:
        jax.lax.fori_loop(0, width // columns, body, None)


def _exponentials(q: jax.Array, k: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Softmax's numerators [t, t] and denominators [t, 1], in float32."""
    scores = _product(q, k, 1, 1) * q.shape[-1] ** -0.5
    if causal:
        queries, keys = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        scores = jnp.where(keys <= queries, scores, _MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def _product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """Sums over an axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
