"""The least time that a compiled step can take on a machine, by three limits.

A bound and not a measurement: matrix products at the peak rate, memory traffic at the bandwidth of
the memory, communication at the bandwidth of the links and with their latencies.
"""

from __future__ import annotations

import dataclasses

from diht_jax.hardware.chips import LATENCY_SECS
from diht_jax.hardware.hlo_traffic import Collective, Traffic
from diht_jax.hardware.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time that a step can take, and what follows for MFU.

    Attributes:
        compute_secs: matrix products at the peak rate.
        memory_secs: memory traffic at the memory's bandwidth.
        network_secs: what is sent, at the bandwidth of the links that can be used for it.
        latency_secs: latencies of the collectives, one after the other.
        step_secs: the largest of products, memory, and network with its latency: everything else
            hidden behind it.
        serial_secs: their sum: nothing overlaps.
        mfu: bound, `model_flops / (peak step_secs)`.
        serial_mfu: the same with `serial_secs`.
    """

    compute_secs: float
    memory_secs: float
    network_secs: float
    latency_secs: float
    step_secs: float
    serial_secs: float
    mfu: float
    serial_mfu: float


def roofline(
    topology: Topology, traffic: Traffic, *, matmul_flops: int, model_flops: int
) -> Roofline | None:
    """The bound for one device; None for a chip that the table lacks.

    Args:
        topology: the machine.
        traffic: memory and communication of a step.
        matmul_flops: floating-point operations of its matrix products, recomputation included.
        model_flops: the same without recomputation, which MFU is measured by.
    """
    chip = topology.chip
    if chip is None:
        return None
    compute = matmul_flops / chip.peak_flops
    memory = traffic.memory_bytes / chip.hbm_bytes_per_sec
    network = sum(row.sent_bytes / link_bandwidth(topology, row) for row in traffic.collectives)
    latency = 0.0
    for row in traffic.collectives:
        link = chip.link(between_hosts=crosses_hosts(topology, row))
        latency += row.count * LATENCY_SECS[link]
    step = max(compute, memory, network + latency)
    serial = compute + memory + network + latency
    useful = model_flops / chip.peak_flops
    return Roofline(compute, memory, network, latency, step, serial, useful / step, useful / serial)


def link_bandwidth(topology: Topology, collective: Collective) -> float:
    """Bytes per second that a device can send in a collective; the chip must be known.

    On a torus of d axes a chip has 2 d links. A permutation uses one of them; a collective over
    all devices can use all; one over some of the devices is counted as a ring along one axis, both
    ways. GPUs of a host send through a switch, at the full rate. Between hosts the members of a
    group that share a host share their network cards; in a permutation every GPU has its own.
    """
    chip, is_permutation = topology.chip, collective.kind == "collective-permute"
    if not chip.num_links:
        rate = chip.link_bytes_per_sec or float("inf")
        if not crosses_hosts(topology, collective) or not chip.network_bytes_per_sec:
            return rate
        density = collective.group_size / _span(topology, collective)
        members = 1 if is_permutation else max(1, round(density * topology.shape[-1]))
        return min(rate, members * chip.network_bytes_per_sec)
    links = 1 if is_permutation else 2
    if not is_permutation and collective.group_size == len(topology.devices):
        links = 2 * sum(size > 1 for size in topology.shape)
    return chip.link_bytes_per_sec * max(1, links) / chip.num_links


def crosses_hosts(topology: Topology, collective: Collective) -> bool:
    """True if GPUs of several hosts take part: more of the mesh than the GPUs of a host."""
    return _span(topology, collective) > topology.shape[-1]


def _span(topology: Topology, collective: Collective) -> int:
    """Devices of the mesh from the first to the last one of a group."""
    if collective.span is not None:
        return collective.span
    is_permutation = collective.kind == "collective-permute"
    return len(topology.devices) if is_permutation else collective.group_size
