"""SWAG's vision transformer: a frozen teacher, not a tower that is trained here.

The network is torchvision's `VisionTransformer` (Dosovitskiy et al. 2020, arXiv 2010.11929) with
the weights of SWAG (Singh et al. 2022, arXiv 2201.08371): unlike CLIP's tower it has a bias in the
patch convolution, no LayerNorm before the blocks, one over all tokens after them, and epsilon 1e-6.
Reading weight files belongs in `weights.swag_layout`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from diht_jax.models.transformer import (
    BlockInit,
    Execution,
    layer_norm,
    make_blocks,
    normal_init,
    run_blocks,
)

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class SwagArchitecture:
    """Sizes of the network.

    Attributes:
        image_size: side of the square input, in pixels.
        patch_size: side of a patch, in pixels; divides `image_size`.
        layers, width, heads, mlp_width: of the blocks; `width` is the size of the feature.
    """

    image_size: int
    patch_size: int
    layers: int
    width: int
    heads: int
    mlp_width: int


# The sizes of torchvision's functions of the same names.
ARCHITECTURES = {
    "vit_b_16": SwagArchitecture(224, 16, 12, 768, 12, 3072),
    "vit_l_16": SwagArchitecture(224, 16, 24, 1024, 16, 4096),
    "vit_h_14": SwagArchitecture(224, 14, 32, 1280, 16, 5120),
}


class SwagTransformer(nnx.Module):
    """Patches, class token, positions, blocks, LayerNorm; the class token is the feature."""

    def __init__(self, arch: SwagArchitecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": jnp.float32, "rngs": rngs}
        self.dtype = dtype
        self.image_size = arch.image_size
        self.patch_embedding = nnx.Conv(
            3,
            arch.width,
            kernel_size=(arch.patch_size, arch.patch_size),
            strides=(arch.patch_size, arch.patch_size),
            padding="VALID",
            **dtypes,
        )
        num_patches = (arch.image_size // arch.patch_size) ** 2
        small_normal = normal_init(0.02)
        self.class_embedding = nnx.Param(jnp.zeros((arch.width,)))
        self.positional_embedding = nnx.Param(
            small_normal(rngs.params(), (num_patches + 1, arch.width), jnp.float32)
        )
        self.blocks = make_blocks(
            Execution(scan_layers=True),
            arch.layers,
            arch.width,
            arch.heads,
            num_tokens=None,
            mlp_width=arch.mlp_width,
            init=BlockInit.torch_default(arch.width, arch.mlp_width),
            causal=False,
            activation="gelu",
            epsilon=_EPSILON,
            **dtypes,
        )
        self.final_norm = layer_norm(arch.width, _EPSILON, **dtypes)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features of normalised images -> [b, width] in the compute dtype."""
        expected = (self.image_size, self.image_size, 3)
        if images.shape[1:] != expected:
            raise ValueError(f"expected images of shape [b, {expected}], got {images.shape}")
        patches = self.patch_embedding(images.astype(self.dtype))
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        class_token = self.class_embedding[...].astype(self.dtype)
        class_tokens = jnp.broadcast_to(class_token, (len(patches), 1, len(class_token)))
        x = jnp.concatenate([class_tokens, patches], axis=1)
        x = run_blocks(self.blocks, x + self.positional_embedding[...].astype(self.dtype))
        return self.final_norm(x[:, 0])


@functools.lru_cache(maxsize=4)
def swag_definition(
    arch: SwagArchitecture, dtype: DTypeLike
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The network without its parameters.

    Args:
        arch: sizes.
        dtype: of the computation, such as "float32".

    Returns:
        The graph, and the parameters as a nested dict of `jax.ShapeDtypeStruct`; blocks are
        stacked along a first axis of layers. Nothing is computed, however large it is.
    """
    model = nnx.eval_shape(
        lambda: SwagTransformer(arch, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(params=0))
    )
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)
