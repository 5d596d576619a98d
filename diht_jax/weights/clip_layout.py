"""CLIP's parameter names and shapes, and tables that map state dicts to our parameter tree.

A `Layout` maps each path in our tree to the tensors of another library with its values. Our kernels
are transposed relative to torch's, and convolutions are HWIO instead of OIHW. State dicts of
OpenAI, open_clip and DiHT share one layout, CLIP's. This module works on NumPy arrays; files are
handled in `tensor_files.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diht_jax.models.parameters import ModelDefinition, parameter_shapes
from diht_jax.models.zoo import Architecture

_SHOWN = 8
_FORMS: dict[str, tuple[Callable, Callable]] = {  # ours -> theirs, theirs -> ours
    "same": (lambda x: x, lambda x: x),
    "transposed": (lambda x: x.T, lambda x: x.T),
    "convolution": (lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0)),
    "row": (lambda x: x[None], lambda x: x[0]),
    "plane": (lambda x: x[None, None], lambda x: x[0, 0]),
}


class Tensors(NamedTuple):
    """The tensors of another library that form one of our arrays.

    Several tensors are concatenated along the last axis of our array.
    """

    names: tuple[str, ...]
    form: str = "same"  # conversion between theirs and ours, a key of `_FORMS`
    shares: tuple[int, ...] = ()  # relative sizes along that axis, if they differ


Layout = Mapping[str, Tensors]


class BlockNames(NamedTuple):
    """Another library's names for the parts of a block; `in_proj` may be several, with the dot."""

    attention_norm: str
    in_proj: tuple[str, ...]
    out_proj: str
    mlp_norm: str
    fc_in: str
    fc_out: str


def norm(ours: str, theirs: str) -> dict[str, Tensors]:
    """Returns the entries of a LayerNorm."""
    return {f"{ours}/scale": Tensors((f"{theirs}.weight",)), **bias(ours, theirs)}


def linear(
    ours: str, *theirs: str, dot: str = ".", shares: tuple[int, ...] = ()
) -> dict[str, Tensors]:
    """Returns the entries of a linear layer, which may have several parts in the other library."""
    weights = tuple(f"{name}{dot}weight" for name in theirs)
    biases = tuple(f"{name}{dot}bias" for name in theirs)
    return {
        f"{ours}/kernel": Tensors(weights, "transposed", shares),
        f"{ours}/bias": Tensors(biases, "same", shares),
    }


def bias(ours: str, theirs: str) -> dict[str, Tensors]:
    """Returns the entry of a bias."""
    return {f"{ours}/bias": Tensors((f"{theirs}.bias",))}


def blocks(ours: str, theirs: str, layers: int, names: BlockNames) -> dict[str, Tensors]:
    """Returns the entries of a tower's blocks: `ours/0`, ..., named `theirs0`, ... over there."""
    found: dict[str, Tensors] = {}
    for i in range(layers):
        block, prefix = f"{ours}/{i}", f"{theirs}{i}."
        in_proj = (f"{prefix}{name}" for name in names.in_proj)
        found |= {
            **norm(f"{block}/attention_norm", f"{prefix}{names.attention_norm}"),
            **linear(f"{block}/attention/in_proj", *in_proj, dot=""),
            **linear(f"{block}/attention/out_proj", f"{prefix}{names.out_proj}"),
            **norm(f"{block}/mlp_norm", f"{prefix}{names.mlp_norm}"),
            **linear(f"{block}/mlp/fc_in", f"{prefix}{names.fc_in}"),
            **linear(f"{block}/mlp/fc_out", f"{prefix}{names.fc_out}"),
        }
    return found


def to_layout(params: Mapping[str, Any], layout: Layout) -> dict[str, np.ndarray]:
    """Converts a parameter tree to a state dict of views of its arrays."""
    flat, found = traverse_util.flatten_dict(params, sep="/"), {}
    for path, (names, form, shares) in layout.items():
        parts = [np.asarray(flat[path])]
        if len(names) > 1:
            ends = np.cumsum(shares or [1] * len(names))
            parts = np.split(parts[0], parts[0].shape[-1] * ends[:-1] // ends[-1], axis=-1)
        for name, part in zip(names, parts, strict=True):
            found[name] = _FORMS[form][0](part)
    return found


def from_layout(
    tensors: Mapping[str, np.ndarray], layout: Layout, shapes: Mapping[str, tuple], where: str
) -> dict[str, Any]:
    """Converts a state dict to a parameter tree; the exact inverse of `to_layout`.

    The arrays are float32, and views of `tensors` that are float32. `shapes` are the shapes of our
    tree by path, and `where` is the file, for messages.

    Raises:
        ValueError: tensors are missing, unknown or of the wrong shape (lists the first of each
            kind), or not floating point.
    """
    found = {name: value.shape for name, value in tensors.items()}
    check_parameters(found, layout_shapes(layout, shapes), where)
    for name, value in tensors.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"{where}: parameter '{name}' is {value.dtype}; expected floating point"
            )
    flat = {}
    for path, (names, form, _) in layout.items():
        parts = [_FORMS[form][1](np.asarray(tensors[name], np.float32)) for name in names]
        flat[path] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return traverse_util.unflatten_dict(flat, sep="/")


def layout_shapes(layout: Layout, shapes: Mapping[str, tuple]) -> dict[str, tuple[int, ...]]:
    """Converts the shapes of our arrays by path to those of the tensors by name."""
    empty = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    tensors = to_layout(traverse_util.unflatten_dict(empty, sep="/"), layout)
    return {name: value.shape for name, value in tensors.items()}


def check_parameters(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compares names and shapes.

    Raises:
        ValueError: parameters are missing, unknown or wrongly shaped; lists the first of each kind.
    """
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(found[name])} (expected {list(expected[name])})"
            for name in sorted(found.keys() & expected.keys())
            if tuple(found[name]) != tuple(expected[name])
        ],
    }
    lines = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ValueError(
            f"{where}: the parameters do not fit the architecture; " + "; ".join(lines)
        )


def _listed(names: list[str]) -> str:
    """Formats the first of several names."""
    return ", ".join(names[:_SHOWN] + ["..."] * (len(names) > _SHOWN))


# Scalars in OpenAI's archives that are not parameters.
EXTRAS = frozenset(("input_resolution", "context_length", "vocab_size"))
TEXT_PREFIX = "text."
_BLOCKS = "transformer.resblocks."
_BLOCK = BlockNames("ln_1", ("attn.in_proj_",), "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")

# Heads of the big open_clip models (ViT-H-14, ViT-g-14, ViT-bigG-14) by width: their head width is
# not CLIP's 64, and shapes do not reveal it.
_UNUSUAL_HEADS = {1280: 16, 1408: 16, 1664: 16}
_HEAD_WIDTH = 64

# Fields of an architecture that change which parameters it has, or how they are used.
_PARTS = (
    *("text_activation", "class_token", "vision_pool_heads", "rotary_grid"),
    *("vision_projection", "text_projection", "causal_text", "text_pool"),
)

# Our extension: name prefix of concept heads, in formats that can hold them.
HEADS_PREFIX = "concept_heads."


def normalize_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Unifies variants of the layout; drops OpenAI's extras and the causal mask of some versions.

    open_clip's CustomTextCLIP has its text tower in a module `text`; this prefix is removed if the
    image tower is open_clip's own.
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
    """Infers the architecture from the shapes of tensors from `normalize_names`.

    The number of heads is that of CLIP and open_clip for the width, and the activation is exact
    GELU. Shapes do not reveal either, so a config or the caller must state other
    values.

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
            f"{', '.join(missing)}; found {_listed(sorted(tensors)) or 'nothing'}"
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
            # Text towers of these models have heads of width 64.
            text_heads=max(1, text_width // _HEAD_WIDTH),
            embed_dim=tensors["visual.proj"].shape[1],
            context_length=tensors["positional_embedding"].shape[0],
            vocab_size=vocab_size,
            vision_mlp_width=_mlp_width(tensors, f"visual.{_BLOCKS}", vision_width),
            text_mlp_width=_mlp_width(tensors, _BLOCKS, text_width),
        )
    except ValueError as error:
        raise ValueError(f"{path}: its shapes are those of no model: {error}") from error


def to_clip(params: Mapping[str, Any], arch: Architecture) -> dict[str, np.ndarray]:
    """Converts our parameter tree to CLIP's layout."""
    return to_layout(params, layout(arch))


def heads_to_clip(heads: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Names linear heads `{name: {kernel, bias}}` as `concept_heads.NAME.weight` and `.bias`."""
    tensors = {}
    for name, leaves in heads.items():
        tensors[f"{HEADS_PREFIX}{name}.weight"] = np.asarray(leaves["kernel"]).T
        tensors[f"{HEADS_PREFIX}{name}.bias"] = np.asarray(leaves["bias"])
    return tensors


@functools.lru_cache(maxsize=4)
def our_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Maps paths in our tree to shapes."""
    init = ModelDefinition(arch, jnp.float32, jnp.float32).init_params
    return parameter_shapes(jax.eval_shape(init, jax.random.key(0)))


def parts_unlike_clip(arch: Architecture) -> dict[str, Any]:
    """Returns the fields by which a model has other parts than CLIP."""
    return {
        field.name: getattr(arch, field.name)
        for field in dataclasses.fields(Architecture)
        if field.name in _PARTS and getattr(arch, field.name) != field.default
    }


def check_is_clip(arch: Architecture) -> None:
    """Raises ValueError if a model has other parts than CLIP."""
    parts = parts_unlike_clip(arch)
    if parts:
        shown = ", ".join(f"{name}={value}" for name, value in parts.items())
        raise ValueError(f"CLIP's layout has no place for a model with {shown}")


def layout(arch: Architecture) -> Layout:
    """Returns the layout of a model."""
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
    """Returns the layout of the text tower, with a prefix for the other library's names."""
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
    """Returns the hidden width of the MLPs; None if it is 4 times the width."""
    weight = tensors.get(f"{prefix}0.mlp.c_fc.weight")
    # `check_parameters` reports a weight that is no matrix.
    if weight is None or weight.ndim != 2 or weight.shape[0] == 4 * width:
        return None
    return weight.shape[0]
