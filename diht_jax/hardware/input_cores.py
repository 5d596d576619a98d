"""The cores that the input of a step needs on each host, from the measured rate of decoding."""

from __future__ import annotations

import math

from diht_jax.hardware.topologies import Topology

# Side of the photos -> images per second of one core, read, decoded, cropped to 224 px and
# tokenized: `diht_jax` of benchmarks/results/input_pipeline.json, on an AMD EPYC.
IMAGES_PER_CORE_SEC = {"384 px": 1438.9, "512 px": 980.2, "256 to 1024 px": 810.4}


def num_hosts(topology: Topology) -> int:
    """Hosts that read the input: GPUs by the shape, a TPU slice as its compiler counts them."""
    chip = topology.chip
    if chip is not None and not chip.num_links:
        return math.prod(topology.shape[:-1])
    return len({getattr(device, "process_index", 0) for device in topology.devices})


def describe_input(topology: Topology, images_per_sec: float) -> list[str]:
    """Formats how many cores of each host keep up with a step.

    Args:
        images_per_sec: over all devices.
    """
    hosts = num_hosts(topology)
    of_host = images_per_sec / hosts
    cores = {side: math.ceil(of_host / rate) for side, rate in IMAGES_PER_CORE_SEC.items()}
    devices = len(topology.devices) // hosts
    return [
        f"input of a host with {devices} devices, at the first of these bounds",
        f"  {'examples per second':<32} {of_host:,.0f}",
        f"  {'cores that decode them':<32} "
        + ", ".join(f"{count:,} ({side})" for side, count in cores.items()),
        "  by one core of an AMD EPYC, for crops of 224 px with config.data.fast_decode:",
        "  "
        + ", ".join(f"{rate:,.0f}/s ({side})" for side, rate in IMAGES_PER_CORE_SEC.items())
        + "; benchmarks/results/input_pipeline.json",
    ]
