"""Functions shared by all recipes: the argument of --config, debug shrinking, machine settings.

The argument follows the recipe's name, as `key=value` pairs separated by commas:

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

# Architecture -> examples per 80 GB GPU at a time that fit without rematerialisation (remat
# "none"): with the whole state on every GPU, as on one host, and with one eighth of the state.
# Found by compiling: docs/benchmarks/gpus.md.
EXAMPLES_AT_ONCE = {
    "diht_vitb32_224px": (1024, 1024),
    "diht_vitb16_224px": (512, 512),
    "diht_vitl14_224px": (128, 128),
    "diht_vitl14_336px": (64, 128),
}
GPUS_OF_80_GB = ("a100_80gb", "h100", "h200")
# (architecture, TPU with more memory than the recipes' v5e) -> policy of `model.remat` with the
# lowest bound on the step time, and GiB kept per example with it. None: no fitting policy has a
# lower bound than the recipe. Found by compiling: docs/benchmarks/pods.md.
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
# Used if the memory of an accelerator is unknown.
_LEAST_GIB = 8.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices that a recipe runs on."""

    has_accelerator: bool = False  # whether they are GPUs or TPUs
    num_devices: int = 1
    device_gib: float = _LEAST_GIB  # memory of the smallest device

    def divisible(self, batch_size: int) -> int:
        """Rounds a batch size down to a power of two, and then up to a multiple of the devices."""
        power = 1 << (batch_size.bit_length() - 1)
        return -(-power // self.num_devices) * self.num_devices

    def micro_batch(self, model: str, batch_size: int) -> int | None:
        """Returns the largest part of a batch that fits; None if all of it does, or if unknown."""
        if not self.has_accelerator or model not in EXAMPLES_AT_ONCE:
            return None
        most = max(1, int(EXAMPLES_AT_ONCE[model][0] * self.device_gib / 80))
        return _largest_micro_batch(batch_size, self.num_devices, most)


def find_machine(topology: str | None) -> Machine:
    """Describes the devices of a topology, or those of this machine, without starting JAX."""
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
    """Returns the memory of each visible GPU; one entry of `_LEAST_GIB` if it is unknown."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    query += [f"--id={visible}"] if visible else []
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
        # Rounded up because the driver reserves a part, 0.4 of the 80 GiB of an H100.
        return [math.ceil(float(mib) / 1024) for mib in output.stdout.split()] or [_LEAST_GIB]
    except (OSError, ValueError, subprocess.SubprocessError):
        return [_LEAST_GIB]


def parse_arg(arg: str, **defaults: Any) -> ml_collections.ConfigDict:
    """Parses the text after the colon of --config.

    Every recipe accepts `debug` (False: the full recipe; True: shrunk to seconds on a CPU) and
    `topology` (None: the recipe's own; else the target machine, such as "h100:8").

    Args:
        arg: text such as "" or "debug=True,topology=h100:8".
        **defaults: further keys of this recipe with their defaults, each a bool, int, float or str;
            values in `arg` are converted to the type of the default.

    Returns:
        All keys with their values.

    Raises:
        ValueError: a key is unknown or repeated, a value has the wrong type, or the topology is
            unknown.
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
    """Applies the arguments from `parse_arg` to a recipe, in place, and returns it."""
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
    """Applies the settings of one stage to a recipe, in place.

    Args:
        config: the settings shared by all stages.
        number: number of the stage, from 1; 0 trains all stages, and applies the first one.
        stages: dotted names of keys and their values, for each stage.

    Raises:
        ValueError: there is no such stage.
    """
    if not 0 <= number <= len(stages):
        raise ValueError(
            f"recipe argument 'stage={number}': expected 1 to {len(stages)}, or none for all"
        )
    config.update_from_flattened_dict(stages[max(number, 1) - 1])
    config.stage.count, config.stage.number = len(stages), number or None


def suit(config: ml_collections.ConfigDict, topology: str) -> None:
    """Chooses, in place, how the step is computed on a machine; the result stays the same.

    Settings are known for the DiHT architectures on 80 GB GPUs, with any number of hosts. There,
    scanning over layers costs more than it saves, because it copies the kept activations. One host
    has room for the whole state, and several hosts exchange less data if each shards the state over
    its own GPUs. `loss.impl="auto"` selects the form of the loss by the mesh. TPUs in
    `TPU_SETTINGS` are configured by their memory. Other machines keep the recipe's settings, and a
    warning is logged.
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
        return  # training reports that the batch is not divisible
    most = EXAMPLES_AT_ONCE[config.model.name][several_hosts]
    config.micro_batch = _largest_micro_batch(config.data.batch_size, gpus, most)


def _largest_micro_batch(batch_size: int, num_devices: int, most: int) -> int | None:
    """Returns the largest micro-batch with at most `most` examples per device; None for all."""
    of_each = batch_size // num_devices
    at_once = max(number for number in range(1, most + 1) if of_each % number == 0)
    return at_once * num_devices if at_once < of_each else None


def _suit_tpu(config: ml_collections.ConfigDict, family: str, chips: int) -> None:
    """Keeps more activations for the backward pass if the memory of the chips allows it."""
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
    """Shrinks a recipe, in place, to seconds on a CPU; keeps losses, schedule and rules."""
    config.total_steps, config.total_examples, config.total_epochs = 4, None, None
    config.model.dtype = "float32"
    config.model.overrides.update(
        # Stages keep different image sizes, as in the full recipe.
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
        config.mesh.data, config.mesh.fsdp = 1, -1  # all available devices
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
