"""CLIP's parameter names and shapes, and their names in our parameter tree.

OpenAI's, open_clip's and DiHT's state dicts share one layout: this one. Works on NumPy arrays;
files belong in `tensor_files.py`.

Our kernels are torch's transposed, and convolutions are HWIO where torch has OIHW; embeddings,
positions and the two projections are alike.
"""

from __future__ import annotations

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

# Scalars that OpenAI's archives carry besides the parameters.
EXTRAS = frozenset(("input_resolution", "context_length", "vocab_size"))
# Not parameters: the causal mask that some versions of CLIP save.
_BUFFERS = frozenset(("attn_mask",))
# open_clip's CustomTextCLIP keeps the text tower in a module of its own.
_TEXT_PREFIX = "text."
_BLOCK = "transformer.resblocks"

# CLIP's head width is 64; the big open_clip models differ (width -> heads, open_clip's
# ViT-H-14, ViT-g-14 and ViT-bigG-14), and shapes do not show it.
_UNUSUAL_HEADS = {1280: 16, 1408: 16, 1664: 16}
_HEAD_WIDTH = 64

# Of the names in a file that is no CLIP at all.
_MOST_LISTED = 12

# Ours: name prefix of concept heads in the formats that can keep them.
HEADS_PREFIX = "concept_heads."


def normalize_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One layout out of its variants: extras and buffers dropped, `text.` prefix taken off."""
    kept = {
        name: value for name, value in tensors.items() if name not in EXTRAS and not is_buffer(name)
    }
    if f"{_TEXT_PREFIX}positional_embedding" in kept:
        return {name.removeprefix(_TEXT_PREFIX): value for name, value in kept.items()}
    return kept


def is_buffer(name: str) -> bool:
    """True for the name of a mask, which is no parameter."""
    return name.rpartition(".")[2] in _BUFFERS


def is_openai_release(tensors: Mapping[str, np.ndarray]) -> bool:
    """True for the names of OpenAI's own archives, whose models have QuickGELU."""
    return tensors.keys() >= EXTRAS


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
        raise ValueError(
            f"{path}: not a CLIP with a vision transformer and CLIP's own text tower: lacks "
            f"{', '.join(missing)}; found {_listing(sorted(tensors))}"
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
            vision_layers=_count_blocks(tensors, f"visual.{_BLOCK}"),
            vision_width=vision_width,
            vision_heads=_usual_heads(vision_width),
            text_layers=_count_blocks(tensors, _BLOCK),
            text_width=text_width,
            # The text towers of the same models have heads 64 wide.
            text_heads=max(1, text_width // _HEAD_WIDTH),
            embed_dim=tensors["visual.proj"].shape[1],
            context_length=tensors["positional_embedding"].shape[0],
            vocab_size=vocab_size,
            vision_mlp_width=_mlp_width(tensors, f"visual.{_BLOCK}", vision_width),
            text_mlp_width=_mlp_width(tensors, _BLOCK, text_width),
        )
    except ValueError as error:
        raise ValueError(f"{path}: its shapes are those of no model: {error}") from error


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """CLIP's name -> shape of every parameter of `arch`."""
    ours = parameter_shapes(_abstract_parameters(arch))
    shapes = {}
    for path, name in _names(arch).items():
        shape = ours[path]
        if _kind(path) == "conv":
            shape = (shape[3], shape[2], shape[0], shape[1])
        shapes[name] = shape[::-1] if _kind(path) == "transposed" else shape
    return shapes


_LISTED = 30  # of one kind in a message: a setting of another model makes thousands of them


def check_parameters(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: str
) -> None:
    """Compares names and shapes.

    Raises:
        ValueError: lists missing, unknown and wrongly shaped parameters, the first of each kind.
    """
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    wrong = [
        f"{name} {list(found[name])} (expected {list(expected[name])})"
        for name in sorted(found.keys() & expected.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": wrong}
    lines = [
        f"{len(v)} {kind}: {', '.join(v[:_LISTED])}{', ...' * (len(v) > _LISTED)}"
        for kind, v in problems.items()
        if v
    ]
    if lines:
        raise ValueError(f"{path}: the parameters do not fit the architecture; " + "; ".join(lines))


def from_clip(tensors: Mapping[str, np.ndarray], arch: Architecture) -> dict[str, Any]:
    """Our parameter tree, one entry per block, of arrays in CLIP's layout.

    Args:
        tensors: exactly the names and shapes of `expected_shapes(arch)`.
        arch: sizes.

    Returns:
        Nested dict of float32 NumPy arrays, as `models.parameters.model_parameters` gives it;
        views of `tensors` where these are float32.
    """
    tree: dict[str, Any] = {}
    for path, name in _names(arch).items():
        value = np.asarray(tensors[name], np.float32)
        if _kind(path) == "conv":
            value = value.transpose(2, 3, 1, 0)
        elif _kind(path) == "transposed":
            value = value.T
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def to_clip(params: Mapping[str, Any], arch: Architecture) -> dict[str, np.ndarray]:
    """CLIP's layout of our parameter tree; the inverse of `from_clip`, bit for bit."""
    tensors = {}
    for path, name in _names(arch).items():
        value: Any = params
        for part in path.split("/"):
            value = value[part]
        value = np.asarray(value)
        if _kind(path) == "conv":
            value = value.transpose(3, 2, 0, 1)
        tensors[name] = value.T if _kind(path) == "transposed" else value
    return tensors


def split_heads(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(parameters of the dual encoder, concept heads under their full names)."""
    heads = {name: v for name, v in tensors.items() if name.startswith(HEADS_PREFIX)}
    return {name: v for name, v in tensors.items() if name not in heads}, heads


def heads_to_clip(heads: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Linear heads `{name: {kernel, bias}}` as `concept_heads.NAME.weight` and `.bias`."""
    tensors = {}
    for name, leaves in heads.items():
        tensors[f"{HEADS_PREFIX}{name}.weight"] = np.asarray(leaves["kernel"]).T
        tensors[f"{HEADS_PREFIX}{name}.bias"] = np.asarray(leaves["bias"])
    return tensors


def _names(arch: Architecture) -> dict[str, str]:
    """Path in our tree -> CLIP's name."""
    names = {
        "vision/patch_embedding/kernel": "visual.conv1.weight",
        "vision/class_embedding": "visual.class_embedding",
        "vision/positional_embedding": "visual.positional_embedding",
        "vision/projection/kernel": "visual.proj",
        "text/token_embedding/embedding": "token_embedding.weight",
        "text/positional_embedding": "positional_embedding",
        "text/projection/kernel": "text_projection",
        "log_logit_scale": "logit_scale",
        **_norm_names("vision/pre_norm", "visual.ln_pre"),
        **_norm_names("vision/post_norm", "visual.ln_post"),
        **_norm_names("text/final_norm", "ln_final"),
    }
    for tower, prefix, layers in (
        ("vision", "visual.", arch.vision_layers),
        ("text", "", arch.text_layers),
    ):
        for i in range(layers):
            names |= _block_names(f"{tower}/blocks/{i}", f"{prefix}{_BLOCK}.{i}")
    return names


def _block_names(ours: str, theirs: str) -> dict[str, str]:
    return {
        **_norm_names(f"{ours}/attention_norm", f"{theirs}.ln_1"),
        f"{ours}/attention/in_proj/kernel": f"{theirs}.attn.in_proj_weight",
        f"{ours}/attention/in_proj/bias": f"{theirs}.attn.in_proj_bias",
        **_linear_names(f"{ours}/attention/out_proj", f"{theirs}.attn.out_proj"),
        **_norm_names(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
        **_linear_names(f"{ours}/mlp/fc_in", f"{theirs}.mlp.c_fc"),
        **_linear_names(f"{ours}/mlp/fc_out", f"{theirs}.mlp.c_proj"),
    }


def _norm_names(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/scale": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}


def _linear_names(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/kernel": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}


def _kind(path: str) -> str:
    if path.endswith("patch_embedding/kernel"):
        return "conv"
    if path.endswith("/kernel") and not path.endswith("projection/kernel"):
        return "transposed"
    return "same"


@functools.lru_cache(maxsize=4)
def _abstract_parameters(arch: Architecture) -> dict[str, Any]:
    _, init = model_definition(arch, jnp.float32, jnp.float32)
    return jax.eval_shape(init, jax.random.key(0))


def _count_blocks(tensors: Mapping[str, np.ndarray], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d{{1,9}})\.")
    indices = [int(match[1]) for name in tensors if (match := pattern.match(name))]
    return max(indices, default=-1) + 1


def _mlp_width(tensors: Mapping[str, np.ndarray], prefix: str, width: int) -> int | None:
    """Inner width of the MLPs, or None where it is the usual one."""
    weight = tensors.get(f"{prefix}.0.mlp.c_fc.weight")
    # `check_parameters` reports a weight that is no matrix.
    if weight is None or weight.ndim != 2 or weight.shape[0] == 4 * width:
        return None
    return weight.shape[0]


def _usual_heads(width: int) -> int:
    return _UNUSUAL_HEADS.get(width, max(1, width // _HEAD_WIDTH))


def _listing(names: list[str]) -> str:
    """The first names of a file that may be anything."""
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more if names else "nothing"
