"""Peak rates of chips, and the number of floating-point operations (FLOPs) of matrix products.

All numbers in the table of chips are public:

  * TPU: Google Cloud's TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and
    "TPU7x" (https://docs.cloud.google.com/tpu/docs/v5e and so on): "Peak compute per chip (bf16)",
    "HBM capacity", "HBM bandwidth", and half of the "bidirectional inter-chip interconnect (ICI)
    bandwidth per chip". The page of v4 has no ICI bandwidth: 6 links of 50 GB/s (Jouppi et al.,
    arXiv 2304.01433). Capacities are in GiB, like the compiler's own limits.
  * GPU: NVIDIA's data sheets; the dense bfloat16 tensor-core rate (float16 if a chip has no
    bfloat16), without sparsity; half of NVLink's bidirectional bandwidth. Between hosts: one
    network card per GPU, as in the data sheets of DGX A100 (8 ConnectX-6 of 200 Gb/s) and of
    DGX H100, H200 and B200 (8 ConnectX-7 of 400 Gb/s).
  * float32 in full precision: NVIDIA's data sheets, without tensor cores. The clock of a TPU core:
    its bfloat16 peak divided by the FLOPs of its matrix units in a cycle.
  * ICI latency: about 1 us a hop ("How to Scale Your Model", Austin et al. 2025,
    https://jax-ml.github.io/scaling-book: question 3 of the chapter on sharded matrices has about
    2 us for two hops; the chapter on inference has a fixed cost of 1 us a hop for a collective).
  * GPU latency: the values by which NCCL chooses its algorithms (ring, protocol "Simple", in
    src/graph/tuning.cc of NCCL 2.19 and later): 8.4 us to start a collective, and for each step
    3.4 us over NVLink, 5.7 us over PCIe, 14 us over a network (InfiniBand or Ethernet).

FLOPs are counted from a jaxpr, without compiling or executing it. The body of a loop is multiplied
by its trip count. XLA's own cost analysis counts it once, and so underestimates scanned layers and
ring losses.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

GIB = 1 << 30

# Seconds to start a collective and seconds for each of its steps, by the kind of link.
START_SECS = {"ici": 0.0, "nvlink": 8.4e-6, "pcie": 8.4e-6, "network": 8.4e-6}
STEP_SECS = {"ici": 1e-6, "nvlink": 3.4e-6, "pcie": 5.7e-6, "network": 14e-6}
# Least seconds of a collective of any size, by its slowest link.
LATENCY_SECS = {link: START_SECS[link] + step for link, step in STEP_SECS.items()}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one JAX device: a whole chip, or one of the two cores of a TPU7x."""

    name: str  # short name, such as "v5e"
    kind: str  # regular expression for JAX's `device_kind`
    peak_flops: float  # bfloat16 multiply-adds times 2, per second
    hbm_bytes: int  # memory capacity
    hbm_bytes_per_sec: float  # memory bandwidth
    # Bandwidth of all links of the chip (ICI, NVLink) in one direction; 0 if there are none.
    link_bytes_per_sec: float
    num_links: int = 0  # links of a torus, 2 per axis; 0 if all chips are connected alike
    # Bandwidth from one GPU to other hosts in one direction; 0 if unknown.
    network_bytes_per_sec: float = 0.0
    float32_flops: float = 0.0  # `peak_flops` for float32 in full precision; 0 if unknown
    # Clock of a TPU core, which issues one bundle of instructions a cycle; 0 for GPUs.
    clock_hz: float = 0.0

    def link(self, *, between_hosts: bool) -> str:
        """Returns the kind of link, a key of `LATENCY_SECS`, inside a host or between hosts."""
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
    Chip("v100_16gb", r".*V100.*16GB.*", 125e12, 16 * GIB, 900e9, 150e9, float32_flops=15.7e12),
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
    """Returns the chip of a kind of device, or None if it is unknown.

    Args:
        device_kind: of a `jax.Device`, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3", or the
            short name of a chip.
    """
    for chip in CHIPS:
        if device_kind == chip.name or re.fullmatch(chip.kind, device_kind):
            return chip
    return None


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Counts the FLOPs of the matrix products of `fn(*args)`, summed over all devices of the mesh.

    Convolutions are included; a multiply-add is two FLOPs. The body of a scan is multiplied by its
    length, and that of a `shard_map` by the number of devices along its mesh axes. A conditional
    counts as its most expensive branch. As in a compiled program, recomputation (`jax.checkpoint`)
    counts and unused values do not. Replicated computation outside of `shard_map` counts once.

    Args:
        *args: arrays or `jax.ShapeDtypeStruct`s, in any tree.

    Raises:
        ValueError: there is a while loop, whose trip count is unknown.
    """
    return count_jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def count_jaxpr_flops(jaxpr: Jaxpr | ClosedJaxpr, *, leave_out: str | None = None) -> int:
    """Counts the FLOPs of a jaxpr; see `count_flops`.

    Args:
        leave_out: name of a `jax.named_scope` to exclude.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    # Remove what no result depends on.
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    read = set(map(id, live.outvars))
    for eqn in live.eqns:
        read.update(map(id, eqn.invars))
    flops = 0
    for eqn in live.eqns:
        # JAX keeps every Pallas kernel; XLA does not.
        if eqn.primitive.name == "pallas_call" and read.isdisjoint(map(id, eqn.outvars)):
            continue
        if leave_out is None or leave_out not in str(eqn.source_info.name_stack).split("/"):
            flops += _count_equation(eqn)
    return flops


def _count_equation(eqn: Any) -> int:
    params = eqn.params
    match eqn.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            return 2 * eqn.outvars[0].aval.size * depth
        case "conv_general_dilated":
            return _count_convolution(eqn)
        case "scan":
            return count_jaxpr_flops(params["jaxpr"]) * params["length"]
        case "cond":
            return max(map(count_jaxpr_flops, params["branches"]))
        case "shard_map":
            sizes = dict(params["mesh"].shape)
            num_devices = math.prod(sizes[axis] for axis in params["newly_manual_axes"])
            return count_jaxpr_flops(params["jaxpr"]) * num_devices
        case "pallas_call":
            estimate = params["cost_estimate"]
            if estimate is not None:  # excludes the kernel's multiplications by zero
                return estimate.flops
            return count_jaxpr_flops(params["jaxpr"]) * math.prod(params["grid_mapping"].grid)
        case name if name in _CUDNN_PRODUCTS:
            # 2 b h t s d each, for queries [b, t, h, d] and keys [b, s, h, d].
            (batch, queries, heads, depth), (_, keys, _, _) = (v.aval.shape for v in eqn.invars[:2])
            return _CUDNN_PRODUCTS[name] * 2 * batch * heads * queries * keys * depth
        case "while":
            raise ValueError(
                "count_flops: a while loop, whose trip count is not known; loop with jax.lax.scan "
                "or with jax.lax.fori_loop over Python integers"
            )
    # Inner functions of jit, checkpoint, custom derivatives and other calls.
    inner = [value for value in params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]
    return sum(map(count_jaxpr_flops, inner))


def _count_convolution(eqn: Any) -> int:
    """Counts the FLOPs of a convolution, without multiplications by padding or dilation zeros.

    The gradients of a convolution are convolutions over padded or dilated inputs, whose zeros do
    not count. The true number is therefore the smallest of three equivalent counts: by output,
    input or kernel elements.
    """
    image, kernel, out = (variable.aval for variable in (*eqn.invars[:2], *eqn.outvars))
    spec = eqn.params["dimension_numbers"]
    window = math.prod(kernel.shape[axis] for axis in spec.rhs_spec[2:])
    channels_in, channels_out = kernel.shape[spec.rhs_spec[1]], kernel.shape[spec.rhs_spec[0]]
    positions_in = math.prod(image.shape[axis] for axis in spec.lhs_spec[2:])
    positions_out = math.prod(out.shape[axis] for axis in spec.out_spec[2:])
    examples = out.shape[spec.out_spec[0]]
    pairs = min(positions_out * window, positions_in * window, positions_in * positions_out)
    return 2 * examples * channels_in * channels_out * pairs


# cuDNN's attention kernels, and the number of [queries, keys] matrix products in each.
_CUDNN_PRODUCTS = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 5,
}
