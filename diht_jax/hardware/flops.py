"""Floating-point operations (FLOPs) of a function, counted from its jaxpr.

XLA's own cost analysis counts the body of a loop once, for any trip count, and so flatters
scanned layers and ring losses; here every body counts as often as it runs. Nothing is compiled or
executed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs of a function, summed over all devices of the mesh."""

    # Floating-point operations: `matmul_flops`, and one for each element that an element-wise
    # operation makes or a reduction reads. Selecting, converting, moving and communicating count
    # nothing.
    flops: int = 0
    matmul_flops: int = 0  # of matrix products and convolutions, a multiply-add being two

    def __add__(self, other: FlopCount) -> FlopCount:
        return FlopCount(self.flops + other.flops, self.matmul_flops + other.matmul_flops)

    def __mul__(self, times: int) -> FlopCount:
        return FlopCount(self.flops * times, self.matmul_flops * times)

    def __floordiv__(self, parts: int) -> FlopCount:
        return FlopCount(self.flops // parts, self.matmul_flops // parts)


def count_flops(fn: Callable[..., Any], *args: Any) -> FlopCount:
    """Counts the FLOPs of `fn(*args)`.

    A scan counts as often as it is long, a branch as its most expensive case, the body of a
    `shard_map` once for each device of its mesh axes. Values that no result depends on count
    nothing, as in a compiled program. Recomputation (`jax.checkpoint`) counts again. What is
    replicated outside of `shard_map` counts once.

    Args:
        *args: arrays or `jax.ShapeDtypeStruct`s, in any tree.

    Raises:
        ValueError: a while loop, whose trip count is not known, or a foreign kernel.
    """
    return count_jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def count_jaxpr_flops(jaxpr: Jaxpr | ClosedJaxpr, *, leave_out: str | None = None) -> FlopCount:
    """Counts the FLOPs of a jaxpr; see `count_flops`.

    Args:
        leave_out: a `jax.named_scope` of the function whose operations do not count.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    counted = (
        _count_equation(eqn)
        for eqn in _live(jaxpr).eqns
        if leave_out is None or leave_out not in str(eqn.source_info.name_stack).split("/")
    )
    return sum(counted, FlopCount())


def _live(jaxpr: Jaxpr) -> Jaxpr:
    """A jaxpr without what none of its results depends on."""
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    # JAX keeps every Pallas kernel; XLA does not.
    read = {id(variable) for eqn in live.eqns for variable in eqn.invars}
    read |= {id(variable) for variable in live.outvars}
    return live.replace(
        eqns=[
            eqn
            for eqn in live.eqns
            if eqn.primitive.name != "pallas_call" or any(id(out) in read for out in eqn.outvars)
        ]
    )


def _count_equation(eqn: JaxprEqn) -> FlopCount:
    name = eqn.primitive.name
    if name in _RULES:
        return _RULES[name](eqn)
    if name == "while":
        raise ValueError(
            "count_flops: a while loop, whose trip count is not known; loop with jax.lax.scan or "
            "with jax.lax.fori_loop over Python integers"
        )
    if name in _FOREIGN:
        raise ValueError(
            f"count_flops: '{name}' is a foreign kernel whose FLOPs the jaxpr does not show; "
            "count the function with an implementation written in JAX"
        )
    # The functions that jit, checkpoint, custom derivatives and the like call.
    inner = [value for value in eqn.params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]
    dtypes = [getattr(var.aval, "dtype", None) for var in (*eqn.invars, *eqn.outvars)]
    is_floating = any(dtype is not None and jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)
    is_counted = is_floating and name not in _MOVES
    if is_counted and name.startswith(_READERS):
        return FlopCount(flops=_array(eqn.invars[0]).size)
    if is_counted and not inner:
        return FlopCount(flops=sum(_array(variable).size for variable in eqn.outvars))
    return sum(map(count_jaxpr_flops, inner), FlopCount())


def _array(variable: Any) -> Any:
    """Shape and size of a variable or literal that is an array."""
    return variable.aval


def _dot_general(eqn: JaxprEqn) -> FlopCount:
    left = _array(eqn.invars[0])
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(left.shape[axis] for axis in contracted)
    return _products(2 * _array(eqn.outvars[0]).size * depth)


def _convolution(eqn: JaxprEqn) -> FlopCount:
    """Every output element sums over the window and its group's input channels.

    A convolution's gradients are convolutions over padded or dilated inputs; the zeros put in
    there cost nothing, so the smallest of the three equivalent counts is the true one: output,
    input or kernel elements, each times what it meets.
    """
    image, kernel, out = map(_array, (*eqn.invars[:2], *eqn.outvars))
    spec = eqn.params["dimension_numbers"]
    window = math.prod(kernel.shape[axis] for axis in spec.rhs_spec[2:])
    channels_in, channels_out = kernel.shape[spec.rhs_spec[1]], kernel.shape[spec.rhs_spec[0]]
    positions_in = math.prod(image.shape[axis] for axis in spec.lhs_spec[2:])
    positions_out = math.prod(out.shape[axis] for axis in spec.out_spec[2:])
    examples = out.shape[spec.out_spec[0]]
    pairs = min(positions_out * window, positions_in * window, positions_in * positions_out)
    return _products(2 * examples * channels_in * channels_out * pairs)


def _products(flops: int) -> FlopCount:
    return FlopCount(flops, flops)


def _scan(eqn: JaxprEqn) -> FlopCount:
    return count_jaxpr_flops(eqn.params["jaxpr"]) * eqn.params["length"]


def _cond(eqn: JaxprEqn) -> FlopCount:
    return max(
        (count_jaxpr_flops(branch) for branch in eqn.params["branches"]), key=lambda w: w.flops
    )


def _shard_map(eqn: JaxprEqn) -> FlopCount:
    sizes = dict(eqn.params["mesh"].shape)
    num_devices = math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
    return count_jaxpr_flops(eqn.params["jaxpr"]) * num_devices


def _pallas_call(eqn: JaxprEqn) -> FlopCount:
    estimate = eqn.params["cost_estimate"]
    if estimate is not None:  # without what the kernel multiplies by zeros
        return FlopCount(estimate.flops + estimate.transcendentals, estimate.flops)
    return count_jaxpr_flops(eqn.params["jaxpr"]) * math.prod(eqn.params["grid_mapping"].grid)


def _cudnn_attention(num_products: int) -> Callable[[JaxprEqn], FlopCount]:
    """Counts `num_products` of 2 b h t s d each, for queries [b, t, h, d] and keys [b, s, h, d]."""

    def rule(eqn: JaxprEqn) -> FlopCount:
        (batch, queries, heads, depth), (_, keys, _, _) = (_array(v).shape for v in eqn.invars[:2])
        return _products(num_products * 2 * batch * heads * queries * keys * depth)

    return rule


_RULES: dict[str, Callable[[JaxprEqn], FlopCount]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
    "pallas_call": _pallas_call,
    "dot_product_attention_fwd_wrapper": _cudnn_attention(2),
    "dot_product_attention_bwd_wrapper": _cudnn_attention(5),
}

# One operation for each element read, not made.
_READERS = ("reduce", "arg", "cum", "scatter_add", "scatter-add", "sort", "top_k")

# No arithmetic: they move, select, convert or communicate.
_MOVES = frozenset(
    [
        "all_gather",
        "all_gather_invariant",
        "all_to_all",
        "axis_index",
        "bitcast_convert_type",
        "broadcast_in_dim",
        "broadcast",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "get",
        "iota",
        "name",
        "optimization_barrier",
        "pad",
        "pbroadcast",
        "pcast",
        "pmax",
        "pmin",
        "ppermute",
        "psum",
        "psum2",
        "psum_invariant",
        "pvary",
        "reduce_precision",
        "reduce_scatter",
        "reshape",
        "reshard",
        "rev",
        "scatter",
        "select_n",
        "sharding_constraint",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "swap",
        "transpose",
    ]
)

_FOREIGN = frozenset(
    [
        "custom_call",
        "ffi_call",
        "tpu_custom_call",
        "triton_kernel_call",
        "mosaic_gpu",
        "pure_callback",
        "io_callback",
        "dot_product_attention_fp8_fwd_wrapper",
        "dot_product_attention_fp8_bwd_wrapper",
        "cudnn_fusion",
    ]
)
