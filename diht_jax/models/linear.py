"""The linear layers of the transformer blocks."""

from __future__ import annotations

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from diht_jax.models.remat import LINEAR_OUT


class Linear(nnx.Linear):
    """`nnx.Linear`, with a gradient that every compiler turns into plain matrix products.

    `models.lora` may put an adapter on it: parameters `lora_a` and `lora_b`, and `lora_scale`.
    """

    def __init__(self, in_features: int, out_features: int, **settings):
        super().__init__(in_features, out_features, dot_general=_dot_general, **settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in_features] -> [..., out_features]."""
        y = super().__call__(x)
        return y + adapter_product(self, x) if has_adapter(self) else y


def has_adapter(layer: Linear) -> bool:
    """Whether `models.lora` has put an adapter on the layer."""
    return hasattr(layer, "lora_a")


def adapter_product(layer: Linear, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
    """What the adapter of a layer adds, [..., len(columns)] in the layer's dtype."""
    a, b = layer.lora_a[...], layer.lora_b[...][:, columns]
    x, a, b = (value.astype(layer.dtype) for value in (x, a, b))
    return (layer.lora_scale * (x @ a)) @ b


def apply_columns(layer: Linear, x: jax.Array, columns: slice) -> jax.Array:
    """Some of the outputs of a layer, without computing the others.

    Args:
        layer: with a bias.
        x: [..., in_features].
        columns: which outputs.

    Returns:
        [..., len(columns)] in the layer's dtype.
    """
    product, bias = product_and_bias(layer, x, columns)
    return product + bias


def product_and_bias(
    layer: Linear, x: jax.Array, columns: slice = slice(None)
) -> tuple[jax.Array, jax.Array]:
    """The two parts of what `apply_columns` adds up, [..., len(columns)] and [len(columns)]."""
    kernel, bias = (layer.kernel[...][:, columns], layer.bias[...][columns])
    x, kernel, bias = (value.astype(layer.dtype) for value in (x, kernel, bias))
    product = checkpoint_name(_product(x, kernel), LINEAR_OUT)
    if has_adapter(layer):
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
    # JAX's own rule makes the kernel's gradient transposed and turns it round afterwards, for
    # which XLA on CPUs copies `x` or `gradient` to another layout: 9% of a block's time.
    rows = gradient.reshape(-1, gradient.shape[-1])
    x_gradient = jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())))
    kernel_gradient = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), rows, (((0,), (0,)), ((), ()))
    )
    return x_gradient.reshape(x.shape), kernel_gradient


_product.defvjp(_forward, _backward)


def _dot_general(x, kernel, dimension_numbers, precision=None, out_sharding=None):
    """`_product`, called as `nnx.Linear` calls `jax.lax.dot_general`."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers
    assert precision is None and out_sharding is None
    return checkpoint_name(_product(x, kernel), LINEAR_OUT)
