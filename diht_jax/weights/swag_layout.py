"""torchvision's names of a vision transformer's parameters, and their names in our tree.

The licence of SWAG's weights is CC-BY-NC 4.0: they, and labels that are made with them, are for
non-commercial use only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diht_jax.models.parameters import parameter_shapes
from diht_jax.models.swag import ARCHITECTURES, SwagArchitecture, swag_definition
from diht_jax.weights.layout import (
    BlockNames,
    Layout,
    Tensors,
    bias,
    blocks,
    from_layout,
    layout_shapes,
    norm,
)

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
# The classifier on top of the trunk.
_HEAD = "heads."
# How torchvision called the MLP's layers when the weights were published.
_OLD_NAMES = {"mlp.linear_1.": "mlp.0.", "mlp.linear_2.": "mlp.3."}
_HEADS_OF_WIDTH = {arch.width: arch.heads for arch in ARCHITECTURES.values()}


def normalize_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Today's names, without the classifier's parameters."""
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
    """The architecture that shapes show.

    Args:
        shapes: of `normalize_names`.
        path: of the file, for messages.
        heads: attention heads, which no shape shows; None takes torchvision's for the width.

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
    """Shapes of the parameters of the trunk by torchvision's names."""
    return layout_shapes(_layout(arch), _our_shapes(arch))


def from_torchvision(
    tensors: Mapping[str, np.ndarray], path: str, heads: int | None = None
) -> tuple[SwagArchitecture, dict[str, Any]]:
    """Converts a state dict.

    Args:
        tensors: name -> array; the classifier may be among them and is left out.
        path, heads: see `infer_architecture`.

    Returns:
        The architecture, and the parameters as `swag_definition` has them, in float32.

    Raises:
        ValueError: parameters are missing, unknown or of another shape; lists them.
    """
    tensors = normalize_names(tensors)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    arch = infer_architecture(shapes, path, heads)
    params = from_layout(tensors, _layout(arch), _our_shapes(arch), path)
    layers = params["blocks"].values()
    params["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return arch, params


def _our_shapes(arch: SwagArchitecture) -> dict[str, tuple[int, ...]]:
    """Path -> shape, layer by layer."""
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
