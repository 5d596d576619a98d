"""torchvision's names of a vision transformer's parameters, and their names in our tree.

The licence of SWAG's weights is CC-BY-NC 4.0: they, and labels that are made with them, are for
non-commercial use only.

Our kernels are torch's transposed, convolutions are HWIO where torch has OIHW, and the parameters
of all blocks are stacked along a first axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diht_jax.models.parameters import parameter_shapes
from diht_jax.models.swag import ARCHITECTURES, SwagArchitecture, swag_definition
from diht_jax.weights.clip_layout import check_parameters

LICENCE = "CC-BY-NC 4.0 (SWAG, Meta): non-commercial use only"
# The paper's frozen trunk: torchvision's IMAGENET1K_SWAG_LINEAR_V1.
URLS = {
    "vit_b_16": "https://download.pytorch.org/models/vit_b_16_lc_swag-4e70ced5.pth",
    "vit_l_16": "https://download.pytorch.org/models/vit_l_16_lc_swag-4d563306.pth",
    "vit_h_14": "https://download.pytorch.org/models/vit_h_14_lc_swag-c1eb923e.pth",
}

_LAYER = "encoder.layers.encoder_layer_"
# The classifier on top of the trunk.
_HEAD = "heads."
# How torchvision called the MLP's layers when the weights were published.
_OLD_NAMES = {"mlp.linear_1.": "mlp.0.", "mlp.linear_2.": "mlp.3."}
_HEADS_OF_WIDTH = {arch.width: arch.heads for arch in ARCHITECTURES.values()}

# Path in a block -> torchvision's name in a layer.
_BLOCK_NAMES = {
    "attention_norm/scale": "ln_1.weight",
    "attention_norm/bias": "ln_1.bias",
    "attention/in_proj/kernel": "self_attention.in_proj_weight",
    "attention/in_proj/bias": "self_attention.in_proj_bias",
    "attention/out_proj/kernel": "self_attention.out_proj.weight",
    "attention/out_proj/bias": "self_attention.out_proj.bias",
    "mlp_norm/scale": "ln_2.weight",
    "mlp_norm/bias": "ln_2.bias",
    "mlp/fc_in/kernel": "mlp.0.weight",
    "mlp/fc_in/bias": "mlp.0.bias",
    "mlp/fc_out/kernel": "mlp.3.weight",
    "mlp/fc_out/bias": "mlp.3.bias",
}
_NAMES = {
    "patch_embedding/kernel": "conv_proj.weight",
    "patch_embedding/bias": "conv_proj.bias",
    "class_embedding": "class_token",
    "positional_embedding": "encoder.pos_embedding",
    "final_norm/scale": "encoder.ln.weight",
    "final_norm/bias": "encoder.ln.bias",
}


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
    shapes = {}
    for path, shape in parameter_shapes(swag_definition(arch, "float32")[1]).items():
        if path.startswith("blocks/"):
            name = _BLOCK_NAMES[path.removeprefix("blocks/")]
            reversed_shape = shape[1:][::-1]
            shapes |= {f"{_LAYER}{i}.{name}": reversed_shape for i in range(arch.layers)}
        elif path == "patch_embedding/kernel":
            shapes[_NAMES[path]] = (shape[3], shape[2], shape[0], shape[1])
        elif path == "class_embedding":
            shapes[_NAMES[path]] = (1, 1, *shape)
        else:
            shapes[_NAMES[path]] = (1, *shape) if path == "positional_embedding" else shape
    return shapes


def from_torchvision(
    tensors: Mapping[str, np.ndarray], path: str, heads: int | None = None
) -> tuple[SwagArchitecture, dict[str, Any]]:
    """Converts a state dict.

    Args:
        tensors: name -> array; the classifier may be among them and is left out.
        path: of the file, for messages.
        heads: see `infer_architecture`.

    Returns:
        The architecture, and the parameters: a nested dict of float32 NumPy arrays in the form of
        `swag_definition`.

    Raises:
        ValueError: parameters are missing, unknown or of another shape; lists them.
    """
    tensors = normalize_names(tensors)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    arch = infer_architecture(shapes, path, heads)
    check_parameters(shapes, expected_shapes(arch), path)
    params: dict[str, Any] = {}
    for our_name in parameter_shapes(swag_definition(arch, "float32")[1]):
        if our_name.startswith("blocks/"):
            name = _BLOCK_NAMES[our_name.removeprefix("blocks/")]
            layers = [
                _convert(our_name, tensors[f"{_LAYER}{i}.{name}"]) for i in range(arch.layers)
            ]
            value = np.stack(layers)
        else:
            value = _convert(our_name, tensors[_NAMES[our_name]])
        *parents, last = our_name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return arch, params


def _convert(our_name: str, tensor: np.ndarray) -> np.ndarray:
    value = np.asarray(tensor).astype(np.float32)
    if our_name == "patch_embedding/kernel":
        return value.transpose(2, 3, 1, 0)
    if our_name == "class_embedding":
        return value[0, 0]
    if our_name == "positional_embedding":
        return value[0]
    return value.T if our_name.endswith("/kernel") else value
