"""Command: compile the training step of a recipe for another machine, without that machine.

    python -m diht_jax.compile --config diht_vitl14 --topology v5e:16x16

Prints, for one device and one step, memory, floating-point operations, traffic, communication and
the least time it takes. Fewer devices than the recipe is meant for take their part of its batch.
Exits with 1 when the step does not fit, after having looked for a batch that does, and for settings
of `config.micro_batch` and `config.model.remat` that do with the whole batch. Nothing is run and no
array is made.
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

# Policies of `model.remat` by the FLOPs of what they compute again.
_CHEAPEST_FIRST = ("none", "dots", "minimal", "full")
# Least memory of intermediate values, in shares of what their number of examples lets expect.
_SAME_SETTINGS, _OTHER_POLICY = 0.85, 0.5


def define_flags() -> None:
    """The command line of `main`."""
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
    """Compiles, prints the report, and exits with the verdict."""
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
        # The machine's own devices are of no use here.
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
    """A recipe on fewer devices than those of its own `config.topology`.

    A device has as many examples as there; `mesh.fsdp` becomes all devices where it does not divide
    them. What the user set, by the dotted names in `set_keys`, stays.

    Returns:
        The config, and the flags that are changed.
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
    """A copy of the config with other values of some keys, by their dotted names."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    return changed


def compile_step(config: ml_collections.ConfigDict, topology: Topology) -> StepReport:
    """Compiles the training step of a recipe for a topology; `data.train` is not needed.

    Raises:
        ValueError: the config does not fit the topology's devices, or is wrong, or the compiler
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
    """Halvings of the batch, with the other settings as they are; `too_large` does not fit."""
    first = config.micro_batch or config.data.batch_size // 2
    for batch_size in _halvings(first, too_large, _SAME_SETTINGS):
        yield {"data.batch_size": batch_size, "micro_batch": None}


def cheaper_settings(
    config: ml_collections.ConfigDict, too_large: StepReport
) -> Iterator[dict[str, Any]]:
    """Settings of `micro_batch` and `model.remat`, the cheapest first; `too_large` does not fit.

    The policies without micro-batches and then with them, which cost another forward pass of the
    towers, each from the cheapest policy on and with the largest micro-batches first.
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
    """Compiles the config with one choice of settings after the other; prints every attempt."""
    for changes in choices:
        report = compile_step(_changed(config, changes), topology)
        print_escaped(describe_try(report, changes))
        if report.fits:
            return changes
    return None


def fastest_settings(
    config: ml_collections.ConfigDict, topology: Topology, report: StepReport
) -> tuple[StepReport, dict[str, Any]]:
    """The settings with the least bound of those that fit, and what they change.

    Tries unrolling with each policy of `model.remat`, then, with the best of these, micro-batches,
    and then the mesh. Prints every attempt. `report` is that of the config as it is.
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
    """Other values of the settings that trade memory for time, those that belong together."""
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
    """The bound of the time, or the FLOPs where the rates of the device are not known."""
    estimate = report.roofline
    return estimate.scheduled_secs if estimate else report.flops


def _largest_micro_batch(config: ml_collections.ConfigDict, num_devices: int) -> int | None:
    """The largest one below what the config has; None if there is none."""
    batch_size = config.micro_batch or config.data.batch_size
    for parts in range(2, batch_size // num_devices + 1):
        if batch_size % parts == 0 and batch_size // parts % num_devices == 0:
            return batch_size // parts
    return None


def _halvings(first: int, too_large: StepReport, share: float) -> list[int]:
    """Examples to embed at once: `first` and ever fewer, without those that cannot fit.

    Intermediate values shrink with the examples. They may take this `share` of what follows from
    that, and from what does not fit.
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
    """Length of the schedule, a constant of the program without influence on its cost."""
    # Of epochs, the data set is not looked at: take one that the warm-up and the decay fit into.
    least = config.optimizer.warmup_steps + (config.optimizer.decay_steps or 0) + 1
    num_examples = config.data.batch_size * math.ceil(least / (config.total_epochs or 1))
    return duration_in_steps(config, "total", num_examples=num_examples)


def _memory(compiled: jax.stages.Compiled, topology: Topology) -> dict[str, Any]:
    """The fields of `StepReport` about memory."""
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
    """The same fields from the TPU compiler's error; any other error is no verdict on memory."""
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
