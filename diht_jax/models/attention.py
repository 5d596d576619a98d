"""Which implementation of attention a tower uses on the device at hand.

Asked by `transformer.py` while the model is traced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def attention_implementation(
    choice: str, dtype: DTypeLike, head_dim: int, device: jax.Device | None = None
) -> str:
    """The argument `implementation` of `jax.nn.dot_product_attention`.

    Args:
        choice: "auto" takes cuDNN's fused attention where it applies, else XLA's; "xla" and
            "cudnn" insist.
        dtype: of queries, keys and values.
        head_dim: width of a head.
        device: that the model will run on; the default backend's by default.

    Raises:
        ValueError: an unknown choice, or "cudnn" where it does not apply.
    """
    check_attention(choice)
    if choice == "xla":
        return "xla"
    obstacle = _cudnn_obstacle(dtype, head_dim, device or jax.devices()[0])
    if choice == "cudnn" and obstacle:
        raise ValueError(
            f"config.model.attention='cudnn' does not apply: {obstacle}; take 'auto' or 'xla'"
        )
    return "xla" if obstacle else "cudnn"


def check_attention(choice: str) -> None:
    """Raises ValueError unless `choice` is one of `IMPLEMENTATIONS`."""
    if choice not in IMPLEMENTATIONS:
        raise ValueError(
            f"config.model.attention='{choice}': expected one of {', '.join(IMPLEMENTATIONS)}"
        )


def _cudnn_obstacle(dtype: DTypeLike, head_dim: int, device: jax.Device) -> str | None:
    """Why cuDNN's attention cannot run, or None; the conditions are those that JAX checks."""
    if device.platform not in ("gpu", "cuda") or "cuda" not in device.client.platform_version:
        return f"it needs an NVIDIA GPU, and the device is {device.device_kind}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, and config.model.dtype is {jnp.dtype(dtype)}"
    capability = tuple(int(part) for part in device.compute_capability.split("."))
    if capability < (8, 0):
        return f"it needs compute capability 8.0 (Ampere), the GPU has {device.compute_capability}"
    widest = 256 if capability >= (9, 0) else 128
    if head_dim > widest or head_dim % 8:
        return f"it needs heads of a multiple of 8 up to {widest} wide, and they are {head_dim}"
    return None
