"""Chooses how a contrastive loss is computed on a mesh: `config.loss.impl="auto"`.

The streaming form sends many small messages one after the other, the gathered form few large ones,
and holds [b, N] logits. Only what the devices of the mesh are is looked at, never the machine at
hand: the choice for a described machine is the one that this machine makes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from diht_jax.cost_model.chips import LATENCY_SECS, Chip, find_chip

# Transfers in a round of the ring, both passes: see `streaming.py`.
_TRANSFERS = 5
# Arrays [b, N] and [N, d] of float32 that the gathered form holds at its peak, fitted to what the
# TPU compiler reports of it for N of 8,192 to 262,144 (docs/benchmarks.md, memory of the loss).
_BLOCKS, _GATHERED = 3.0, 3.5
# Share of the memory that the gathered form may take from the towers.
_MEMORY_SHARE = 0.05
# Products in float32, relative to the bfloat16 peak: six passes on a TPU, no tensor cores on a GPU.
_TPU_SLOWDOWN, _GPU_SLOWDOWN = 6, 15
# GPUs of a host. Described devices do not tell their host, so it is not read off the devices.
_GPUS_OF_A_HOST = 8


class Choice(NamedTuple):
    """A form of the loss, and why: for the log.

    Attributes:
        impl: "streaming" or "gathered".
        reason: a clause.
    """

    impl: str
    reason: str


def choose_impl(
    mesh: Mesh, axis_names: Sequence[str], num_pairs: int, width: int, impl: str = "auto"
) -> Choice:
    """Streaming, unless its latencies take longer than its products and [b, N] logits are small.

    Args:
        mesh: of the step.
        axis_names: axes that the batch is split over.
        num_pairs: N, of the global batch.
        width: d, of an embedding.
        impl: anything but "auto" is the choice.

    Source: ours.
    """
    if impl != "auto":
        return Choice(impl, "as config.loss.impl has it")
    device = mesh.devices.flat[0]
    chip = find_chip(device.device_kind)
    num_devices = math.prod(mesh.shape[name] for name in axis_names)
    if num_devices == 1:
        return Choice("streaming", "there is one device")
    if chip is None:
        return Choice("streaming", f"nothing is known of the links of a '{device.device_kind}'")
    return _choose(chip, num_devices, num_pairs, width)


def _choose(chip: Chip, num_devices: int, num_pairs: int, width: int) -> Choice:
    num_rows = num_pairs // num_devices
    link = chip.link(between_hosts=num_devices > _GPUS_OF_A_HOST)
    transfers = _TRANSFERS * num_devices
    ring_secs = transfers * LATENCY_SECS[link]
    slowdown = _TPU_SLOWDOWN if chip.num_links else _GPU_SLOWDOWN
    products_secs = 4 * 2 * num_rows * num_pairs * width * slowdown / chip.peak_flops
    ring = (
        f"{transfers:,} transfers of the ring take at least {1e3 * ring_secs:.1f} ms ({link}), "
        f"its products {1e3 * products_secs:.1f} ms"
    )
    if ring_secs <= products_secs:
        return Choice("streaming", ring)
    most_bytes = _MEMORY_SHARE * chip.hbm_bytes
    needed_bytes = 4 * num_pairs * (_BLOCKS * num_rows + _GATHERED * width)
    memory = f"gathered it needs {needed_bytes / 1e9:.2f} GB, of {most_bytes / 1e9:.2f} GB allowed"
    return Choice("gathered" if needed_bytes <= most_bytes else "streaming", f"{ring}; {memory}")
