"""How many floating-point operations (FLOPs) a function does, counted from its jaxpr.

XLA's own cost analysis counts the body of a loop once, whatever the trip count, and so flatters
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
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.interpreters import partial_eval


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """What a function costs, summed over all devices of the mesh.

    Attributes:
        flops: floating-point operations: `matmul_flops`, and one for each element that an
            element-wise operation makes or a reduction reads. Selecting, converting, moving and
            communicating count nothing.
        matmul_flops: of matrix products and convolutions, a multiply-add being two.
        matmul_bytes: operands and results of the same; what a program with everything else fused
            must at least move.
    """

    flops: int = 0
    matmul_flops: int = 0
    matmul_bytes: int = 0

    def __add__(self, other: FlopCount) -> FlopCount:
        return FlopCount(
            self.flops + other.flops,
            self.matmul_flops + other.matmul_flops,
            self.matmul_bytes + other.matmul_bytes,
        )

    def __mul__(self, times: int) -> FlopCount:
        return FlopCount(self.flops * times, self.matmul_flops * times, self.matmul_bytes * times)

    def __floordiv__(self, parts: int) -> FlopCount:
        return FlopCount(
            self.flops // parts, self.matmul_flops // parts, self.matmul_bytes // parts
        )


def count_flops(fn: Callable[..., Any], *args: Any) -> FlopCount:
    """Counts the FLOPs of `fn(*args)`.

    A scan counts as often as it is long, a while loop by its trip count, a branch as its most
    expensive case, the body of a `shard_map` once for each device of its mesh axes. Values that
    no result depends on count nothing, as in a compiled program. Recomputation (`jax.checkpoint`)
    counts again. What is replicated outside of `shard_map` counts once.

    Args:
        fn: what to count; need not be jitted.
        *args: arrays or `jax.ShapeDtypeStruct`s, in any tree.

    Raises:
        ValueError: a while loop whose trip count the jaxpr does not show, or a foreign kernel.
    """
    return count_jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def count_jaxpr_flops(jaxpr: Jaxpr, *, leave_out: str | None = None) -> FlopCount:
    """Counts the FLOPs of a jaxpr; see `count_flops`.

    Args:
        jaxpr: of the function.
        leave_out: a `jax.named_scope` of the function whose operations do not count.
    """
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    counted = (eqn for eqn in live.eqns if not leave_out or leave_out not in _scopes(eqn))
    return sum(map(_count_equation, counted), FlopCount())


def _scopes(eqn: JaxprEqn) -> list[str]:
    return str(eqn.source_info.name_stack).split("/")


def _sum_equations(jaxpr: Jaxpr | ClosedJaxpr) -> FlopCount:
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(map(_count_equation, jaxpr.eqns), FlopCount())


def _count_equation(eqn: JaxprEqn) -> FlopCount:
    name = eqn.primitive.name
    if name in _RULES:
        return _RULES[name](eqn)
    if name in _FOREIGN:
        raise ValueError(
            f"count_flops: '{name}' is a foreign kernel whose FLOPs the jaxpr does not show; "
            "count the function with an implementation written in JAX"
        )
    if name in _MOVES or not _is_floating(eqn):
        inner = _inner_jaxprs(eqn)
        return sum((_sum_equations(jaxpr) for jaxpr in inner), FlopCount())
    if name.startswith(_READERS):
        return FlopCount(flops=eqn.invars[0].aval.size)
    inner = _inner_jaxprs(eqn)
    if inner:
        return sum((_sum_equations(jaxpr) for jaxpr in inner), FlopCount())
    return FlopCount(flops=sum(var.aval.size for var in eqn.outvars))


def _is_floating(eqn: JaxprEqn) -> bool:
    dtypes = [getattr(var.aval, "dtype", None) for var in (*eqn.invars, *eqn.outvars)]
    return any(dtype is not None and jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)


def _inner_jaxprs(eqn: JaxprEqn) -> list[Jaxpr | ClosedJaxpr]:
    """The functions that jit, checkpoint, custom derivatives and the like call."""
    return [value for value in eqn.params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]


def _dot_general(eqn: JaxprEqn) -> FlopCount:
    left = eqn.invars[0].aval
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(left.shape[axis] for axis in contracted)
    return _product(eqn, 2 * eqn.outvars[0].aval.size * depth)


def _convolution(eqn: JaxprEqn) -> FlopCount:
    """Every output element sums over the window and its group's input channels.

    A convolution's gradients are convolutions over padded or dilated inputs; the zeros put in
    there cost nothing, so the smallest of the three equivalent counts is the true one: output,
    input or kernel elements, each times what it meets.
    """
    image, kernel, out = (var.aval for var in (*eqn.invars[:2], *eqn.outvars))
    spec = eqn.params["dimension_numbers"]
    window = math.prod(kernel.shape[axis] for axis in spec.rhs_spec[2:])
    channels_in, channels_out = kernel.shape[spec.rhs_spec[1]], kernel.shape[spec.rhs_spec[0]]
    positions_in = math.prod(image.shape[axis] for axis in spec.lhs_spec[2:])
    positions_out = math.prod(out.shape[axis] for axis in spec.out_spec[2:])
    examples = out.shape[spec.out_spec[0]]
    pairs = min(positions_out * window, positions_in * window, positions_in * positions_out)
    return _product(eqn, 2 * examples * channels_in * channels_out * pairs)


def _product(eqn: JaxprEqn, flops: int) -> FlopCount:
    variables = (*eqn.invars, *eqn.outvars)
    num_bytes = sum(var.aval.size * var.aval.dtype.itemsize for var in variables)
    return FlopCount(flops, flops, num_bytes)


def _scan(eqn: JaxprEqn) -> FlopCount:
    return _sum_equations(eqn.params["jaxpr"]) * eqn.params["length"]


def _while(eqn: JaxprEqn) -> FlopCount:
    trips = _trip_count(eqn)
    body, condition = (_sum_equations(eqn.params[name]) for name in ("body_jaxpr", "cond_jaxpr"))
    return body * trips + condition * (trips + 1)


def _cond(eqn: JaxprEqn) -> FlopCount:
    return max((_sum_equations(branch) for branch in eqn.params["branches"]), key=lambda w: w.flops)


def _shard_map(eqn: JaxprEqn) -> FlopCount:
    sizes = dict(eqn.params["mesh"].shape)
    num_devices = math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
    return _sum_equations(eqn.params["jaxpr"]) * num_devices


def _pallas_call(eqn: JaxprEqn) -> FlopCount:
    return _sum_equations(eqn.params["jaxpr"]) * math.prod(eqn.params["grid_mapping"].grid)


def _cudnn_attention(num_products: int) -> Callable[[JaxprEqn], FlopCount]:
    """cuDNN attention [b, t, h, d], [b, s, h, d]: so many products of 2 b h t s d each."""

    def rule(eqn: JaxprEqn) -> FlopCount:
        (batch, queries, heads, depth), (_, keys, _, _) = (v.aval.shape for v in eqn.invars[:2])
        return _product(eqn, num_products * 2 * batch * heads * queries * keys * depth)

    return rule


def _trip_count(eqn: JaxprEqn) -> int:
    """Of a loop that counts a carried integer by a constant step from and to constants."""
    condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    num_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    first_carry = sum(num_consts)
    outer_values = [_literal(var) for var in eqn.invars]
    known = dict(zip(condition.jaxpr.constvars, condition.consts, strict=True))
    known.update(
        zip(
            condition.jaxpr.invars,
            outer_values[: num_consts[0]] + outer_values[first_carry:],
            strict=True,
        )
    )
    test = condition.jaxpr.eqns[-1]
    if len(condition.jaxpr.eqns) == 1 and test.primitive.name in ("lt", "le"):
        counter, limit = test.invars
        position = condition.jaxpr.invars.index(counter) - num_consts[0]
        start = known[counter]
        end = _literal(limit) if isinstance(limit, Literal) else known.get(limit)
        step = _counter_step(body, num_consts[1] + position, position)
        limit_is_fixed = isinstance(limit, Literal) or (
            limit not in condition.jaxpr.invars[num_consts[0] :]
        )
        if None not in (start, end, step) and limit_is_fixed:
            end = int(end) + (test.primitive.name == "le")
            return max(0, math.ceil((end - int(start)) / step))
    raise ValueError(
        "count_flops: a while loop whose trip count the jaxpr does not show; loop with "
        "jax.lax.scan or with jax.lax.fori_loop over Python integers"
    )


def _counter_step(body: ClosedJaxpr, index_in: int, index_out: int) -> int | None:
    """What one trip adds to the carried value; None unless it is a positive constant."""
    counter, result = body.jaxpr.invars[index_in], body.jaxpr.outvars[index_out]
    for eqn in body.jaxpr.eqns:
        if eqn.outvars[0] is result and eqn.primitive.name == "add" and counter in eqn.invars[:1]:
            step = _literal(eqn.invars[1])
            return int(step) if step is not None and step > 0 else None
    return None


def _literal(var: Any) -> Any:
    return var.val if isinstance(var, Literal) else None


_RULES: dict[str, Callable[[JaxprEqn], FlopCount]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "while": _while,
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
