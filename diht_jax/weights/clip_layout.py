"""CLIP's parameter names and shapes, and their names in our parameter tree.

OpenAI's, open_clip's and DiHT's state dicts share one layout: this one. Works on NumPy arrays;
files belong in `tensor_files.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax.models.parameters import model_definition, parameter_shapes
from diht_jax.models.zoo import Architecture
from diht_jax.weights.layout import (
    BlockNames,
    Layout,
    Tensors,
    blocks,
    from_layout,
    layout_shapes,
    linear,
    norm,
    to_layout,
)

# Scalars that OpenAI's archives carry besides the parameters.
EXTRAS = frozenset(("input_resolution", "context_length", "vocab_size"))
TEXT_PREFIX = "text."
_BLOCKS = "transformer.resblocks."
_BLOCK = BlockNames("ln_1", ("attn.in_proj_",), "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")

# CLIP's head width is 64; the big open_clip models differ (width -> heads, open_clip's
# ViT-H-14, ViT-g-14 and ViT-bigG-14), and shapes do not show it.
_UNUSUAL_HEADS = {1280: 16, 1408: 16, 1664: 16}
_HEAD_WIDTH = 64

# Of the names in a file that is no CLIP at all.
_MOST_LISTED = 12

# Fields of an architecture that decide which parameters there are, or what is done with them.
_PARTS = (
    *("text_activation", "class_token", "vision_pool_heads", "rotary_grid"),
    *("vision_projection", "text_projection", "causal_text", "text_pool"),
)

# Ours: name prefix of concept heads in the formats that can keep them.
HEADS_PREFIX = "concept_heads."


def normalize_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One layout out of its variants, without OpenAI's extras and the causal mask of some versions.

    open_clip's CustomTextCLIP keeps the text tower in a module `text`; with an image tower of its
    own the prefix is taken off.
    """
    kept = {
        name: value
        for name, value in tensors.items()
        if name not in EXTRAS and name.rpartition(".")[2] != "attn_mask"
    }
    if "visual.conv1.weight" in kept and f"{TEXT_PREFIX}positional_embedding" in kept:
        return {name.removeprefix(TEXT_PREFIX): value for name, value in kept.items()}
    return kept


def infer_architecture(tensors: Mapping[str, np.ndarray], path: str) -> Architecture:
    """The architecture that the shapes show.

    Heads are those of CLIP and open_clip for the width, the activation is exact GELU: neither
    shows in a shape, so a config or the caller must state others.

    Args:
        tensors: of `normalize_names`.
        path: of the file, for messages.

    Raises:
        ValueError: the names are not those of a CLIP with a vision transformer.
    """
    needed = {
        "visual.conv1.weight": 4,
        "visual.positional_embedding": 2,
        "visual.proj": 2,
        "token_embedding.weight": 2,
        "positional_embedding": 2,
    }
    missing = [
        name
        for name, rank in needed.items()
        if name not in tensors or tensors[name].ndim != rank or not tensors[name].size
    ]
    if missing:
        names = sorted(tensors)
        more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
        raise ValueError(
            f"{path}: not a CLIP with a vision transformer and CLIP's own text tower: lacks "
            f"{', '.join(missing)}; found {', '.join(names[:_MOST_LISTED]) or 'nothing'}{more}"
        )
    vision_width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
    num_patches = tensors["visual.positional_embedding"].shape[0] - 1
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise ValueError(f"{path}: {num_patches} image positions, which are no square grid")
    vocab_size, text_width = tensors["token_embedding.weight"].shape
    try:
        return Architecture(
            image_size=side * patch_size,
            patch_size=patch_size,
            vision_layers=_count_blocks(tensors, f"visual.{_BLOCKS}"),
            vision_width=vision_width,
            vision_heads=_UNUSUAL_HEADS.get(vision_width, max(1, vision_width // _HEAD_WIDTH)),
            text_layers=_count_blocks(tensors, _BLOCKS),
            text_width=text_width,
            # The text towers of the same models have heads 64 wide.
            text_heads=max(1, text_width // _HEAD_WIDTH),
            embed_dim=tensors["visual.proj"].shape[1],
            context_length=tensors["positional_embedding"].shape[0],
            vocab_size=vocab_size,
            vision_mlp_width=_mlp_width(tensors, f"visual.{_BLOCKS}", vision_width),
            text_mlp_width=_mlp_width(tensors, _BLOCKS, text_width),
        )
    except ValueError as error:
        raise ValueError(f"{path}: its shapes are those of no model: {error}") from error


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """CLIP's name -> shape of every parameter of `arch`."""
    return layout_shapes(layout(arch), our_shapes(arch))


def from_clip(
    tensors: Mapping[str, np.ndarray], arch: Architecture, where: str = "state dict"
) -> dict[str, Any]:
    """Our parameter tree, one entry per block, of arrays in CLIP's layout; see `from_layout`."""
    return from_layout(tensors, layout(arch), our_shapes(arch), where)


def to_clip(params: Mapping[str, Any], arch: Architecture) -> dict[str, np.ndarray]:
    """CLIP's layout of our parameter tree; the inverse of `from_clip`, bit for bit."""
    return to_layout(params, layout(arch))


def heads_to_clip(heads: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Linear heads `{name: {kernel, bias}}` as `concept_heads.NAME.weight` and `.bias`."""
    tensors = {}
    for name, leaves in heads.items():
        tensors[f"{HEADS_PREFIX}{name}.weight"] = np.asarray(leaves["kernel"]).T
        tensors[f"{HEADS_PREFIX}{name}.bias"] = np.asarray(leaves["bias"])
    return tensors


@functools.lru_cache(maxsize=4)
def our_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Path in our tree -> shape."""
    _, init = model_definition(arch, jnp.float32, jnp.float32)
    return parameter_shapes(jax.eval_shape(init, jax.random.key(0)))


def parts_unlike_clip(arch: Architecture) -> dict[str, Any]:
    """The fields of a model in which it has other parts than CLIP's."""
    return {
        field.name: getattr(arch, field.name)
        for field in dataclasses.fields(Architecture)
        if field.name in _PARTS and getattr(arch, field.name) != field.default
    }


def check_is_clip(arch: Architecture) -> None:
    """Raises ValueError for a model with other parts than CLIP's."""
    parts = parts_unlike_clip(arch)
    if parts:
        shown = ", ".join(f"{name}={value}" for name, value in parts.items())
        raise ValueError(f"CLIP's layout has no place for a model with {shown}")


def layout(arch: Architecture) -> Layout:
    """The layout of a model."""
    check_is_clip(arch)
    return {
        "vision/patch_embedding/kernel": Tensors(("visual.conv1.weight",), "convolution"),
        "vision/class_embedding": Tensors(("visual.class_embedding",)),
        "vision/positional_embedding": Tensors(("visual.positional_embedding",)),
        "vision/projection/kernel": Tensors(("visual.proj",)),
        "log_logit_scale": Tensors(("logit_scale",)),
        **norm("vision/pre_norm", "visual.ln_pre"),
        **norm("vision/post_norm", "visual.ln_post"),
        **blocks("vision/blocks", f"visual.{_BLOCKS}", arch.vision_layers, _BLOCK),
        **text_layout(arch),
    }


def text_layout(arch: Architecture, prefix: str = "") -> dict[str, Tensors]:
    """The layout of the text tower, whose names begin with the prefix."""
    found = {
        "text/token_embedding/embedding": Tensors((f"{prefix}token_embedding.weight",)),
        "text/positional_embedding": Tensors((f"{prefix}positional_embedding",)),
        **norm("text/final_norm", f"{prefix}ln_final"),
        **blocks("text/blocks", f"{prefix}{_BLOCKS}", arch.text_layers, _BLOCK),
    }
    if arch.text_projection == "bias":
        return {**found, **linear("text/projection", f"{prefix}text_projection")}
    return {**found, "text/projection/kernel": Tensors((f"{prefix}text_projection",))}


def _count_blocks(tensors: Mapping[str, np.ndarray], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}(\d{{1,9}})\.")
    indices = [int(match[1]) for name in tensors if (match := pattern.match(name))]
    return max(indices, default=-1) + 1


def _mlp_width(tensors: Mapping[str, np.ndarray], prefix: str, width: int) -> int | None:
    """Inner width of the MLPs, or None where it is the usual one."""
    weight = tensors.get(f"{prefix}0.mlp.c_fc.weight")
    # `check_parameters` reports a weight that is no matrix.
    if weight is None or weight.ndim != 2 or weight.shape[0] == 4 * width:
        return None
    return weight.shape[0]
