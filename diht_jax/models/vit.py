"""The image tower: CLIP's vision transformer (DiHT's official code, paper note sec. 5).

Takes float images already normalised; resizing and normalisation live in `data.transforms`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from diht_jax.models.transformer import Block, BlockInit, layer_norm, normal_init, uniform_init
from diht_jax.models.zoo import Architecture


class VisionTransformer(nnx.Module):
    """Patches, class token, positions, blocks; class-token pooling and projection."""

    def __init__(
        self, arch: Architecture, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        width, patch = arch.vision_width, arch.patch_size
        num_patches = (arch.image_size // patch) ** 2
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        scaled_normal = normal_init(width**-0.5)
        self.dtype = dtype
        self.image_size = arch.image_size
        self.patch_embedding = nnx.Conv(
            3,
            width,
            kernel_size=(patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=False,
            kernel_init=uniform_init((3 * patch * patch) ** -0.5),
            **dtypes,
        )
        self.class_embedding = nnx.Param(scaled_normal(rngs.params(), (width,), param_dtype))
        self.positional_embedding = nnx.Param(
            scaled_normal(rngs.params(), (num_patches + 1, width), param_dtype)
        )
        self.pre_norm = layer_norm(width, **dtypes)
        init = BlockInit.torch_default(width)
        self.blocks = nnx.List(
            [
                Block(width, arch.vision_heads, init, causal=False, **dtypes)
                for _ in range(arch.vision_layers)
            ]
        )
        self.post_norm = layer_norm(width, **dtypes)
        self.projection = nnx.Linear(
            width, arch.embed_dim, use_bias=False, kernel_init=scaled_normal, **dtypes
        )

    def __call__(
        self,
        images: jax.Array,
        *,
        patch_dropout: float = 0.0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Embeds images.

        Args:
            images: float [b, size, size, 3], normalised with CLIP's mean and std.
            patch_dropout: share of the patches left out, chosen anew for every image
                (FLIP, arXiv 2212.00794); the class token always stays.
            key: random key; needed when `patch_dropout` is positive.

        Returns:
            [b, d] in the compute dtype, not normalised.
        """
        expected = (self.image_size, self.image_size, 3)
        if images.shape[1:] != expected:
            raise ValueError(f"expected images of shape [b, {expected}], got {images.shape}")
        b = images.shape[0]
        patches = self.patch_embedding(images.astype(self.dtype))
        patches = patches.reshape(b, -1, patches.shape[-1])
        positions = self.positional_embedding[...].astype(self.dtype)
        patches = patches + positions[1:]
        if patch_dropout > 0.0:
            patches = drop_patches(patches, patch_dropout, key)
        class_token = self.class_embedding[...].astype(self.dtype) + positions[0]
        class_tokens = jnp.broadcast_to(class_token, (b, 1, class_token.shape[-1]))
        x = self.pre_norm(jnp.concatenate([class_tokens, patches], axis=1))
        for block in self.blocks:
            x = block(x)
        return self.projection(self.post_norm(x[:, 0]))


def drop_patches(patches: jax.Array, share: float, key: jax.Array | None) -> jax.Array:
    """Keeps a random subset of the patches of every image, each its own.

    Args:
        patches: [b, t, width].
        share: in (0, 1), part of the t patches left out; at least one patch is kept.
        key: random key.

    Returns:
        [b, max(1, floor(t * (1 - share))), width].
    """
    if key is None:
        raise ValueError("patch_dropout is positive, so a random key is needed; got none")
    b, t, _ = patches.shape
    kept = max(1, math.floor(t * (1.0 - share)))
    order = jnp.argsort(jax.random.uniform(key, (b, t)), axis=1)[:, :kept]
    return jnp.take_along_axis(patches, order[:, :, None], axis=1)
