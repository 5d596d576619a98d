"""Linear layers and activations of the blocks, and their rematerialisation policies.

docs/guides/train/memory.md describes the policies of `checkpointed`: what a block saves for each
token, and what the backward pass recomputes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

POLICIES = ("none", "full", "dots", "minimal")
# Names that the blocks give to values with `checkpoint_name`.
LINEAR_OUT = "linear_out"
QKV = "qkv"
ATTENTION_OUT = "attention_out"
KERNEL_OUT = "kernel_out"  # of `tpu_attention`


class Linear(nnx.Linear):
    """`nnx.Linear` with a gradient that every compiler turns into plain matrix products.

    `parameters.add_adapters` may set `lora_a`, `lora_b` and `lora_scale`. With
    `float32_bias_gradient` the gradient of the bias is summed in float32; in bfloat16, the sum of
    50,000 rows is off by 1%.
    """

    float32_bias_gradient = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in_features] -> [..., out_features]."""
        product, bias = product_and_bias(self, x)
        if self.float32_bias_gradient:
            return (_widen(product) + _widen(bias)).astype(product.dtype)
        return product + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def adapter_product(layer: Linear, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
    """Returns the contribution of a layer's adapter, [..., len(columns)] in the layer's dtype."""
    adapted: Any = layer  # with the attributes of `add_adapters`
    a, b = adapted.lora_a[...], adapted.lora_b[...][:, columns]
    x, a, b = (value.astype(layer.dtype) for value in (x, a, b))
    return (adapted.lora_scale * (x @ a)) @ b


def apply_columns(layer: Linear, x: jax.Array, columns: slice) -> jax.Array:
    """Computes only some output columns of a layer with a bias, [..., len(columns)]."""
    product, bias = product_and_bias(layer, x, columns)
    return product + bias


def product_and_bias(
    layer: Linear, x: jax.Array, columns: slice = slice(None)
) -> tuple[jax.Array, jax.Array]:
    """Returns the two summands of `apply_columns`, [..., len(columns)] and [len(columns)]."""
    assert layer.bias is not None
    kernel, bias = layer.kernel[...][:, columns], layer.bias[...][columns]
    x, kernel, bias = layer.promote_dtype((x, kernel, bias), dtype=layer.dtype)
    product = checkpoint_name(_product(x, kernel), LINEAR_OUT)
    if hasattr(layer, "lora_a"):
        product += adapter_product(layer, x, columns)
    return product, bias


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., k] x [k, n] -> [..., n]."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _forward(x: jax.Array, kernel: jax.Array):
    return _product(x, kernel), (x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, kernel = kept
    # JAX's own rule computes the kernel's gradient transposed and transposes it back. For that,
    # XLA on CPUs copies `x` or `gradient` to another layout, which takes 9% of a block's time.
    rows = gradient.reshape(-1, gradient.shape[-1])
    x_gradient = jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())))
    kernel_gradient = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), rows, (((0,), (0,)), ((), ()))
    )
    return x_gradient.reshape(x.shape), kernel_gradient


_product.defvjp(_forward, _backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, `x Phi(x)` with the normal distribution function, computed in at least float32.

    Its values are those of `jax.nn.gelu`, at a lower cost. `erf` takes a third of the time of
    `erfc`, which is more accurate only where the result is nearly zero. The backward pass saves
    only `x`, and not two more float32 arrays of its size.
    """
    wide = _widen(x)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    wide = _widen(x)
    density = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    slope = _normal_cdf(wide) + wide * density
    return ((gradient * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by tanh, computed in at least float32; the backward pass saves only `x`."""
    return jax.nn.gelu(_widen(x), approximate=True).astype(x.dtype)


def _gelu_tanh_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu_tanh(x), x


def _gelu_tanh_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    wide = _widen(x)
    slope = jax.vjp(jax.nn.gelu, wide)[1](jnp.ones_like(wide))[0]
    return ((gradient * slope).astype(x.dtype),)


gelu_tanh.defvjp(_gelu_tanh_forward, _gelu_tanh_backward)


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation of GELU, `x sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


# By the names of `zoo.CHOICES`.
ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


# Element-wise operations, which XLA fuses into their users: recomputing them takes less time than
# reading their results from memory. "all_gather" of a sharded parameter costs communication, but
# saving its result would keep every layer unsharded.
_COMPUTED_AGAIN = frozenset(
    {
        "add",
        "add_any",
        "sub",
        "mul",
        "div",
        "neg",
        "integer_pow",
        "square",
        "select_n",
        "copy",
        "convert_element_type",
        "broadcast_in_dim",
        "reshape",
        "transpose",
        "squeeze",
        "slice",
        "all_gather",
    }
)


def checkpointed(
    run: Callable[..., jax.Array], name: str, *, scanned: bool
) -> Callable[..., jax.Array]:
    """Returns `run` with a rematerialisation policy for its backward pass.

    Args:
        run: one block, a function of its parameters and its input.
        name: of the policy; see the module docstring.
        scanned: whether `run` is the body of a scan, where the compiler cannot merge the
            recomputation with the first computation.
    """
    policies = jax.checkpoint_policies
    policy = {
        "none": _save_what_costs,
        # By name, because a policy does not see into the linear layers' custom gradient rule.
        "dots": policies.save_only_these_names(LINEAR_OUT),
        "minimal": policies.save_only_these_names(QKV, ATTENTION_OUT, KERNEL_OUT),
        "full": policies.nothing_saveable,
    }[name]
    return jax.checkpoint(run, policy=policy, prevent_cse=not scanned)


def _save_what_costs(primitive: Any, *_, **params) -> bool:
    if primitive.name == "custom_vjp_call":
        equations = params["call_jaxpr"].jaxpr.eqns
        return all(eqn.primitive.name != "all_gather" for eqn in equations)
    return primitive.name not in _COMPUTED_AGAIN
