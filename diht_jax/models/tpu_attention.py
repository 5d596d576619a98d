"""Attention over short sequences on TPUs, as two Pallas kernels: forward and backward.

A step of XLA's attention on a TPU is bound by memory traffic, most of it the attention weights.
Here a grid step holds all heads of one example in on-chip memory (VMEM), and reads them in the
layout of the projection's output. Neither weights nor transposed or padded tokens are written to
main memory. The backward pass recomputes the weights from the kernel's inputs and one number for
each query and head. The kernel adds the bias of the projection itself: rematerialisation saves the
product without the bias, and adding it outside would need a second array of queries, keys and
values. The gradient of the bias is also summed in the kernel, in float32.

Scores are [keys, queries]. The softmax then reduces along the sublane axis, which needs only
additions, and none of the five products of the backward pass needs transposed scores. The scores of
several heads are computed before the first softmax, to overlap the two.

Blocks span the whole token axis, so any number of tokens is allowed. Ours.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from diht_jax.models.layers import KERNEL_OUT

# VMEM of one core, in MiB, by a regular expression for the device kind (the table of
# https://docs.jax.dev/en/latest/pallas/tpu/hardware.html). One example must fit.
_VMEM_MIB = (
    (r"TPU v5 ?(lite|e)", 128),
    (r"TPU v6 ?(lite|e)", 128),
    (r"TPU v5p?", 64),
    (r"TPU ?v?7x?", 64),
)
_SMALLEST_VMEM_MIB = 16

# Longer sequences would need tiles of the attention weights.
_MAX_TOKENS = 640
# Heads whose scores are computed before the first softmax.
_HEADS_AT_ONCE = 4
# Upper bound of the float32 arrays [tokens, tokens] that the backward kernel holds at once: two for
# each of these heads, and three for the head being processed.
_WEIGHT_ARRAYS = 2 * _HEADS_AT_ONCE + 3
_MASKED = -1e30
# Lanes of a vector register.
_LANES = 128
# Scores are base-2 logarithms, because the hardware's exponential is 2^x.
_LOG2_E = math.log2(math.e)


def short_attention_obstacle(
    dtype: DTypeLike, num_tokens: int, num_heads: int, head_dim: int, device_kind: str
) -> str | None:
    """Returns why a TPU of this kind cannot run `attend_short` for a tower, or None."""
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
    """Returns the VMEM of one core in MiB; for an unknown device kind, the smallest of any TPU."""
    found = (mib for pattern, mib in _VMEM_MIB if re.fullmatch(pattern, device_kind))
    return next(found, _SMALLEST_VMEM_MIB)


def attend_short(
    qkv: jax.Array, bias: jax.Array, *, num_heads: int, causal: bool, interpret: bool = False
) -> jax.Array:
    """Computes multi-head self-attention of every row, with the softmax in float32.

    Args:
        qkv: [b, t, 3 * heads * d], the projection without its bias: queries, keys and values, each
            [heads, d]; bfloat16 or float32.
        bias: [3 * heads * d] of the projection, of the same dtype.
        num_heads: of the tower.
        causal: whether a token attends only to itself and earlier tokens.
        interpret: run without a TPU, for tests.

    Returns:
        [b, t, heads * d], of the same dtype.
    """
    # Marks a replicated bias as varying; JAX then sums its gradient over the devices.
    missing = tuple(_varying_axes(qkv) - _varying_axes(bias))
    if missing:
        bias = jax.lax.pcast(bias, missing, to="varying")
    return _attend(qkv, bias, num_heads, causal, interpret)


def _varying_axes(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attend(qkv, bias, num_heads, causal, interpret):
    return _run_forward(qkv, bias, num_heads, causal, interpret)[0]


def _forward(qkv, bias, num_heads, causal, interpret):
    found = _run_forward(qkv, bias, num_heads, causal, interpret)
    out, log_totals = (checkpoint_name(array, KERNEL_OUT) for array in found)
    return out, (qkv, bias, log_totals)


def _backward(num_heads, causal, interpret, kept, gradient):
    qkv, bias, log_totals = kept
    b, t, width = qkv.shape
    kernel = functools.partial(_backward_kernel, num_heads=num_heads, causal=causal)
    shapes = [(qkv.shape, qkv.dtype), ((b, 1, width), jnp.float32)]
    inputs = (qkv, bias[None], gradient, log_totals)
    cost = _cost(5, num_heads, inputs, shapes)
    qkv_gradient, sums = _run(kernel, "attention_gradient", shapes, cost, interpret, *inputs)
    return qkv_gradient, jnp.sum(sums, axis=(0, 1)).astype(bias.dtype)


_attend.defvjp(_forward, _backward)


def _run_forward(qkv, bias, num_heads, causal, interpret) -> list[jax.Array]:
    """Returns the result [b, t, heads * d] and log denominators [b, turns, heads, queries].

    Denominators are of base 2, and of the queries without those of `_Heads.stacked`.
    """
    b, t, width = qkv.shape
    heads = _heads_of_a_turn(num_heads, width // 3 // num_heads)
    queries = t if causal else _whole_queries(t, heads)
    shapes = [
        ((b, t, width // 3), qkv.dtype),
        ((b, num_heads // heads, heads, queries), jnp.float32),
    ]
    kernel = functools.partial(_forward_kernel, num_heads=num_heads, causal=causal)
    inputs = (qkv, bias[None])
    cost = _cost(2, num_heads, inputs, shapes)
    return _run(kernel, "attention", shapes, cost, interpret, *inputs)


_Shapes = list[tuple[tuple[int, ...], DTypeLike]]


def _cost(
    num_products: int, num_heads: int, inputs: tuple[jax.Array, ...], outputs: _Shapes
) -> pl.CostEstimate:
    """Estimates the FLOPs and memory traffic of a kernel, for XLA's scheduler."""
    b, t, width = inputs[0].shape
    arrays = [*((x.shape, x.dtype) for x in inputs), *outputs]
    return pl.CostEstimate(
        flops=num_products * 2 * b * t * t * (width // 3),
        transcendentals=b * num_heads * t * t,
        bytes_accessed=sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in arrays),
    )


def _run(
    kernel: Callable[..., None],
    name: str,
    outputs: _Shapes,
    cost: pl.CostEstimate,
    interpret: bool,
    *inputs: jax.Array,
) -> list[jax.Array]:
    """Runs the kernel on every row of the batch; the rows share the input with two axes."""
    b, t, width = inputs[0].shape

    def block(shape: tuple[int, ...]) -> pl.BlockSpec:
        rest = (0,) * (len(shape) - 1)
        return pl.BlockSpec((1, *shape[1:]), lambda row: (row if len(shape) > 2 else 0, *rest))

    axes = jax.typeof(inputs[0]).manual_axis_type
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes) for shape, dtype in outputs
        ],
        grid=(b,),
        in_specs=[block(x.shape) for x in inputs],
        out_specs=[block(shape) for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=_vmem_bytes(t, width // 3, inputs[0].dtype.itemsize),
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*inputs)


def _vmem_bytes(num_tokens: int, width: int, itemsize: int) -> int:
    """Returns the VMEM of the backward kernel, the larger one, with double-buffered rows."""
    tokens = -(-num_tokens // 16) * 16
    lanes = -(-num_tokens // 128) * 128
    rows = 2 * 7 * tokens * width * itemsize
    return rows + _WEIGHT_ARRAYS * tokens * lanes * 4 + (2 << 20)


def _forward_kernel(qkv_ref, bias_ref, out_ref, log_totals_ref, *, num_heads: int, causal: bool):
    width = out_ref.shape[-1]
    head_dim = width // num_heads

    def attend_heads(turn, columns):
        q, k, v = _biased(qkv_ref, bias_ref, columns, width, head_dim)
        heads = _Heads(head_dim, q.shape[1])
        values = v.T
        queries = log_totals_ref.shape[3]
        last = heads.stacked(q[queries:])
        q = q[:queries]
        outs, log_totals = [], []
        for at_once in heads.batches():
            scores = [_scores(heads.window(k, h), heads.own(q, h), causal) for h in at_once]
            for h, of_head in zip(at_once, scores, strict=True):
                highest = jnp.max(of_head, axis=0, keepdims=True)
                weights = jnp.exp2(of_head - highest)
                total = jnp.sum(weights, axis=0, keepdims=True)
                outs.append(_product(heads.rows(values, h), weights.astype(v.dtype), 1, 0) / total)
                log_totals.append(highest + jnp.log2(total))
        out_ref[0, :queries, columns(0)] = jnp.concatenate(outs).T.astype(out_ref.dtype)
        log_totals_ref[0, turn] = jnp.concatenate(log_totals)
        if last.size:
            weights = _softmax(_scores(k, last, causal=False)).astype(v.dtype)
            out = heads.unstacked(_product(weights, v, 0, 0))
            out_ref[0, queries:, columns(0)] = out.astype(out_ref.dtype)

    _for_each_turn(attend_heads, num_heads, head_dim)


def _backward_kernel(
    qkv_ref, bias_ref, g_ref, log_totals_ref, out_ref, sums_ref, *, num_heads: int, causal: bool
):
    width = g_ref.shape[-1]
    head_dim = width // num_heads

    def attend_heads(turn, columns):
        q, k, v = _biased(qkv_ref, bias_ref, columns, width, head_dim)
        g = g_ref[0, :, columns(0)]
        log_totals = log_totals_ref[0, turn]
        heads = _Heads(head_dim, q.shape[1])
        keys = k.T
        queries = log_totals.shape[1]
        last_q, last_g = heads.stacked(q[queries:]), heads.stacked(g[queries:])
        q, g = q[:queries], g[:queries]
        by_query, by_key, by_value = [], [], []
        for at_once in heads.batches():
            products = []
            for h in at_once:
                own_q, own_g = heads.own(q, h), heads.own(g, h)
                scores = _scores(heads.window(k, h), own_q, causal)
                products.append((own_q, own_g, scores, _product(heads.window(v, h), own_g, 1, 1)))
            for h, (own_q, own_g, scores, by_weights) in zip(at_once, products, strict=True):
                weights = jnp.exp2(scores - log_totals[h : h + 1])
                by_scores = _softmax_gradient(weights, by_weights).astype(q.dtype)
                by_value.append(_product(weights.astype(g.dtype), own_g, 1, 0))
                by_key.append(_product(by_scores, own_q, 1, 0))
                by_query.append(_product(heads.rows(keys, h), by_scores, 1, 0))
        gradients = [
            jnp.concatenate(by_query).T,
            heads.side_by_side(by_key),
            heads.side_by_side(by_value),
        ]
        if last_q.size:
            weights = _softmax(_scores(k, last_q, causal=False))
            by_scores = _softmax_gradient(weights, _product(v, last_g, 1, 1)).astype(q.dtype)
            by_query = heads.unstacked(_product(by_scores, k, 0, 0))
            gradients[0] = jnp.concatenate([gradients[0], by_query])
            gradients[1] += _product(by_scores, last_q, 1, 0)
            gradients[2] += _product(weights.astype(g.dtype), last_g, 1, 0)
        gradients[0] *= head_dim**-0.5
        gradients[1] *= 1 / _LOG2_E
        for part, gradient in enumerate(gradients):
            window = columns(part * width)
            out_ref[0, :, window] = gradient.astype(out_ref.dtype)
            sums_ref[0, :, window] = jnp.sum(gradient, axis=0, keepdims=True)

    _for_each_turn(attend_heads, num_heads, head_dim)


class _Heads:
    """Access to the adjacent heads of an array [tokens, columns].

    Slicing a head that shares the lanes of a register with others would move lanes. Instead, one
    operand of each product has the lanes of the other heads set to zero.
    """

    def __init__(self, head_dim: int, columns: int):
        whole = columns % _LANES == 0 and _LANES % head_dim == 0
        self.head_dim, self.columns = head_dim, columns
        self.window_size = _LANES if whole else head_dim

    def batches(self) -> list[range]:
        """Returns the indices of the heads, in ranges of at most `_HEADS_AT_ONCE`."""
        last = self.columns // self.head_dim
        return [range(h, min(h + _HEADS_AT_ONCE, last)) for h in range(0, last, _HEADS_AT_ONCE)]

    def window(self, x: jax.Array, head: int) -> jax.Array:
        """Returns the columns of [t, columns] of a head and of those that share its registers."""
        first = head * self.head_dim // self.window_size * self.window_size
        return x[:, first : first + self.window_size]

    def own(self, x: jax.Array, head: int) -> jax.Array:
        """Returns `window` with the columns of other heads set to zero."""
        x = self.window(x, head)
        if self.window_size == self.head_dim:
            return x
        return self._alone(x, head * self.head_dim % self.window_size)

    def rows(self, x: jax.Array, head: int) -> jax.Array:
        """Returns the rows of [columns, t] that belong to a head."""
        return x[head * self.head_dim : (head + 1) * self.head_dim]

    def side_by_side(self, parts: list[jax.Array]) -> jax.Array:
        """Joins arrays of the heads, zero in the columns of other heads, into [t, columns]."""
        sharing = self.window_size // self.head_dim
        windows = [
            functools.reduce(jnp.add, parts[h : h + sharing]) for h in range(0, len(parts), sharing)
        ]
        return jnp.concatenate(windows, axis=1)

    def stacked(self, x: jax.Array) -> jax.Array:
        """Returns each head of [t, columns] in rows of its own [heads * t, columns]."""
        return jnp.concatenate(
            [self._alone(x, first) for first in range(0, self.columns, self.head_dim)]
        )

    def unstacked(self, x: jax.Array) -> jax.Array:
        """Returns [t, columns] with the columns of each head from its rows of `stacked`."""
        rows = x.shape[0] * self.head_dim // self.columns
        own = [
            self._alone(x[h * rows : (h + 1) * rows], first)
            for h, first in enumerate(range(0, self.columns, self.head_dim))
        ]
        return functools.reduce(jnp.add, own)

    def _alone(self, x: jax.Array, first: int) -> jax.Array:
        lanes = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        is_own = (lanes >= first) & (lanes < first + self.head_dim)
        return jnp.where(is_own, x, jnp.zeros_like(x))


def _whole_queries(num_tokens: int, num_heads: int) -> int:
    """Returns how many queries a head computes on its own, the others being those of all heads.

    A few queries more than fill registers would need a whole register for each head.
    """
    rest = num_tokens % _LANES
    return num_tokens - rest if rest * num_heads <= _LANES < num_tokens else num_tokens


def _heads_of_a_turn(num_heads: int, head_dim: int) -> int:
    """Returns the heads of a loop iteration: the fewest to fill whole lanes, twice that, or all."""
    group = math.lcm(head_dim, _LANES) // head_dim
    if num_heads % group:
        return num_heads
    twice = 2 * group
    return twice if twice <= _HEADS_AT_ONCE and num_heads % twice == 0 else group


def _for_each_turn(run: Callable[..., None], num_heads: int, head_dim: int) -> None:
    """Calls `run(turn, columns)` in a loop, with `_heads_of_a_turn` heads in each iteration.

    Unrolled, the kernel would take minutes to compile. `columns(first)` returns the columns of
    these heads in an array with its heads starting at column `first`.
    """
    heads = _heads_of_a_turn(num_heads, head_dim)

    def body(turn, _):
        start = turn * heads * head_dim
        if heads < num_heads:
            start = pl.multiple_of(start, _LANES)
        run(turn, lambda first: pl.ds(start + first, heads * head_dim))
        return _

    if heads == num_heads:
        body(0, None)
    else:
        jax.lax.fori_loop(0, num_heads // heads, body, None)


def _biased(
    qkv_ref, bias_ref, columns: Callable[[int], pl.Slice], width: int, head_dim: int
) -> list[jax.Array]:
    """Returns queries, keys and values of a turn's heads, [t, columns] each, with scaled queries.

    Adds the bias and scales in float32, since not every TPU adds in bfloat16; rounds only once.
    """
    found = []
    for part, scale in enumerate((head_dim**-0.5 * _LOG2_E, 1, 1)):
        window = columns(part * width)
        biased = qkv_ref[0, :, window].astype(jnp.float32)
        biased = biased + bias_ref[:, window].astype(jnp.float32)
        found.append((biased * scale if scale != 1 else biased).astype(qkv_ref.dtype))
    return found


def _scores(k: jax.Array, q: jax.Array, causal: bool) -> jax.Array:
    """Returns the base-2 logarithms of the softmax's numerators, float32 [keys, queries]."""
    scores = _product(k, q, 1, 1)
    if causal:
        keys, queries = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        scores = jnp.where(keys <= queries, scores, _MASKED)
    return scores


def _softmax(scores: jax.Array) -> jax.Array:
    """Returns the weights of base-2 `scores` [keys, queries]."""
    weights = jnp.exp2(scores - jnp.max(scores, axis=0, keepdims=True))
    return weights / jnp.sum(weights, axis=0, keepdims=True)


def _softmax_gradient(weights: jax.Array, by_weights: jax.Array) -> jax.Array:
    """Returns the gradient of the scores; all [keys, queries]."""
    mean = jnp.sum(weights * by_weights, axis=0, keepdims=True)
    return weights * (by_weights - mean)


def _product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """Contracts one axis of each array, with accumulation in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
