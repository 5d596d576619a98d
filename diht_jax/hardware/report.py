"""Report of a compiled training step: memory, FLOPs, traffic and bounds on its time.

`diht_jax.compile` collects the numbers. Times are bounds at the rates of `chips`, not measurements.
The main bound runs the instructions in sequence, as scheduled. A weaker one is the maximum of all
products, all memory traffic and all communication.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from diht_jax.hardware.chips import GIB, LATENCY_SECS
from diht_jax.hardware.hlo_traffic import Collective, Traffic
from diht_jax.hardware.schedule import scheduled_secs
from diht_jax.hardware.topologies import Topology

# Image side -> images per second that one AMD EPYC core reads, decodes, crops to 224 px and
# tokenizes: `diht_jax` of benchmarks/results/input_pipeline.json.
IMAGES_PER_CORE_SEC = {"384 px": 1438.9, "512 px": 980.2, "256 to 1024 px": 810.4}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds on the time of a step, and the resulting upper bounds on MFU."""

    compute_secs: float  # matrix products at the peak rate
    memory_secs: float  # memory traffic at the memory's bandwidth
    network_secs: float  # sent bytes at the bandwidth of the links that a collective can use
    latency_secs: float  # sum of the latencies of the collectives
    # Maximum of products, memory, and network with latency, if everything overlaps.
    step_secs: float
    mfu: float  # bound, `model_flops / (peak step_secs)`
    # Seconds of the program as scheduled, by the kind of `hlo_traffic.Work`.
    secs_by_kind: dict[str, float]
    scheduled_secs: float  # their sum, or `step_secs` if larger; the reported bound
    scheduled_mfu: float  # bound, `model_flops / (peak scheduled_secs)`


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Numbers of a compiled training step, for one device and one step."""

    topology: Topology  # the target of the compilation
    mesh: dict[str, int]  # size of each axis
    batch_size: int  # global, in examples
    attention: dict[str, str]  # kernel of each tower
    loss_form: tuple[str, str]  # form of the contrastive loss, and the reason for it
    # The config's settings that trade FLOPs for memory.
    micro_batch: int | None
    remat: str
    memory_limit_bytes: int | None  # available to a program; None if unknown
    argument_bytes: int  # state and batch; the donated state shares its memory with the result
    # Allocated for intermediate values; None if the compiler rejected the program as too large.
    temporary_bytes: int | None
    peak_bytes: int  # all values that are live at once, including the program
    # The number to compare with the limit. On a TPU it is the peak, like in the compiler's own
    # check; the size of its temporaries counts more than is live at once. Elsewhere the peak
    # excludes temporaries, so it is the sum of arguments, results, temporaries and the program.
    needed_bytes: int
    fits: bool  # whether it fits into memory
    flops: int  # of matrix products, including recomputation
    model_flops: int  # without recomputation, for MFU
    traffic: Traffic | None  # None if the compiler rejected the program as too large
    # Wall time on this machine.
    trace_secs: float
    compile_secs: float

    @property
    def roofline(self) -> Roofline | None:
        """Bounds on the step's time; None if chip or traffic are unknown."""
        chip, traffic = self.topology.chip, self.traffic
        if chip is None or traffic is None:
            return None
        compute = self.flops / chip.peak_flops
        memory = traffic.memory_bytes / chip.hbm_bytes_per_sec
        network = latency = 0.0
        for row in traffic.collectives:
            sending, waiting = collective_secs(self.topology, row)
            network, latency = network + sending, latency + row.count * waiting
        step = max(compute, memory, network + latency)
        by_kind = scheduled_secs(
            traffic.work, chip, lambda row: sum(collective_secs(self.topology, row))
        )
        scheduled = max(sum(by_kind.values()), step)
        useful = self.model_flops / chip.peak_flops
        mfu, scheduled_mfu = useful / step, useful / scheduled
        return Roofline(
            compute, memory, network, latency, step, mfu, by_kind, scheduled, scheduled_mfu
        )


def collective_secs(topology: Topology, collective: Collective) -> tuple[float, float]:
    """Returns the seconds to send the bytes of a collective, and the latency of one execution."""
    bandwidth = link_bandwidth(topology, collective)
    assert topology.chip is not None  # it has a bandwidth
    link = topology.chip.link(between_hosts=crosses_hosts(topology, collective))
    return collective.sent_bytes / bandwidth, LATENCY_SECS[link]


def link_bandwidth(topology: Topology, collective: Collective) -> float:
    """Returns the bytes per second that a device can send in a collective; needs a known chip.

    On a torus of d axes a chip has 2 d links. A permutation uses one of them, and a collective over
    all devices all of them. A collective over some devices counts as a bidirectional ring along one
    axis. GPUs of a host send through a switch at the full rate. Between hosts, the members of a
    group on the same host share their network cards; in a permutation every GPU has its own.
    """
    chip, is_permutation = topology.chip, collective.kind == "collective-permute"
    assert chip is not None
    if not chip.num_links:
        rate = chip.link_bytes_per_sec or float("inf")
        if not crosses_hosts(topology, collective) or not chip.network_bytes_per_sec:
            return rate
        density = collective.group_size / collective.span
        members = 1 if is_permutation else max(1, round(density * topology.shape[-1]))
        return min(rate, members * chip.network_bytes_per_sec)
    links = 1 if is_permutation else 2
    if not is_permutation and collective.group_size == len(topology.devices):
        links = 2 * sum(size > 1 for size in topology.shape)
    return chip.link_bytes_per_sec * max(1, links) / chip.num_links


def crosses_hosts(topology: Topology, collective: Collective) -> bool:
    """Returns whether GPUs of several hosts take part: the span exceeds the GPUs of a host."""
    return collective.span > topology.shape[-1]


def describe_step(report: StepReport) -> str:
    """Formats memory, FLOPs, traffic, communication, roofline and verdict as text."""
    devices = report.topology.devices
    micro_batch = "none" if report.micro_batch is None else f"{report.micro_batch:,}"
    lines = [
        f"{report.topology.name}: {len(devices)} x {devices[0].device_kind}, mesh "
        + " ".join(f"{name}={size}" for name, size in report.mesh.items()),
        f"global batch {report.batch_size:,} ({report.batch_size // len(devices):,} a device), "
        f"micro-batch {micro_batch}, remat {report.remat}",
        "attention kernels: "
        + ", ".join(f"{kernel} ({tower})" for tower, kernel in report.attention.items()),
        "form of the loss: {} ({})".format(*report.loss_form),
        f"compiler options: {_options(report)}",
        f"traced in {report.trace_secs:.0f} s, compiled in {report.compile_secs:.0f} s",
        "",
        "on one device, for one step",
        *_memory_lines(report),
        *_flops_lines(report),
    ]
    if report.traffic is not None:
        lines += [*_traffic_lines(report, report.traffic), "", *_roofline_lines(report)]
    lines += ["", _verdict(report)]
    return "\n".join(lines)


def num_hosts(topology: Topology) -> int:
    """Returns the number of hosts: for GPUs from the shape, for a TPU slice from its compiler."""
    chip = topology.chip
    if chip is not None and not chip.num_links:
        return math.prod(topology.shape[:-1])
    return len({getattr(device, "process_index", 0) for device in topology.devices})


def describe_input(topology: Topology, images_per_sec: float) -> list[str]:
    """Formats the CPU cores of a host that decode `images_per_sec`, the rate of all devices."""
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


def describe_try(report: StepReport, changes: dict[str, Any]) -> str:
    """Formats the result of other settings as one line."""
    outcome = "fits" if report.fits else "too large"
    least = f", {_ms(estimate.scheduled_secs)}" if (estimate := report.roofline) else ""
    return (
        f"  {describe_changes(changes)}: {_gib(report.needed_bytes)}, "
        f"{report.flops / 1e12:.2f} TFLOP{least}: {outcome}"
    )


def describe_changes(changes: dict[str, Any]) -> str:
    """Formats settings as flags."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def describe_proposal(before: StepReport, best: StepReport, changes: dict[str, Any]) -> str:
    """Formats the fastest settings that fit as flags, with the change in step time."""
    if not changes:
        return "none of them is faster and fits"
    gained = ""
    if (old := before.roofline) and (new := best.roofline):
        gained = f" ({_ms(new.scheduled_secs)} instead of {_ms(old.scheduled_secs)})"
    return f"the fastest settings that fit: {describe_changes(changes)}{gained}"


def describe_found(changes: dict[str, Any] | None) -> str:
    """Formats settings that fit as flags; None means that no settings fit."""
    if changes is None:
        return "none fits; take more devices, a larger config.mesh.fsdp, or a smaller batch"
    return f"what fits: {describe_changes(changes)}"


def _memory_lines(report: StepReport) -> list[str]:
    def of_limit(num_bytes: int) -> str:
        limit = report.memory_limit_bytes
        return _gib(num_bytes) + (f" of {_gib(limit)} ({num_bytes / limit:.0%})" if limit else "")

    lines = [_row("arguments (state and batch)", _gib(report.argument_bytes))]
    if report.temporary_bytes is not None:
        lines.append(_row("temporaries", _gib(report.temporary_bytes)))
        lines.append(_row("peak", _gib(report.peak_bytes)))
    return [*lines, _row("needed", of_limit(report.needed_bytes))]


def _flops_lines(report: StepReport) -> list[str]:
    again = report.flops / report.model_flops - 1
    return [
        _row("matrix products", f"{report.flops / 1e12:.3f} TFLOP"),
        _row("  of the model alone", f"{report.model_flops / 1e12:.3f} TFLOP ({again:+.0%} again)"),
    ]


def _traffic_lines(report: StepReport, traffic: Traffic) -> list[str]:
    lines = [
        _row("memory traffic", f"{traffic.memory_bytes / 1e9:.2f} GB"),
        *(_row(f"  {kind}", f"{n / 1e9:.2f} GB") for kind, n in traffic.bytes_by_kind.items()),
        _row("sent to other devices", f"{traffic.sent_bytes / 1e9:.3f} GB"),
    ]
    for row in traffic.collectives:
        where = ""
        if _has_hosts(report):
            where = " between hosts" if crosses_hosts(report.topology, row) else " in a host"
        who = "neighbours" if row.kind == "collective-permute" else f"{row.group_size} devices"
        lines.append(
            _row(
                f"  {row.kind}, {who}",
                f"{row.sent_bytes / 1e9:.3f} GB in {row.count:,} x "
                f"{row.payload_bytes / row.count / 1e6:.2f} MB{where}",
            )
        )
    if traffic.unknown_loops:
        lines.append(f"  ({traffic.unknown_loops} loops of unknown length are counted once)")
    return lines


def _roofline_lines(report: StepReport) -> list[str]:
    chip, traffic, estimate = report.topology.chip, report.traffic, report.roofline
    if estimate is None or chip is None or traffic is None:
        kind = report.topology.devices[0].device_kind
        return [f"no estimate of the time: the peak rates of '{kind}' are not known"]
    collectives = traffic.collectives
    network = f"at up to {chip.link_bytes_per_sec / 1e9:.0f} GB/s"
    if _has_hosts(report) and chip.network_bytes_per_sec:
        network += f", {chip.network_bytes_per_sec / 1e9:.0f} GB/s a GPU between hosts"
    rate = report.batch_size / estimate.scheduled_secs
    lines = [
        "the least time of a step (bounds, not measurements)",
        _row("as scheduled, in order", f"{_ms(estimate.scheduled_secs)}"),
        *(_row(f"  {kind}", _ms(secs)) for kind, secs in estimate.secs_by_kind.items() if secs),
        _row("examples per second <=", f"{rate:,.0f}"),
        _row("MFU <= model / (peak x step)", f"{estimate.scheduled_mfu:.1%}"),
        "with everything overlapped, a weaker bound",
        _row(
            "compute = products / peak",
            f"{_ms(estimate.compute_secs)} at {chip.peak_flops / 1e12:.0f} TFLOP/s",
        ),
        _row(
            "memory = traffic / bandwidth",
            f"{_ms(estimate.memory_secs)} at {chip.hbm_bytes_per_sec / 1e9:.0f} GB/s",
        ),
        _row("network = sent / links", f"{_ms(estimate.network_secs)} {network}"),
        _row(
            "  + latency of the collectives",
            f"{_ms(estimate.latency_secs)} in {sum(row.count for row in collectives):,}, one after "
            "the other",
        ),
        _row("step >= max of the three", f"{_ms(estimate.step_secs)} (MFU <= {estimate.mfu:.1%})"),
    ]
    if unknown := traffic.unknown_kernels:
        lines.insert(2, f"  ({unknown} kernels of unknown length, by their memory traffic alone)")
    return [*lines, "", *describe_input(report.topology, rate)]


def _verdict(report: StepReport) -> str:
    needed, limit = report.needed_bytes, report.memory_limit_bytes
    if limit is None:
        return f"needs {_gib(needed)}; the memory of this kind is not known"
    if report.fits:
        return f"fits, with {_gib(limit - needed)} to spare"
    return (
        f"OUT OF MEMORY: needs {_gib(needed)}, {_gib(needed - limit)} more than the {_gib(limit)} "
        "there are"
    )


def _has_hosts(report: StepReport) -> bool:
    """Returns whether the topology is GPUs of several hosts."""
    chip, shape = report.topology.chip, report.topology.shape
    return chip is not None and not chip.num_links and len(shape) > 1


def _options(report: StepReport) -> str:
    names = sorted(report.topology.compiler_options)
    return f"{len(names)}, training's flags among them: {names[0]}, ..." if names else "none"


def _row(name: str, value: str) -> str:
    return f"  {name:<32} {value}"


def _gib(num_bytes: float) -> str:
    if num_bytes < GIB / 10:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / GIB:.2f} GiB"


def _ms(secs: float) -> str:
    return f"{1e3 * secs:.1f} ms" if secs >= 1e-3 else f"{1e6 * secs:.1f} us"
