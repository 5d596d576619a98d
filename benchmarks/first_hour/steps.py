"""Measures the recipes' training steps: time, MFU and memory, with the compiled estimates."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks import train_step
from benchmarks.first_hour.plan import Setting
from configs.common import EXAMPLES_AT_ONCE, shrink
from diht_jax import sharding
from diht_jax.compile import compile_step
from diht_jax.config import load_recipe
from diht_jax.hardware.chips import find_chip
from diht_jax.hardware.topologies import LOCAL, get_topology
from diht_jax.training.program import TrainProgram
from diht_jax.training.recipe import duration_in_steps

# Examples per device in a micro-batch; for a GPU, they depend on its memory.
_CPU_EXAMPLES, _TPU_EXAMPLES = 4, 256
_PROFILED_STEPS = 3
# Number of the longest operations of a profile that are listed.
_NAMED_OPERATIONS = 15


def plain_config(setting: Setting, model: str, batch_size: int) -> ml_collections.ConfigDict:
    """Returns a config without concepts, as in `benchmarks.train_step`; a tiny one if small."""
    config = train_step.diht_config(model, setting.device, batch_size)
    if setting.small:
        _shrink(config)
        config.total_steps = 100
        config.data.batch_size = batch_size
    return config


def devices_for(setting: Setting) -> tuple[jax.Device, ...]:
    """Returns all devices; if small, only one, since eight on two cores wait for each other."""
    return tuple(jax.devices()[: 1 if setting.small else None])


def recipe_config(
    setting: Setting, recipe: str, micro_batches: int = 1
) -> ml_collections.ConfigDict:
    """Returns a recipe for all devices here, with a micro-batch that suits their kind."""
    num_devices = len(devices_for(setting))
    topology = "topology=h100:8" if setting.device == "gpu" else ""
    config = load_recipe(recipe, topology)
    at_once = {"cpu": _CPU_EXAMPLES, "tpu": _TPU_EXAMPLES}.get(setting.device)
    if at_once is None:
        at_once = _gpu_examples(config.model.name)
    if setting.device == "cpu":
        config.model.dtype = "float32"
    if setting.small:
        _shrink(config)
        at_once = 2
    config.mesh.data, config.mesh.fsdp = -1, 1 if num_devices % 8 or setting.device == "gpu" else 8
    config.data.batch_size = micro_batches * at_once * num_devices
    config.micro_batch = at_once * num_devices if micro_batches > 1 else None
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    shrink(config)
    config.model.overrides.update(vision_layers=1, text_layers=1, context_length=16, vocab_size=700)


def measure_step(setting: Setting, recipe: str, micro_batches: int = 1) -> dict[str, Any]:
    """Compiles, runs and profiles a recipe's training step on a random batch."""
    config = recipe_config(setting, recipe, micro_batches)
    batch_size = config.data.batch_size
    devices = devices_for(setting)
    topology = get_topology(LOCAL)
    report = compile_step(
        config, dataclasses.replace(topology, devices=devices, shape=(len(devices),))
    )
    total = duration_in_steps(config, "total", num_examples=batch_size)
    program = TrainProgram(config, total, devices)
    state = program.create_state()
    step = program.step(state)
    batch = random_batch(program)
    start = time.perf_counter()
    losses = []

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))

    run(1)
    first_secs = time.perf_counter() - start
    rounds, steps = (1, 1) if setting.small else (3, 3) if setting.device == "cpu" else (5, 10)
    secs = []
    for _ in range(rounds):
        start = time.perf_counter()
        run(steps)
        secs.append((time.perf_counter() - start) / steps)
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    profile_of = f"{recipe}_{micro_batches}"
    profile = _profile(lambda: run(_PROFILED_STEPS), setting, profile_of)
    median, roofline = statistics.median(secs), report.roofline
    chip = find_chip(jax.devices()[0].device_kind)
    peak = chip and chip.peak_flops
    return {
        "recipe": recipe,
        "devices": len(devices),
        "batch_size": batch_size,
        "micro_batch": config.micro_batch,
        "attention": report.attention,
        "remat": config.model.remat,
        "loss_form": report.loss_form[0],
        "losses": losses,
        "secs_of_steps": secs,
        "step_secs": median,
        "first_step_secs": first_secs,
        "compile_secs": report.compile_secs,
        "images_per_sec": batch_size / median,
        "mfu": report.model_flops / median / peak if peak else None,
        "peak_bytes": max(peaks, default=None),
        "compiled_need_bytes": report.needed_bytes,
        "bound": roofline and dataclasses.asdict(roofline),
        "ratio_to_bound": median / roofline.scheduled_secs if roofline else None,
        "profile": profile,
    }


def compare_open_clip(setting: Setting, model: str) -> dict[str, Any]:
    """Compares our step and open_clip's, eager and compiled, in turn on the same batch."""
    is_cpu = setting.device == "cpu"
    if setting.device == "tpu":
        raise ValueError("open_clip is compared on CPUs and GPUs")
    overrides = {}
    if setting.small:
        tiny = plain_config(setting, train_step.MODELS[model], 8)
        overrides = tiny.model.overrides.to_dict()
    return train_step.compare(
        model,
        device=setting.device,
        batch_size=8 if is_cpu else train_step.GPU_BATCH_SIZES[model],
        rounds=1 if setting.small else 3,
        steps=1 if is_cpu else 10,
        torch_compile=not setting.small,
        overrides={name: value for name, value in overrides.items() if value is not None},
    )


def random_batch(program: TrainProgram) -> dict[str, jax.Array]:
    """Returns a batch like the input's: noise, texts of random length, random concepts."""
    rng = np.random.default_rng(0)
    concepts, size = program.config.concepts, program.config.data.batch_size
    images, tokens = train_step.random_pairs(program.arch, size)
    made = {"images": images, "tokens": tokens}
    for name, field in program.abstract_batch().items():
        if name in made:
            continue
        if np.issubdtype(field.dtype, np.integer):
            most = concepts.num_objects if "object" in name else concepts.num_attributes
            made[name] = rng.integers(0, most, field.shape).astype(field.dtype)
        else:
            values = rng.random(field.shape)
            made[name] = (values / values.sum(-1, keepdims=True)).astype(field.dtype)
    return jax.make_array_from_process_local_data(sharding.batch_sharding(program.mesh), made)


def _gpu_examples(model: str) -> int:
    limits = [device.memory_stats()["bytes_limit"] for device in jax.local_devices()]
    # JAX takes three quarters of the 80 GB.
    most = int(EXAMPLES_AT_ONCE[model][0] * min(1.0, min(limits) / (0.73 * 80 * 2**30)))
    return 1 << (max(1, most).bit_length() - 1)


def _profile(run: Callable[[], Any], setting: Setting, name: str) -> dict[str, Any]:
    """Traces a call, keeps the files in the output folder, and lists the longest operations.

    If the driver denies profiling, the other results of the part remain.
    """
    with tempfile.TemporaryDirectory(prefix="profile_") as folder:
        try:
            with jax.profiler.trace(folder, create_perfetto_trace=True):
                run()
        except Exception as error:
            return {"files": [], "longest": [], "error": f"{type(error).__name__}: {error}"}
        kept = []
        for suffix in ("perfetto_trace.json.gz", "xplane.pb"):
            for path in sorted(pathlib.Path(folder).rglob(f"*{suffix}")):
                target = pathlib.Path(setting.output, f"{name}.{suffix}")
                shutil.copyfile(path, target)
                kept.append(target.name)
        traces = sorted(pathlib.Path(folder).rglob("perfetto_trace.json.gz"))
        return {"files": kept, "longest": _longest(traces[0], setting.device) if traces else []}


def _longest(path: pathlib.Path, device: str) -> list[dict[str, Any]]:
    """Returns the longest operations, summed over the profiled steps and this process's devices."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {
        event["pid"]: event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") == "process_name"
    }
    marked = "/host:" if device == "cpu" else "/device:"
    secs: Counter[str] = Counter()
    for event in events:
        if event.get("ph") == "X" and marked in names.get(event["pid"], ""):
            secs[event["name"]] += event.get("dur", 0) / 1e6
    return [{"name": n[:200], "secs": s} for n, s in secs.most_common(_NAMED_OPERATIONS)]
