"""Peak rates and memory of accelerators, one row per device.

Numbers only, all public:

  * TPU: Google Cloud's TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and
    "TPU7x" (https://docs.cloud.google.com/tpu/docs/v5e and so on): "Peak compute per chip (bf16)",
    "HBM capacity", "HBM bandwidth", and half of the "bidirectional inter-chip interconnect (ICI)
    bandwidth per chip". For v4, whose page has no ICI figure, 6 links of 50 GB/s (Jouppi et al.,
    arXiv 2304.01433). Capacities are binary: the compiler's own limits show it.
  * GPU: NVIDIA's data sheets; dense bfloat16 tensor-core rate (float16 where a chip has no
    bfloat16), never the one with sparsity; half of NVLink's two-way figure. Between hosts: a
    network card for each GPU, as in the data sheets of DGX A100 (8 ConnectX-6 of 200 Gb/s) and of
    DGX H100, H200 and B200 (8 ConnectX-7 of 400 Gb/s).
  * float32 in full precision: NVIDIA's data sheets, without tensor cores. The clock of a TPU's
    core: its bfloat16 peak over what its units for products do in a cycle.
  * Latencies over ICI: about 1 us a hop ("How to Scale Your Model", Austin et al. 2025,
    https://jax-ml.github.io/scaling-book: question 3 of the chapter on sharded matrices has two
    hops take roughly 2 us, the chapter on inference calls 1 us a hop a collective's fixed cost).
  * Latencies between GPUs: those that NCCL itself chooses algorithms by (ring, protocol "Simple",
    in src/graph/tuning.cc of NCCL 2.19 and later): 8.4 us to start a collective, and for each step
    3.4 us over NVLink, 5.7 us over PCIe, 14 us over a network (InfiniBand or Ethernet alike).
"""

from __future__ import annotations

import dataclasses
import re

GIB = 1 << 30

# Seconds that it takes to start a collective, and for each of its steps, by the kind of link.
START_SECS = {"ici": 0.0, "nvlink": 8.4e-6, "pcie": 8.4e-6, "network": 8.4e-6}
STEP_SECS = {"ici": 1e-6, "nvlink": 3.4e-6, "pcie": 5.7e-6, "network": 14e-6}
# Seconds that a collective takes at least, however little it sends, by its slowest link.
LATENCY_SECS = {link: START_SECS[link] + step for link, step in STEP_SECS.items()}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it: a whole chip, but one of the two cores of a TPU7x."""

    name: str  # short name, such as "v5e"
    kind: str  # regular expression for JAX's `device_kind`
    peak_flops: float  # bfloat16 multiply-adds times 2, per second
    hbm_bytes: int  # memory
    hbm_bytes_per_sec: float  # its bandwidth
    # Out of the chip over all its links (ICI, NVLink), one direction; 0 where there are none.
    link_bytes_per_sec: float
    num_links: int = 0  # of the torus, 2 per axis; 0 where every chip reaches every other one alike
    # From one GPU to other hosts, one direction; 0 where not known.
    network_bytes_per_sec: float = 0.0
    float32_flops: float = 0.0  # the same for float32 in full precision; 0 where not known
    # Of a TPU's core, which issues one bundle of instructions a cycle; 0 for GPUs.
    clock_hz: float = 0.0

    def link(self, *, between_hosts: bool) -> str:
        """The kind of link, a key of `LATENCY_SECS`, inside a host (a slice) or between hosts."""
        if self.num_links:
            return "ici"
        if between_hosts:
            return "network"
        return "nvlink" if self.link_bytes_per_sec else "pcie"


CHIPS: tuple[Chip, ...] = (
    Chip("v4", r"TPU v4", 275e12, 32 * GIB, 1200e9, 300e9, 6, clock_hz=1.05e9),
    Chip("v5e", r"TPU v5 ?(lite|e)", 197e12, 16 * GIB, 819e9, 200e9, 4, clock_hz=1.5e9),
    Chip("v5p", r"TPU v5p?", 459e12, 95 * GIB, 2765e9, 600e9, 6, clock_hz=1.75e9),
    Chip("v6e", r"TPU v6 ?(lite|e)", 918e12, 32 * GIB, 1638e9, 400e9, 4, clock_hz=1.75e9),
    Chip("tpu7x", r"TPU ?v?7x?", 2307e12 / 2, 96 * GIB, 7380e9 / 2, 600e9 / 2, 6, clock_hz=2.2e9),
    Chip("v100", r".*V100.*", 125e12, 32 * GIB, 900e9, 150e9, float32_flops=15.7e12),
    Chip("t4", r".*\bT4\b.*", 65e12, 16 * GIB, 300e9, 0.0, float32_flops=8.1e12),
    Chip(
        "a100_80gb",
        r".*A100.*80GB.*",
        312e12,
        80 * GIB,
        2039e9,
        300e9,
        0,
        25e9,
        float32_flops=19.5e12,
    ),
    Chip("a100", r".*A100.*", 312e12, 40 * GIB, 1555e9, 300e9, 0, 25e9, float32_flops=19.5e12),
    Chip("a10g", r".*A10G.*", 70e12, 24 * GIB, 600e9, 0.0, float32_flops=31.2e12),
    Chip("l4", r".*\bL4\b.*", 121e12, 24 * GIB, 300e9, 0.0, float32_flops=30.3e12),
    Chip("l40s", r".*L40S.*", 362e12, 48 * GIB, 864e9, 0.0, float32_flops=91.6e12),
    Chip("rtx4090", r".*RTX 4090.*", 165e12, 24 * GIB, 1008e9, 0.0, float32_flops=82.6e12),
    Chip("h100_pcie", r".*H100.*PCIe.*", 756e12, 80 * GIB, 2000e9, 300e9, float32_flops=51e12),
    Chip("h100_nvl", r".*H100.*NVL.*", 835e12, 94 * GIB, 3900e9, 300e9, float32_flops=60e12),
    Chip("h100", r".*H100.*", 989e12, 80 * GIB, 3350e9, 450e9, 0, 50e9, float32_flops=67e12),
    Chip("gh200", r".*GH200.*", 989e12, 96 * 10**9, 4000e9, 450e9, float32_flops=67e12),
    Chip("h200", r".*H200.*", 989e12, 141 * 10**9, 4800e9, 450e9, 0, 50e9, float32_flops=67e12),
    Chip("b200", r".*B200.*", 2250e12, 180 * 10**9, 8000e9, 900e9, 0, 50e9, float32_flops=80e12),
)


def find_chip(device_kind: str) -> Chip | None:
    """The row for a `jax.Device.device_kind` (or a short name of the table), or None."""
    for chip in CHIPS:
        if device_kind == chip.name or re.fullmatch(chip.kind, device_kind):
            return chip
    return None


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of one device, in operations per second; None for an unknown kind.

    Args:
        device_kind: of a `jax.Device`, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """
    chip = find_chip(device_kind)
    return chip.peak_flops if chip else None
