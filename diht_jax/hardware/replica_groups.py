"""Which devices take part in a collective together, read from the text of an HLO instruction."""

from __future__ import annotations

import math
import re

import numpy as np

# Devices in HLO's notation: [4,8]T(1,0) is 0, 1, ... 31 as [4, 8], transposed.
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def read_groups(text: str, num_devices: int) -> np.ndarray:
    """The groups of `replica_groups`, in any of its three notations, or a permutation's pairs.

    Args:
        text: of the instruction, with its attributes.
        num_devices: of the program.

    Returns:
        int [groups, devices], positions in the mesh; one group of all devices where the text names
        none.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    iota = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", text)
    if iota:
        return _iota(*iota.groups()[2:]).reshape(int(iota.group(1)), int(iota.group(2)))
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]+)\}\}", text)
    if listed:
        return np.array([_integers(group) for group in listed.group(1).split("},{")])
    return np.arange(num_devices)[None]


def _mesh_groups(axes_text: str, devices_text: str, together_text: str) -> np.ndarray:
    """Such as ("'a'=4,'b'=8", ", device_ids=([4,8])", "'b'"): groups along the axis b."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes_text)}
    together = re.findall(r"'([^']+)'", together_text)
    order = sorted(range(len(axes)), key=lambda axis: list(axes)[axis] in together)
    named = re.search(rf"device_ids=\({_IOTA}\)", devices_text)
    devices = _iota(*named.groups()) if named else np.arange(math.prod(axes.values()))
    grid = devices.reshape(*axes.values()).transpose(order)
    return grid.reshape(-1, math.prod(axes[name] for name in together))


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = _integers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_integers(order) if order else None)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
