"""Command: compile the training step of a recipe ahead of time for another machine.

    python -m diht_jax.compile --config diht_vitl14 --topology v5e:16x16

Prints memory, floating-point operations, memory traffic, communication and a lower bound on the
time, for one device and one step. With fewer devices than the recipe's, the batch is smaller by the
same factor. If the step does not fit into memory, the command searches for a smaller batch that
fits, and for settings of `config.micro_batch` and `config.model.remat` that fit the whole batch,
and exits with 1. Nothing is executed and no arrays are allocated.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from diht_jax import command_line
from diht_jax.hardware.chips import count_jaxpr_flops
from diht_jax.hardware.hlo_traffic import count_traffic, tpu_kernels
from diht_jax.hardware.report import (
    StepReport,
    describe_changes,
    describe_found,
    describe_proposal,
    describe_step,
    describe_try,
)
from diht_jax.hardware.schedule import read_kernels
from diht_jax.hardware.topologies import LOCAL, Topology, get_topology, parse_topology
from diht_jax.terminal import print_escaped
from diht_jax.training.initial_parameters import bind_architecture
from diht_jax.training.monitoring.throughput import model_flops
from diht_jax.training.program import TrainProgram
from diht_jax.training.recipe import COMMENT_FILES, check_config, default_config, duration_in_steps

# Policies of `model.remat` in order of recomputed FLOPs.
_CHEAPEST_FIRST = ("none", "dots", "minimal", "full")
# Least memory of intermediate values, relative to scaling with the number of examples.
_SAME_SETTINGS, _OTHER_POLICY = 0.85, 0.5


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    config_flags.DEFINE_config_file("config", None, "Recipe: a name such as emoji, or a path.")
    flags.DEFINE_string(
        "topology",
        None,
        "What to compile for, such as v5e:16x16, v4:4x4x8, h100:8, or local; the recipe's own "
        "(config.topology) by default.",
    )
    flags.DEFINE_integer(
        "batch_size",
        None,
        "Examples a batch, over all devices; unset: config.data.batch_size, or a part of it for "
        "fewer devices than config.topology has.",
        lower_bound=1,
    )
    flags.DEFINE_alias("global_batch", "batch_size")
    flags.DEFINE_bool("search", True, "Look for settings that fit when the recipe's do not.")
    flags.DEFINE_bool(
        "propose",
        False,
        "Compile other settings of unrolling, remat, micro-batch and mesh too, and print the "
        "fastest by the bound: about ten compilations.",
    )
    flags.mark_flag_as_required("config")


def main() -> None:
    """Compiles the step, prints the report, and exits with 1 if the step does not fit."""
    values = flags.FLAGS
    config = values.config
    check_config(config)
    if config.stage.count and not config.stage.number:
        raise ValueError(
            f"config.stage.count={config.stage.count}: each stage is a program of its own; name "
            "one by the recipe's argument, such as stage=1"
        )
    name = values.topology or config.topology
    if not name:
        raise ValueError(
            "the recipe names no config.topology; name what to compile for: --topology v5e:16x16"
        )
    if name != LOCAL:
        # This machine's accelerators are not needed.
        jax.config.update("jax_platforms", "cpu")

    config_flag: Any = values["config"]
    set_keys = set(config_flag.override_values)
    if config.model.init_from is not None:
        config = bind_architecture(config, set_keys=set_keys)
    topology = get_topology(name)
    if values.batch_size is not None:
        config.data.batch_size = values.batch_size
        set_keys.add("data.batch_size")
    config, changes = for_fewer_devices(config, len(topology.devices), set_keys)
    if changes:
        print_escaped(f"{name} has fewer devices than {config.topology}: {' '.join(changes)}\n")
    logging.info("compiling for %d devices; minutes for a large model", len(topology.devices))
    report = compile_step(config, topology)
    print_escaped(describe_step(report))
    if values.propose:
        print_escaped("\nlooking for faster settings:")
        print_escaped(describe_proposal(report, *fastest_settings(config, topology, report)))
    if report.fits:
        return
    if values.search and not values.propose:
        print_escaped("\nlooking for a batch that fits:")
        smaller = smaller_batches(config, report)
        print_escaped(describe_found(first_that_fits(config, topology, smaller)))
        print_escaped("\nlooking for settings that fit with the whole batch:")
        cheaper = cheaper_settings(config, report)
        print_escaped(describe_found(first_that_fits(config, topology, cheaper)))
    sys.exit(1)


def for_fewer_devices(
    config: ml_collections.ConfigDict, num_devices: int, set_keys: Collection[str]
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """Adapts a recipe to fewer devices than those of its `config.topology`.

    The number of examples per device does not change. If `mesh.fsdp` does not divide the devices,
    it becomes their number. Keys in `set_keys` (dotted names), set by the user, are not changed.

    Returns:
        The config, and the changed keys as flags.
    """
    if not config.topology or config.topology == LOCAL or "topology" in set_keys:
        return config, []
    meant_for = math.prod(parse_topology(config.topology)[1])
    if num_devices >= meant_for:
        return config, []
    changed: dict[str, int] = {}
    if "data.batch_size" not in set_keys:
        changed["data.batch_size"] = config.data.batch_size // meant_for * num_devices
        if config.micro_batch and "micro_batch" not in set_keys:
            changed["micro_batch"] = config.micro_batch // meant_for * num_devices
    if num_devices % config.mesh.fsdp and "mesh.fsdp" not in set_keys:
        changed["mesh.fsdp"] = num_devices
    return _changed(config, changed), [f"--config.{k}={value}" for k, value in changed.items()]


def _changed(config: ml_collections.ConfigDict, changes: dict[str, Any]) -> Any:
    """Returns a copy of the config with other values of some keys, by their dotted names."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    return changed


def compile_step(config: ml_collections.ConfigDict, topology: Topology) -> StepReport:
    """Compiles the training step of a recipe for a topology; `data.train` is not needed.

    Raises:
        ValueError: the config is wrong or does not match the topology's devices, or the compiler
            fails for another reason than memory.
    """
    program = TrainProgram(config, _total_steps(config), topology.devices)
    start = time.perf_counter()
    state = program.abstract_state()
    traced = program.step(state).trace(state, program.abstract_batch())
    flops = count_jaxpr_flops(traced.jaxpr.jaxpr)
    lowered = traced.lower()
    traced_at = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        arguments = sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves((state, program.abstract_batch()))
        )
        memory = _out_of_memory(error, arguments, topology)
        traffic = None
    else:
        memory = _memory(compiled, topology)
        text = compiled.as_text()
        traffic = count_traffic(text, read_kernels(tpu_kernels(text)))
    size = program.mesh.size
    return StepReport(
        topology=topology,
        mesh=dict(program.mesh.shape),
        batch_size=config.data.batch_size,
        attention={name: tower.kernel for name, tower in program.attention().items()},
        loss_form=tuple(program.loss_form()),
        micro_batch=config.micro_batch,
        remat=config.model.remat,
        **memory,
        flops=flops // size,
        model_flops=model_flops(config, topology.devices, traced) // size,
        traffic=traffic,
        trace_secs=traced_at - start,
        compile_secs=time.perf_counter() - traced_at,
    )


def smaller_batches(
    config: ml_collections.ConfigDict, too_large: StepReport
) -> Iterator[dict[str, Any]]:
    """Yields repeated halvings of the batch without micro-batches; `too_large` does not fit."""
    first = config.micro_batch or config.data.batch_size // 2
    for batch_size in _halvings(first, too_large, _SAME_SETTINGS):
        yield {"data.batch_size": batch_size, "micro_batch": None}


def cheaper_settings(
    config: ml_collections.ConfigDict, too_large: StepReport
) -> Iterator[dict[str, Any]]:
    """Yields settings of `micro_batch` and `model.remat`, cheapest first; `too_large` does not fit.

    All policies come first without micro-batches, and then with them, since these cost another
    forward pass of the towers. Cheaper policies and larger micro-batches come first.
    """
    largest = _largest_micro_batch(config, len(too_large.topology.devices))
    for micro_batch, remat in itertools.product(dict.fromkeys((None, largest)), _CHEAPEST_FIRST):
        if (remat, micro_batch) == (config.model.remat, config.micro_batch):
            continue
        sizes: Sequence[int | None] = [None]
        if micro_batch is not None:
            sizes = _halvings(micro_batch, too_large, _OTHER_POLICY)
        for size in sizes:
            yield {"model.remat": remat, "micro_batch": size}


def first_that_fits(
    config: ml_collections.ConfigDict, topology: Topology, choices: Iterable[dict[str, Any]]
) -> dict[str, Any] | None:
    """Returns the first choice of settings with which the step fits; prints every attempt."""
    for changes in choices:
        report = compile_step(_changed(config, changes), topology)
        print_escaped(describe_try(report, changes))
        if report.fits:
            return changes
    return None


def fastest_settings(
    config: ml_collections.ConfigDict, topology: Topology, report: StepReport
) -> tuple[StepReport, dict[str, Any]]:
    """Returns the fastest settings that fit, by the bound on the time, and their changes.

    Tries unrolling with each policy of `model.remat`, then micro-batches with the best of these,
    and then the mesh. Prints every attempt. `report` is that of the unchanged config.
    """
    best, changes = report, {}
    for choices in _choices(config, len(topology.devices)):
        kept = changes
        for choice in choices:
            tried = {**kept, **choice}
            try:
                found = compile_step(_changed(config, tried), topology)
            except ValueError as error:
                print_escaped(f"  {describe_changes(tried)}: {error}")
                continue
            print_escaped(describe_try(found, tried))
            if found.fits and (not best.fits or _cost(found) < _cost(best)):
                best, changes = found, tried
    return best, changes


def _choices(config: ml_collections.ConfigDict, num_devices: int) -> list[list[dict[str, Any]]]:
    """Returns groups of alternative values of the settings that trade memory for time."""
    now = {"model.scan_layers": config.model.scan_layers, "model.remat": config.model.remat}
    pairs = itertools.product((False, True), _CHEAPEST_FIRST)
    layers = [dict(zip(now, pair, strict=True)) for pair in pairs]
    sizes = {None, config.micro_batch, _largest_micro_batch(config, num_devices)}
    fsdp = config.mesh.fsdp if config.mesh.data == -1 else 0
    meshes = [size for size in (fsdp // 2, 2 * fsdp) if size > 0 and num_devices % size == 0]
    return [
        [choice for choice in layers if choice != now],
        [{"micro_batch": size} for size in sizes - {config.micro_batch}],
        [{"mesh.fsdp": size} for size in meshes],
    ]


def _cost(report: StepReport) -> float:
    """Returns the bound on the time, or the FLOPs if the device's peak rates are unknown."""
    estimate = report.roofline
    return estimate.scheduled_secs if estimate else report.flops


def _largest_micro_batch(config: ml_collections.ConfigDict, num_devices: int) -> int | None:
    """Returns the largest valid micro-batch below the config's; None if there is none."""
    batch_size = config.micro_batch or config.data.batch_size
    for parts in range(2, batch_size // num_devices + 1):
        if batch_size % parts == 0 and batch_size // parts % num_devices == 0:
            return batch_size // parts
    return None


def _halvings(first: int, too_large: StepReport, share: float) -> list[int]:
    """Returns `first` and its repeated halvings, without sizes that cannot fit.

    The memory of intermediate values is predicted from `too_large` in proportion to the examples;
    a size is excluded if `share` of this prediction does not fit.
    """
    least = len(too_large.topology.devices)
    examples_before = too_large.micro_batch or too_large.batch_size
    excess_bytes = too_large.needed_bytes - too_large.argument_bytes
    assert too_large.memory_limit_bytes is not None  # else nothing is too large
    room_bytes = (too_large.memory_limit_bytes - too_large.argument_bytes) / share
    sizes = []
    while first and first % least == 0:
        if first / examples_before * excess_bytes < room_bytes:
            sizes.append(first)
        first = first // 2 if first % 2 == 0 else 0
    return sizes


def _total_steps(config: ml_collections.ConfigDict) -> int:
    """Returns the length of the schedule, a constant of the program without effect on its cost."""
    # The data set is not read for its size; assume one that is large enough for warm-up and decay.
    least = config.optimizer.warmup_steps + (config.optimizer.decay_steps or 0) + 1
    num_examples = config.data.batch_size * math.ceil(least / (config.total_epochs or 1))
    return duration_in_steps(config, "total", num_examples=num_examples)


def _memory(compiled: jax.stages.Compiled, topology: Topology) -> dict[str, Any]:
    """Returns the fields of `StepReport` about memory."""
    memory: Any = compiled.memory_analysis()
    limit = topology.memory_limit_bytes
    needed = memory.peak_memory_in_bytes
    allocated = (
        memory.argument_size_in_bytes
        + (memory.output_size_in_bytes - memory.alias_size_in_bytes)
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
    """Returns the same fields from the TPU compiler's out-of-memory error; raises any other one."""
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
    """Parses a size such as 15.75G to bytes."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    return round(float(text.rstrip("KMGT")) * units.get(text[-1], 1))


if __name__ == "__main__":
    define_flags()
    command_line.run(main, config_defaults=default_config, comment_files=COMMENT_FILES)
