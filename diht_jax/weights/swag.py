"""SWAG's vision transformer and its weight files: a frozen teacher, not a trainable tower.

The network is torchvision's `VisionTransformer` (Dosovitskiy et al. 2020, arXiv 2010.11929) with
the weights of SWAG (Singh et al. 2022, arXiv 2201.08371): unlike CLIP's tower it has a bias in the
patch convolution, no LayerNorm before the blocks, one over all tokens after them, and epsilon 1e-6.

SWAG's weights are licensed under CC-BY-NC 4.0: they, and labels made with them, are for
non-commercial use only.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from diht_jax.models.parameters import ParameterKeys, parameter_shapes
from diht_jax.models.transformer import (
    BlockInit,
    Execution,
    layer_norm,
    make_blocks,
    normal_init,
    run_blocks,
)
from diht_jax.weights.clip_layout import (
    BlockNames,
    Layout,
    Tensors,
    bias,
    blocks,
    from_layout,
    layout_shapes,
    norm,
)

_EPSILON = 1e-6


class SwagArchitecture(NamedTuple):
    """Sizes of the network."""

    image_size: int  # side of the square input, in pixels
    patch_size: int  # side of a patch, in pixels; divides `image_size`
    layers: int
    width: int  # of the blocks, and of the feature
    heads: int
    mlp_width: int


# Sizes from the torchvision functions of the same names.
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
        self.final_norm = layer_norm(arch.width, epsilon=_EPSILON, **dtypes)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Computes the features of normalised images: [b, width] in the compute dtype."""
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
    """Returns the network without parameter values, for a compute dtype such as "float32".

    Returns:
        The graph, and the parameters as a nested dict of `jax.ShapeDtypeStruct`, with blocks
        stacked along a first axis of layers. Nothing is computed.
    """
    model = nnx.eval_shape(
        lambda: SwagTransformer(arch, dtype=jnp.dtype(dtype), rngs=ParameterKeys(0))
    )
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


LICENCE = "CC-BY-NC 4.0 (SWAG, Meta): non-commercial use only"
# Recalled as the paper's frozen trunk: torchvision's IMAGENET1K_SWAG_LINEAR_V1.
URLS = {
    "vit_b_16": "https://download.pytorch.org/models/vit_b_16_lc_swag-4e70ced5.pth",
    "vit_l_16": "https://download.pytorch.org/models/vit_l_16_lc_swag-4d563306.pth",
    "vit_h_14": "https://download.pytorch.org/models/vit_h_14_lc_swag-c1eb923e.pth",
}

_LAYER = "encoder.layers.encoder_layer_"
_BLOCK = BlockNames(
    attention_norm="ln_1",
    in_proj=("self_attention.in_proj_",),
    out_proj="self_attention.out_proj",
    mlp_norm="ln_2",
    fc_in="mlp.0",
    fc_out="mlp.3",
)
# Prefix of the classifier on top of the trunk.
_HEAD = "heads."
# torchvision's names of the MLP layers when the weights were published.
_OLD_NAMES = {"mlp.linear_1.": "mlp.0.", "mlp.linear_2.": "mlp.3."}
_HEADS_OF_WIDTH = {arch.width: arch.heads for arch in ARCHITECTURES.values()}


def normalize_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Converts to today's names, without the classifier's parameters."""
    kept = {}
    for name, value in tensors.items():
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        if not name.startswith(_HEAD):
            kept[name] = value
    return kept


def infer_architecture(
    shapes: Mapping[str, tuple[int, ...]], path: str, heads: int | None = None
) -> SwagArchitecture:
    """Infers the architecture from shapes, by the names of `normalize_names`.

    Shapes do not reveal the number of attention heads; None takes torchvision's for the width.

    Raises:
        ValueError: the names are not those of torchvision's vision transformer, or its width is
            an unusual one and `heads` is None.
    """
    needed = ("conv_proj.weight", "encoder.pos_embedding", f"{_LAYER}0.mlp.0.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(
            f"{path}: not a vision transformer of torchvision: lacks {', '.join(missing)}; "
            f"it has {', '.join(sorted(shapes)[:5]) or 'nothing'} ..."
        )
    width, _, patch_size, _ = shapes["conv_proj.weight"]
    side = math.isqrt(shapes["encoder.pos_embedding"][1] - 1)
    layers = [int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(_LAYER)}(\d+)\.", name))]
    heads = heads or _HEADS_OF_WIDTH.get(width)
    if heads is None:
        raise ValueError(
            f"{path}: width {width} is not one of torchvision's; set the number of heads"
        )
    return SwagArchitecture(
        image_size=side * patch_size,
        patch_size=patch_size,
        layers=max(layers) + 1,
        width=width,
        heads=heads,
        mlp_width=shapes[f"{_LAYER}0.mlp.0.weight"][0],
    )


def expected_shapes(arch: SwagArchitecture) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the trunk's parameters by torchvision's names."""
    return layout_shapes(_layout(arch), _our_shapes(arch))


def from_torchvision(
    tensors: Mapping[str, np.ndarray], path: str, heads: int | None = None
) -> tuple[SwagArchitecture, dict[str, Any]]:
    """Converts a state dict, without the classifier; see `infer_architecture`.

    Returns:
        The architecture, and the parameters as in `swag_definition`, in float32.

    Raises:
        ValueError: parameters are missing, unknown or wrongly shaped; lists them.
    """
    tensors = normalize_names(tensors)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    arch = infer_architecture(shapes, path, heads)
    params = from_layout(tensors, _layout(arch), _our_shapes(arch), path)
    layers = params["blocks"].values()
    params["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return arch, params


def _our_shapes(arch: SwagArchitecture) -> dict[str, tuple[int, ...]]:
    """Maps paths to shapes, layer by layer."""
    shapes = {}
    for path, shape in parameter_shapes(swag_definition(arch, "float32")[1]).items():
        tower, _, rest = path.partition("/")
        if tower == "blocks":
            shapes |= {f"blocks/{i}/{rest}": shape[1:] for i in range(arch.layers)}
        else:
            shapes[path] = shape
    return shapes


def _layout(arch: SwagArchitecture) -> Layout:
    return {
        "patch_embedding/kernel": Tensors(("conv_proj.weight",), "convolution"),
        **bias("patch_embedding", "conv_proj"),
        "class_embedding": Tensors(("class_token",), "plane"),
        "positional_embedding": Tensors(("encoder.pos_embedding",), "row"),
        **norm("final_norm", "encoder.ln"),
        **blocks("blocks", _LAYER, arch.layers, _BLOCK),
    }
