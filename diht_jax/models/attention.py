"""Softmax attention and its kernels (XLA, cuDNN, Pallas in `tpu_attention`); rotary positions.

The kernel depends only on the device that the program is compiled for, which may be absent from
this machine (`diht_jax.compile`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.typing import DTypeLike

from diht_jax.models.tpu_attention import attend_short, short_attention_obstacle

# cuDNN's gradient needs an even number of tokens. It is fastest if the rows of its float32
# statistics are aligned to 16 bytes.
_TOKENS_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Target:
    """The kind of device that a program is compiled for."""

    platform: str  # "cpu", "tpu", "cuda" or "rocm"
    device_kind: str
    compute_capability: tuple[int, int] | None = None  # of an NVIDIA GPU, such as (9, 0)


def target_of(device: jax.Device) -> Target:
    """Returns the target of a device, which may be present or described by a topology."""
    kind = device.device_kind
    if device.platform not in ("gpu", "cuda", "rocm"):
        return Target(device.platform, kind)
    # A described device has no client; only CUDA devices can be described.
    client = getattr(device, "client", None)
    if "rocm" in getattr(client, "platform_version", "") or device.platform == "rocm":
        return Target("rocm", kind)
    major, minor = map(int, str(device.compute_capability).split("."))
    return Target("cuda", kind, (major, minor))


def attention_implementation(
    choice: str,
    dtype: DTypeLike,
    head_dim: int,
    target: Target | None = None,
    *,
    num_tokens: int | None = None,
    num_heads: int | None = None,
) -> str:
    """Selects the attention kernel of one tower: "xla", "cudnn" or "pallas".

    Args:
        choice: "auto" selects cuDNN's fused attention on NVIDIA GPUs and the Pallas kernel on TPUs
            where they are supported, else XLA's. "xla", "cudnn" and "pallas" select that kernel.
        dtype: of queries, keys and values.
        head_dim: width of a head.
        target: device that the program is compiled for; None is the default backend's first one.
        num_tokens, num_heads: of the tower; "pallas" needs both.

    Raises:
        ValueError: the kernel that `choice` names is not supported.
    """
    if choice == "xla":
        return "xla"
    target = target or target_of(jax.devices()[0])
    kernel = {"tpu": "pallas", "cuda": "cudnn"}.get(target.platform) if choice == "auto" else choice
    if kernel is None:
        return "xla"
    if kernel == "cudnn":
        obstacle = _cudnn_obstacle(dtype, head_dim, target)
    elif target.platform != "tpu":
        obstacle = f"it needs a TPU, and the device is {target.device_kind}"
    elif num_tokens is None or num_heads is None:
        obstacle = "it needs a fixed number of tokens"
    else:
        obstacle = short_attention_obstacle(
            dtype, num_tokens, num_heads, head_dim, target.device_kind
        )
    if choice == "auto" and kernel == "pallas" and jnp.dtype(dtype) != jnp.bfloat16:
        # The Pallas kernel's float32 products are exact, and six times slower than XLA's on a TPU.
        return "xla"
    if choice == "auto" and obstacle:
        return "xla"
    if obstacle:
        raise ValueError(
            f"config.model.attention='{choice}' does not apply: {obstacle}; take 'auto' or 'xla'"
        )
    return kernel


def _cudnn_obstacle(dtype: DTypeLike, head_dim: int, target: Target) -> str | None:
    """Returns why cuDNN's attention cannot run, or None. JAX checks the same conditions."""
    if target.platform != "cuda":
        return f"it needs an NVIDIA GPU, and the device is {target.device_kind}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, and config.model.dtype is {jnp.dtype(dtype)}"
    capability = target.compute_capability or (0, 0)
    if capability < (8, 0):
        found = ".".join(map(str, capability))
        return f"it needs compute capability 8.0 (Ampere), the GPU has {found}"
    widest = 256 if capability >= (9, 0) else 128
    if head_dim > widest or head_dim % 8:
        return f"it needs heads of a multiple of 8 up to {widest} wide, and they are {head_dim}"
    return None


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, implementation: str
) -> jax.Array:
    """Computes scaled dot-product self-attention, with the softmax in float32.

    Queries, keys, values and the result are [b, t, heads, d] of one dtype. With `causal`, a token
    attends only to itself and earlier tokens.
    """
    if implementation == "pallas":
        b, t, heads, head_dim = q.shape
        width = heads * head_dim
        qkv = jnp.concatenate([x.reshape(b, t, width) for x in (q, k, v)], axis=-1)
        no_bias = jnp.zeros(3 * width, qkv.dtype)
        out = attend_short(qkv, no_bias, num_heads=heads, causal=causal)
        return out.reshape(q.shape)
    if implementation == "cudnn":
        return attend_padded(q, k, v, causal=causal, implementation="cudnn")
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")


def attend_padded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    """Computes `attend` on sequences padded for cuDNN, with the padding masked by their lengths.

    JAX 0.10.2 and 0.12.0 reject the gradient of cuDNN's attention at odd lengths, and 77, 197, 257
    and 577 tokens are odd. The kernel's output in padded rows is never read: in the forward pass
    the slice drops it, and in the backward pass the gradient of the padding does.
    """
    b, t = q.shape[:2]
    missing = -t % _TOKENS_MULTIPLE
    if not missing:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, implementation=implementation
        )
    lengths = jnp.full(b, t, jnp.int32)
    out = jax.nn.dot_product_attention(
        *(jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v)),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        is_causal=causal,
        implementation=implementation,
    )
    return out[:, :t]


class Rotary(NamedTuple):
    """Rotary positions of tokens, float32 [t, d / 2] or [b, t, d / 2].

    Each pair of adjacent dimensions of a head (0 and 1, 2 and 3, ...) is rotated by one angle.
    """

    cos: jax.Array
    sin: jax.Array


def rotary_positions(side: int, reference_side: int, head_dim: int, *, class_token: bool) -> Rotary:
    """Returns the Perception Encoder's rotary positions of a square grid of patches.

    The first half of the pairs is rotated by the column, the second by the row; both count from 1.
    Another grid size is rescaled to the reference grid. The class token is not rotated.

    Args:
        side: of the grid, in patches.
        reference_side: of the grid that the model was trained with.
        head_dim: width of a head, a multiple of 4.
        class_token: whether a class token precedes the patches.
    """
    num_bands = head_dim // 4
    bands = 10000.0 ** -(np.arange(num_bands) / num_bands)
    places = (np.arange(side) + 1) / side * reference_side
    rows, columns = np.meshgrid(places, places, indexing="ij")
    angles = np.concatenate([places.reshape(-1, 1) * bands for places in (columns, rows)], axis=1)
    angles = np.pad(angles, [(int(class_token), 0), (0, 0)])
    return Rotary(
        jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    )


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotates queries or keys [b, t, heads, d] by their positions, in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    cos, sin = (table[..., :, None, :] for table in rotary)
    first, second = wide[..., 0::2], wide[..., 1::2]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class TowerAttention:
    """Shape, dtype and kernel ("xla", "cudnn" or "pallas") of one tower's attention."""

    num_tokens: int
    num_heads: int
    head_dim: int
    causal: bool
    dtype: DTypeLike
    kernel: str


def kernel_difference(attention: TowerAttention, device: jax.Device) -> float:
    """Compares a tower's attention kernel with XLA's on a device, on four random sequences.

    Returns:
        The largest absolute difference of the result and of the three gradients, each relative to
        the largest value that XLA's attention computes in float32. Infinite if any difference is
        not finite or if the kernel cannot be compiled or run.
    """
    rng = np.random.default_rng(0)
    shape = (4, attention.num_tokens, attention.num_heads, attention.head_dim)
    arrays = [
        jax.device_put(rng.standard_normal(shape).astype(jnp.dtype(attention.dtype)), device)
        for _ in range(4)
    ]

    def value_and_gradients(kernel: str, dtype: DTypeLike) -> list[jax.Array]:
        attend_so = functools.partial(attend, causal=attention.causal, implementation=kernel)

        @jax.jit
        def run(q, k, v, cotangent):
            out, pullback = jax.vjp(attend_so, q, k, v)
            return [out, *pullback(cotangent)]

        return run(*(array.astype(dtype) for array in arrays))

    expected = value_and_gradients("xla", jnp.float32)
    try:
        found = jax.block_until_ready(value_and_gradients(attention.kernel, attention.dtype))
    except Exception as error:  # Pallas raises its own classes; this check must not stop a run.
        logging.warning("attention kernel '%s' fails: %s", attention.kernel, error)
        return math.inf
    differences = [
        float(jnp.max(jnp.abs(ours.astype(jnp.float32) - right)) / jnp.max(jnp.abs(right)))
        for ours, right in zip(found, expected, strict=True)
    ]
    return max(differences) if np.all(np.isfinite(differences)) else math.inf
