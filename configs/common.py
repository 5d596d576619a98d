"""Shared by all recipes: the argument after the colon, the debug form, the settings of a machine.

The argument holds any number of `key=value`, with commas between them:

    --config diht_vitb32:debug=True
    --config diht_vitb16:topology=h100:64x8
"""

import dataclasses
import math
import os
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from diht_jax.config.checks import suggest
from diht_jax.hardware.chips import GIB, find_chip
from diht_jax.hardware.compiler import accelerator
from diht_jax.hardware.topologies import LOCAL, parse_topology

# Architecture -> examples that a GPU of 80 GB takes at once with all values kept for the backward
# pass (remat "none"): with the whole state on every GPU, as on one host, and with an eighth of it.
# Found by compiling: docs/benchmarks/gpus.md.
EXAMPLES_AT_ONCE = {
    "diht_vitb32_224px": (1024, 1024),
    "diht_vitb16_224px": (512, 512),
    "diht_vitl14_224px": (128, 128),
    "diht_vitl14_336px": (64, 128),
}
GPUS_OF_80_GB = ("a100_80gb", "h100", "h200")
# (architecture, TPU of more memory than the recipes' v5e) -> policy of `model.remat` with the
# lowest bound, and GiB that an example keeps under it. None: nothing that fits has a lower bound
# than the recipe. Found by compiling: docs/benchmarks/pods.md.
TPU_SETTINGS: dict[tuple[str, str], tuple[str, float] | None] = {
    ("diht_vitb32_224px", "v4"): ("none", 0.027),
    ("diht_vitb32_224px", "v5p"): ("none", 0.027),
    ("diht_vitb32_224px", "v6e"): ("none", 0.027),
    ("diht_vitb16_224px", "v4"): ("none", 0.058),
    ("diht_vitb16_224px", "v5p"): ("none", 0.058),
    ("diht_vitb16_224px", "v6e"): ("none", 0.058),
    ("diht_vitl14_224px", "v4"): ("minimal", 0.09),
    ("diht_vitl14_224px", "v5p"): ("minimal", 0.09),
    ("diht_vitl14_224px", "v6e"): None,
    ("diht_vitl14_336px", "v4"): None,
    ("diht_vitl14_336px", "v5p"): ("minimal", 0.183),
    ("diht_vitl14_336px", "v6e"): None,
}
# Taken where the memory of an accelerator is not known.
_LEAST_GIB = 8.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices that a recipe is for."""

    has_accelerator: bool = False  # they are GPUs or TPUs
    num_devices: int = 1  # how many
    device_gib: float = _LEAST_GIB  # memory of the smallest of them

    def divisible(self, batch_size: int) -> int:
        """A batch that divides by the devices: the largest power of two below, or a little more."""
        power = 1 << (batch_size.bit_length() - 1)
        return -(-power // self.num_devices) * self.num_devices

    def micro_batch(self, model: str, batch_size: int) -> int | None:
        """The largest part of a batch that fits; None where all of it does, or nothing is known."""
        if not self.has_accelerator or model not in EXAMPLES_AT_ONCE:
            return None
        most = max(1, int(EXAMPLES_AT_ONCE[model][0] * self.device_gib / 80))
        return _largest_micro_batch(batch_size, self.num_devices, most)


def find_machine(topology: str | None) -> Machine:
    """The devices of a topology, or those of this machine, which JAX is not asked for yet."""
    if topology not in (None, LOCAL):
        family, shape = parse_topology(topology)
        return Machine(True, math.prod(shape), find_chip(family).hbm_bytes / GIB)
    kind = accelerator()
    if kind == "gpu":
        memories = _gpu_gib()
        return Machine(True, len(memories), min(memories))
    if kind == "tpu":
        found = {path.name for path in pathlib.Path("/dev").glob("accel[0-9]*")}
        found |= {path.name for path in pathlib.Path("/dev/vfio").glob("[0-9]*")}
        return Machine(True, max(1, len(found)))
    return Machine()


def _gpu_gib() -> list[float]:
    """Memory of each GPU that this process may use; one of `_LEAST_GIB` where that is not known."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    query += [f"--id={visible}"] if visible else []
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
        # Rounded up: the driver keeps a part, 0.4 of the 80 GiB of an H100.
        return [math.ceil(float(mib) / 1024) for mib in output.stdout.split()] or [_LEAST_GIB]
    except (OSError, ValueError, subprocess.SubprocessError):
        return [_LEAST_GIB]


def parse_arg(arg: str, **defaults: Any) -> ml_collections.ConfigDict:
    """The values in the text after the colon of --config.

    Every recipe knows `debug` (False: the recipe as it is; True: shrunk to seconds on a CPU) and
    `topology` (None: the recipe's own; else the machine it is meant for, such as "h100:8").

    Args:
        arg: such as "" or "debug=True,topology=h100:8".
        **defaults: further keys of this recipe with their defaults, each a bool, int, float or str;
            a value in `arg` is converted to the type of the default.

    Returns:
        All keys with their values.

    Raises:
        ValueError: an unknown key, a key that occurs twice, a value of another type, or no such
            topology.
    """
    known = {"debug": False, "topology": None, **defaults}
    given: dict[str, Any] = {}
    for setting in filter(None, arg.split(",")):
        key, equals, text = setting.partition("=")
        where = f"recipe argument '{setting[:200]}'"
        if not equals:
            raise ValueError(f"{where}: expected key=value, such as debug=True")
        if key not in known:
            raise ValueError(f"{where}: unknown key; {suggest(key, sorted(known))}")
        if key in given:
            raise ValueError(f"{where}: '{key}' is given twice")
        given[key] = _convert(text, known[key], where)
        if key == "topology" and text != LOCAL:
            try:
                parse_topology(text)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    return ml_collections.ConfigDict({**known, **given})


def finish(
    config: ml_collections.ConfigDict, args: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """The recipe as `args` (of `parse_arg`) ask for it; changes `config` in place."""
    if args.topology not in (None, config.topology, LOCAL):
        suit(config, args.topology)
    if args.debug:
        shrink(config)
    if args.topology is not None:
        config.topology = args.topology
    return config


def set_stage(
    config: ml_collections.ConfigDict, number: int, stages: Sequence[Mapping[str, Any]]
) -> None:
    """Sets, in place, what differs in one of the stages of a recipe.

    Args:
        config: with what the stages have in common.
        number: of the stage, from 1; 0 for all of them, which gives the config of the first one.
        stages: dotted names of keys and their values, for each stage.

    Raises:
        ValueError: no such stage.
    """
    if not 0 <= number <= len(stages):
        raise ValueError(
            f"recipe argument 'stage={number}': expected 1 to {len(stages)}, or none for all"
        )
    config.update_from_flattened_dict(stages[max(number, 1) - 1])
    config.stage.count, config.stage.number = len(stages), number or None


def suit(config: ml_collections.ConfigDict, topology: str) -> None:
    """Sets, in place, how the step is computed on a machine; what it computes stays the same.

    Known are the DiHT architectures on GPUs of 80 GB, in any number of hosts. There a scan costs
    more than it saves, for it copies the values that it keeps; a host has room for the whole state,
    and several hosts save traffic between them where each splits the state over its own GPUs.
    `loss.impl="auto"` chooses the form of the loss by the mesh. Known are also those of
    `TPU_SETTINGS`, where the memory decides. For every other machine the recipe stays as it is, and
    a line in the log says so.
    """
    family, shape = parse_topology(topology)
    if (config.model.name, family) in TPU_SETTINGS:
        _suit_tpu(config, family, math.prod(shape))
        return
    if family not in GPUS_OF_80_GB or config.model.name not in EXAMPLES_AT_ONCE:
        logging.warning(
            "no settings of their own are known for %s on %s; it keeps those for %s. Whether they "
            "fit: python -m diht_jax.compile",
            config.model.name,
            topology,
            config.topology,
        )
        return
    config.model.remat = "none"
    config.model.scan_layers = False
    several_hosts = len(shape) > 1
    config.mesh.fsdp = shape[-1] if several_hosts else 1
    gpus = math.prod(shape)
    if config.data.batch_size % gpus:
        return  # training explains that the batch does not divide by the devices
    most = EXAMPLES_AT_ONCE[config.model.name][several_hosts]
    config.micro_batch = _largest_micro_batch(config.data.batch_size, gpus, most)


def _largest_micro_batch(batch_size: int, num_devices: int, most: int) -> int | None:
    """The largest part of a batch with at most `most` examples a device; None for all of it."""
    of_each = batch_size // num_devices
    at_once = max(number for number in range(1, most + 1) if of_each % number == 0)
    return at_once * num_devices if at_once < of_each else None


def _suit_tpu(config: ml_collections.ConfigDict, family: str, chips: int) -> None:
    """Keeps more for the backward pass than the recipe does where a chip has room for it."""
    settings = TPU_SETTINGS[config.model.name, family]
    if settings is None:
        return
    remat, example_gib = settings
    if remat == "none":
        config.model.scan_layers = False  # as on GPUs
    kept_gib = example_gib * config.data.batch_size / chips
    if kept_gib < 0.8 * find_chip(family).hbm_bytes / GIB:
        config.model.remat = remat


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks a recipe, in place, to seconds on a CPU; losses, schedule and rules stay its own."""
    config.total_steps, config.total_examples, config.total_epochs = 4, None, None
    config.model.dtype = "float32"
    config.model.overrides.update(
        # The pictures of stages are of different sizes, as in the recipe.
        image_size=16 * (config.stage.number or 1) if config.stage.count else 32,
        patch_size=8,
        vision_layers=2,
        vision_width=32,
        vision_heads=2,
        text_layers=2,
        text_width=32,
        text_heads=2,
        embed_dim=32,
    )
    config.optimizer.warmup_steps = 2
    config.data.batch_size = 16
    config.micro_batch = 8 if config.micro_batch else None
    config.topology = "local"
    if config.mesh.fsdp > 1:
        config.mesh.data, config.mesh.fsdp = 1, -1  # all devices that there are
    config.data.num_workers = 0
    config.log_every_steps = 1
    config.checkpoint.every_steps = 2
    config.evaluation.every_steps = None
    config.evaluation.tasks = ""
    config.data.validation_share = 0.0
    config.checkpoint.best_metric = None
    return config


def _convert(text: str, default: Any, where: str) -> Any:
    if isinstance(default, bool):
        if text not in ("True", "False"):
            raise ValueError(f"{where}: expected True or False")
        return text == "True"
    kind = str if default is None else type(default)
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{where}: expected {kind.__name__}, such as {default}") from error
