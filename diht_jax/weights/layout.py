"""Tables between our parameter tree and the state dicts of others.

A layout names, for each path in our tree, the tensors of the other library that hold its values.
Our kernels are torch's transposed, and convolutions are HWIO where torch has OIHW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

_SHOWN = 30  # names of one kind in a message: a setting of another model makes thousands of them
_FORMS: dict[str, tuple[Callable, Callable]] = {  # ours -> theirs, theirs -> ours
    "same": (lambda x: x, lambda x: x),
    "transposed": (lambda x: x.T, lambda x: x.T),
    "convolution": (lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0)),
    "row": (lambda x: x[None], lambda x: x[0]),
    "plane": (lambda x: x[None, None], lambda x: x[0, 0]),
}


class Tensors(NamedTuple):
    """The tensors of another library behind one array of ours.

    Attributes:
        names: of the tensors; ours has the values of several one after the other along its last
            axis.
        form: how each differs from ours, a key of `_FORMS`.
        shares: relative sizes of several along that axis, if they differ.
    """

    names: tuple[str, ...]
    form: str = "same"
    shares: tuple[int, ...] = ()


Layout = Mapping[str, Tensors]


class BlockNames(NamedTuple):
    """Another library's names of the parts of a block; `in_proj` may be several, with the dot."""

    attention_norm: str
    in_proj: tuple[str, ...]
    out_proj: str
    mlp_norm: str
    fc_in: str
    fc_out: str


def norm(ours: str, theirs: str) -> dict[str, Tensors]:
    """The entries of a LayerNorm."""
    return {f"{ours}/scale": Tensors((f"{theirs}.weight",)), **bias(ours, theirs)}


def linear(
    ours: str, *theirs: str, dot: str = ".", shares: tuple[int, ...] = ()
) -> dict[str, Tensors]:
    """The entries of a linear layer, which the other library may have in several parts."""
    weights = tuple(f"{name}{dot}weight" for name in theirs)
    biases = tuple(f"{name}{dot}bias" for name in theirs)
    return {
        f"{ours}/kernel": Tensors(weights, "transposed", shares),
        f"{ours}/bias": Tensors(biases, "same", shares),
    }


def bias(ours: str, theirs: str) -> dict[str, Tensors]:
    """The entry of a bias."""
    return {f"{ours}/bias": Tensors((f"{theirs}.bias",))}


def blocks(ours: str, theirs: str, layers: int, names: BlockNames) -> dict[str, Tensors]:
    """The entries of a tower's blocks, `ours/0` and on, whose names begin with `theirs0` and on."""
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
    """The state dict of a parameter tree; views of its arrays."""
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
    """The parameter tree of a state dict; the inverse of `to_layout`, bit for bit.

    Args:
        tensors: floating point, by name.
        layout: where the values of each path are.
        shapes: ours, by path.
        where: the file, for messages.

    Returns:
        Nested dict of float32 arrays, views of `tensors` where these are float32.

    Raises:
        ValueError: lists missing, unknown and wrongly shaped tensors, the first of each kind; or
            numbers that are not floating point.
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
    """Shapes of the tensors by name, from those of our arrays by path."""
    empty = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    tensors = to_layout(traverse_util.unflatten_dict(empty, sep="/"), layout)
    return {name: value.shape for name, value in tensors.items()}


def check_parameters(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compares names and shapes.

    Raises:
        ValueError: lists missing, unknown and wrongly shaped parameters, the first of each kind.
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
    lines = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(
            f"{where}: the parameters do not fit the architecture; " + "; ".join(lines)
        )
