"""Compiles the training step for a machine, and collects what the compiler reports about it.

Nothing is run and no array is made. Printing is `report`'s.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections

from diht_jax.hardware.chips import LATENCY_SECS, Chip
from diht_jax.hardware.flops import FlopCount, count_jaxpr_flops
from diht_jax.hardware.hlo_traffic import Collective, Traffic, count_traffic
from diht_jax.hardware.topologies import Topology
from diht_jax.losses.choice import Choice
from diht_jax.models.remat import POLICIES
from diht_jax.training.durations import duration_in_steps
from diht_jax.training.monitoring.throughput import model_flops
from diht_jax.training.program import TrainProgram


@dataclasses.dataclass(frozen=True)
class StepReport:
    """A compiled training step. Everything is for one device and one step.

    Attributes:
        topology: what it was compiled for.
        mesh: size of each axis.
        batch_size: global, in examples.
        attention: kernel of each tower.
        loss_form: how the contrastive loss is computed.
        micro_batch, remat: the config's settings that trade FLOPs for memory.
        memory_limit_bytes: what a program may use; None where not known.
        argument_bytes: state and batch; the state is donated: its result needs no other room.
        temporary_bytes: set aside for intermediate values; None where the compiler gave up.
        peak_bytes: of all values that are alive at once, the program included.
        needed_bytes: what must fit. On a TPU the peak, which is what its compiler's own limit
            follows (its size of the temporaries counts more than is ever held); elsewhere, where
            the peak leaves temporaries out, arguments, results, temporaries and the program.
        fits: whether it runs within the memory.
        flops: floating-point operations, recomputation included.
        model_flops: operations of the model's matrix products without recomputation, which MFU is
            measured by.
        traffic: memory and communication; None where the compiler gave up.
        trace_secs, compile_secs: how long it took here.
    """

    topology: Topology
    mesh: dict[str, int]
    batch_size: int
    attention: dict[str, str]
    loss_form: Choice
    micro_batch: int | None
    remat: str
    memory_limit_bytes: int | None
    argument_bytes: int
    temporary_bytes: int | None
    peak_bytes: int
    needed_bytes: int
    fits: bool
    flops: FlopCount
    model_flops: int
    traffic: Traffic | None
    trace_secs: float
    compile_secs: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time that a step can take, by three limits, and what follows for MFU.

    Attributes:
        compute_secs: matrix products at the peak rate.
        memory_secs: memory traffic at the memory's bandwidth.
        network_secs: what is sent, at the bandwidth of the links that can be used for it.
        latency_secs: what the collectives take beside that, however little they send, one after
            the other.
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


def compile_step(config: ml_collections.ConfigDict, topology: Topology) -> StepReport:
    """Compiles the training step of a recipe for a topology.

    Args:
        config: the whole training config; `data.train` is not needed.
        topology: of `topologies.get_topology`.

    Raises:
        ValueError: the config does not fit the topology's devices, or is wrong, or the compiler
            fails for another reason than memory.
    """
    program = TrainProgram(config, _total_steps(config), topology.devices)
    start = time.perf_counter()
    traced = _trace(program)
    flops = count_jaxpr_flops(traced.jaxpr.jaxpr)
    lowered = traced.lower()
    traced_at = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        arguments = _local_bytes((program.abstract_state(), program.abstract_batch()))
        memory = _out_of_memory(error, arguments, topology)
        traffic = None
    else:
        memory = _memory(compiled, topology)
        traffic = count_traffic(compiled.as_text())
    size = program.mesh.size
    return StepReport(
        topology=topology,
        mesh=dict(program.mesh.shape),
        batch_size=config.data.batch_size,
        attention={name: tower.kernel for name, tower in program.attention().items()},
        loss_form=program.loss_form(),
        micro_batch=config.micro_batch,
        remat=config.model.remat,
        **memory,
        flops=flops // size,
        model_flops=model_flops(config, topology.devices, traced) // size,
        traffic=traffic,
        trace_secs=traced_at - start,
        compile_secs=time.perf_counter() - traced_at,
    )


def roofline(report: StepReport) -> Roofline | None:
    """The estimate for a step that has been compiled; None for a chip that the table lacks."""
    chip = report.topology.chip
    if chip is None or report.traffic is None:
        return None
    compute = report.flops.matmul_flops / chip.peak_flops
    memory = report.traffic.memory_bytes / chip.hbm_bytes_per_sec
    network = sum(
        collective.sent_bytes / link_bandwidth(chip, collective, report)
        for collective in report.traffic.collectives
    )
    latency = sum(
        collective.count * latency_secs(chip, collective, report)
        for collective in report.traffic.collectives
    )
    step = max(compute, memory, network + latency)
    serial = compute + memory + network + latency
    useful = report.model_flops / chip.peak_flops
    return Roofline(compute, memory, network, latency, step, serial, useful / step, useful / serial)


def link_bandwidth(chip: Chip, collective: Collective, report: StepReport) -> float:
    """Bytes per second that a device can send in a collective.

    On a torus of d axes a chip has 2 d links. A permutation uses one of them; a collective over
    all devices can use all; one over some of the devices is counted as a ring along one axis, both
    ways. GPUs of a host send through a switch, at the full rate. Between hosts the members of a
    group that share a host share their network cards; in a permutation every GPU has its own.
    """
    is_permutation = collective.kind == "collective-permute"
    if not chip.num_links:
        rate = chip.link_bytes_per_sec or float("inf")
        if not crosses_hosts(collective, report) or not chip.network_bytes_per_sec:
            return rate
        density = collective.group_size / _span(collective, report)
        members = 1 if is_permutation else max(1, round(density * report.topology.shape[-1]))
        return min(rate, members * chip.network_bytes_per_sec)
    num_devices = len(report.topology.devices)
    links = 1 if is_permutation else 2
    if not is_permutation and collective.group_size == num_devices:
        links = 2 * sum(size > 1 for size in report.topology.shape)
    return chip.link_bytes_per_sec * max(1, links) / chip.num_links


def latency_secs(chip: Chip, collective: Collective, report: StepReport) -> float:
    """Seconds that a collective takes however little it sends: those of its slowest link."""
    return LATENCY_SECS[chip.link(between_hosts=crosses_hosts(collective, report))]


def crosses_hosts(collective: Collective, report: StepReport) -> bool:
    """Whether GPUs of several hosts take part: more of the mesh than the GPUs of a host."""
    return _span(collective, report) > report.topology.shape[-1]


def _span(collective: Collective, report: StepReport) -> int:
    """Devices of the mesh from the first to the last one of a group."""
    if collective.span is not None:
        return collective.span
    is_permutation = collective.kind == "collective-permute"
    return len(report.topology.devices) if is_permutation else collective.group_size


def settings_that_fit(
    config: ml_collections.ConfigDict,
    topology: Topology,
    too_large: StepReport,
    on_try: Callable[[StepReport], None] = lambda report: None,
) -> StepReport | None:
    """The cheapest settings of `micro_batch` and `model.remat` that fit, or None.

    Tries the policies without micro-batches and with them in the order of their FLOPs, and for
    each the largest micro-batches first.

    Args:
        config: the recipe that does not fit.
        topology: what it does not fit on.
        too_large: its report.
        on_try: is given the report of every attempt.
    """
    for candidate in _by_flops(config, topology):
        attempts = [candidate] if candidate.micro_batch is None else _halvings(candidate, too_large)
        for attempt in attempts:
            report = compile_step(attempt, topology)
            on_try(report)
            if report.fits:
                return report
    return None


def _by_flops(
    config: ml_collections.ConfigDict, topology: Topology
) -> list[ml_collections.ConfigDict]:
    """The config with each policy, with and without micro-batches, cheapest first."""
    num_devices, batch_size = len(topology.devices), config.data.batch_size
    found = []
    for order, remat in enumerate(POLICIES):
        for micro_batch in {None, _largest_micro_batch(config, num_devices)}:
            candidate = config.copy_and_resolve_references()
            candidate.model.remat, candidate.micro_batch = remat, micro_batch
            if (remat, micro_batch) == (config.model.remat, config.micro_batch):
                continue
            program = TrainProgram(candidate, _total_steps(config), topology.devices)
            flops = count_jaxpr_flops(_trace(program).jaxpr.jaxpr).matmul_flops
            found.append((flops, order, micro_batch or batch_size, candidate))
    return [candidate for *_, candidate in sorted(found, key=lambda entry: entry[:2])]


def _largest_micro_batch(config: ml_collections.ConfigDict, num_devices: int) -> int | None:
    """The largest one below what the config has; None if there is none."""
    batch_size = config.micro_batch or config.data.batch_size
    for parts in range(2, batch_size // num_devices + 1):
        if batch_size % parts == 0 and batch_size // parts % num_devices == 0:
            return batch_size // parts
    return None


def _halvings(
    candidate: ml_collections.ConfigDict, too_large: StepReport
) -> Iterator[ml_collections.ConfigDict]:
    """The candidate with ever smaller micro-batches, from the first with a chance to fit."""
    num_devices = len(too_large.topology.devices)
    examples_before = too_large.micro_batch or too_large.batch_size
    excess_bytes = too_large.needed_bytes - too_large.argument_bytes
    while True:
        share = candidate.micro_batch / examples_before
        # Intermediate values shrink with the micro-batch; another policy may halve them again.
        if too_large.argument_bytes + share * excess_bytes / 2 < too_large.memory_limit_bytes:
            yield candidate.copy_and_resolve_references()
        smaller = candidate.micro_batch // 2
        if smaller % num_devices or smaller == 0:
            return
        candidate.micro_batch = smaller


def _trace(program: TrainProgram) -> jax.stages.Traced:
    state = program.abstract_state()
    return program.step(state).trace(state, program.abstract_batch())


def _total_steps(config: ml_collections.ConfigDict) -> int:
    """Length of the schedule, a constant of the program without influence on its cost."""
    if config.total_epochs is not None:
        return duration_in_steps(
            config,
            "total",
            batch_size=config.data.batch_size,
            num_examples=1000 * config.data.batch_size,  # the data set is not looked at
        )
    return duration_in_steps(
        config, "total", batch_size=config.data.batch_size, num_examples=config.data.batch_size
    )


def _local_bytes(tree: object) -> int:
    """What one device holds of a tree of shapes with shardings."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def _memory(compiled: jax.stages.Compiled, topology: Topology) -> dict[str, Any]:
    """The fields of `StepReport` about memory."""
    memory, limit = compiled.memory_analysis(), topology.memory_limit_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = memory.peak_memory_in_bytes
    allocated = (
        memory.argument_size_in_bytes
        + results
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    if topology.devices[0].platform != "tpu":
        needed = max(needed, allocated)
    return {
        "memory_limit_bytes": limit,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "needed_bytes": needed,
        "fits": limit is None or needed <= limit,
    }


def _out_of_memory(
    error: jax.errors.JaxRuntimeError, argument_bytes: int, topology: Topology
) -> dict[str, Any]:
    """The same from the TPU compiler's error; any other error is no verdict on memory."""
    size = r"([\d.]+[KMGT]?)"
    whole = re.search(rf"Used {size} of {size} hbm", str(error))
    temporaries = re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", str(error))
    found = whole or temporaries
    if not found:
        raise ValueError(
            f"the compiler for {topology.name} gave up, for another reason than memory: "
            f"{str(error).splitlines()[0]}"
        ) from error
    needed_bytes, limit_bytes = (_parse_size(text) for text in found.groups())
    if not whole:
        needed_bytes += argument_bytes
    return {
        "memory_limit_bytes": limit_bytes,
        "argument_bytes": argument_bytes,
        "temporary_bytes": None,
        "peak_bytes": needed_bytes,
        "needed_bytes": needed_bytes,
        "fits": False,
    }


def _parse_size(text: str) -> int:
    """ "15.75G" -> bytes."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    return round(float(text.rstrip("KMGT")) * units.get(text[-1], 1))
