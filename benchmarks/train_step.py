"""Times training steps of diht_jax and of open_clip side by side.

    python -m benchmarks.train_step                 # ViT-B/32, float32, batch 32, on the CPU
    python -m benchmarks.train_step --device gpu    # ViT-B/32, B/16 and L/14, bfloat16

Both train the same architecture (parameter counts are compared) on the same random pairs, from the
same weights, with the symmetric contrastive loss, a global-norm clip at 1 and AdamW without decay
on vectors; the losses of the first two steps are compared. open_clip runs as in its own training
script: its CLIP model with SDPA, its ClipLoss, torch's AdamW, its scale clamp, both eager and under
`torch.compile`; the faster of the two counts. Each side has its batch on the device in the form of
its own input pipeline: normalised float images for open_clip, uint8 for diht_jax, which normalises
inside its step and also measures accuracies and norms there. On GPUs, open_clip runs under bfloat16
autocast, and diht_jax computes in bfloat16; parameters and optimiser are float32 on both sides.

Rounds are interleaved in one process, on the same cores and threads, so other load on the machine
affects all sides. Speeds are medians over rounds. MFU is the counted FLOPs of the matrix products
(`model_flops`, the same number for both) over the peak of the device.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import ml_collections
import numpy as np
from absl import flags, logging

from diht_jax import command_line
from diht_jax.command_line import keep_freed_memory

if TYPE_CHECKING:
    from diht_jax.models import Architecture

_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Where to run both.")
_MODELS = flags.DEFINE_list("models", None, "Of b32, b16, l14; b32 on the CPU, all on a GPU.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Pairs a step; 32 on the CPU.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds; medians are over these.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps a round; 1 on the CPU, 20 on a GPU.")
_THREADS = flags.DEFINE_integer("threads", None, "CPU cores to use; all by default.")
_TORCH_COMPILE = flags.DEFINE_bool("torch_compile", True, "Run open_clip under torch.compile too.")

MODELS = {"b32": "diht_vitb32_224px", "b16": "diht_vitb16_224px", "l14": "diht_vitl14_224px"}
# Small enough for the activations of both sides to fit into 80 GB together.
GPU_BATCH_SIZES = {"b32": 512, "b16": 192, "l14": 64}
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIP_NORM = 1e-4, 0.1, (0.9, 0.98), 1e-6, 1.0
MAX_LOGIT_SCALE = 100.0


def main() -> None:
    """Runs all models, prints a table, and writes `benchmarks/results/train_step_DEVICE.json`."""
    device = _DEVICE.value
    models = _MODELS.value or (["b32"] if device == "cpu" else list(MODELS))
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        raise ValueError(f"--models: expected some of {', '.join(MODELS)}, got {unknown}")
    threads = _prepare_process(device, _THREADS.value)
    import jax

    if device == "gpu" and jax.default_backend() != "gpu":
        raise ValueError(
            f"--device gpu: JAX finds no GPU, only {jax.devices()[0].device_kind}; install the "
            "extra 'gpu' (jax[cuda13]) on a machine with an NVIDIA GPU"
        )
    from benchmarks.record import write_result

    rows = [
        compare(
            model,
            device=device,
            batch_size=_BATCH_SIZE.value or (32 if device == "cpu" else GPU_BATCH_SIZES[model]),
            rounds=_ROUNDS.value,
            steps=_STEPS.value or (1 if device == "cpu" else 20),
            torch_compile=_TORCH_COMPILE.value,
        )
        for model in models
    ]
    for row in rows:
        print(format_row(row))
    path = write_result(f"train_step_{device}", {"threads": threads, "models": rows})
    logging.info("written to %s", path)


def compare(
    model: str,
    *,
    device: str,
    batch_size: int,
    rounds: int,
    steps: int,
    torch_compile: bool = True,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Times all sides on one architecture.

    Args:
        model: a key of `MODELS`.
        device: "cpu" (float32) or "gpu" (bfloat16).
        batch_size: pairs per step.
        rounds: number of turns per side.
        steps: steps per turn.
        torch_compile: also run open_clip under torch.compile.
        overrides: model sizes that differ from the architecture's.

    Returns:
        The entry of this architecture in the results file.
    """
    import jax

    from diht_jax.hardware.chips import find_chip
    from diht_jax.models import get_architecture
    from diht_jax.training.monitoring.throughput import model_flops

    load_before = os.getloadavg()[0]
    config = diht_config(MODELS[model], device, batch_size)
    config.model.overrides.update(overrides or {})
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    sides = build_sides(arch, config, device, torch_compile)
    failures = warm_up(sides)
    check_same_training(sides, 1e-3 if device == "cpu" else 5e-2)
    # After the first round, the memory of all sides stays where it is.
    time_rounds(sides, 1, steps)
    secs = time_rounds(sides, rounds, steps)
    num_params = sides["diht_jax"].num_params
    sides.clear()
    gc.collect()

    medians = {name: statistics.median(values) for name, values in secs.items()}
    best = min((name for name in medians if name != "diht_jax"), key=medians.get)
    flops = model_flops(config, jax.devices()[:1])
    chip = find_chip(jax.devices()[0].device_kind)
    peak = chip and chip.peak_flops
    return {
        "model": model,
        "dtype": config.model.dtype,
        "batch_size": batch_size,
        "num_params": num_params,
        "steps_per_round": steps,
        "model_flops_per_step": flops,
        "step_secs": {name: [round(s, 5) for s in values] for name, values in secs.items()},
        "failures": failures,
        "median_images_per_sec": {n: round(batch_size / s, 3) for n, s in medians.items()},
        "model_flops_per_sec": {n: round(flops / s) for n, s in medians.items()},
        "mfu": {n: round(flops / s / peak, 4) for n, s in medians.items()} if peak else None,
        "fastest_open_clip": best,
        "ratio": round(medians[best] / medians["diht_jax"], 4),
        "ratios_of_rounds": [
            round(b / a, 4) for a, b in zip(secs["diht_jax"], secs[best], strict=True)
        ],
        "load_before": round(load_before, 2),
    }


def build_sides(
    arch: Architecture, config: ml_collections.ConfigDict, device: str, torch_compile: bool
) -> dict[str, Side]:
    """Builds all sides, with the same initial weights and the same pairs."""
    from benchmarks.open_clip_step import OpenClipStep
    from diht_jax.weights.clip_layout import to_clip

    images, tokens = random_pairs(arch, config.data.batch_size)
    ours = DihtStep(config, images, tokens)
    weights = to_clip(ours.params, arch)
    sides: dict[str, Side] = {"diht_jax": ours}
    for name, compiled in {"open_clip": False, "open_clip_compiled": True}.items():
        if torch_compile or not compiled:
            sides[name] = OpenClipStep(
                arch,
                weights,
                images,
                tokens,
                device=device,
                compiled=compiled,
                learning_rate=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                betas=BETAS,
                epsilon=EPSILON,
                clip_norm=CLIP_NORM,
                max_logit_scale=MAX_LOGIT_SCALE,
            )
    return sides


def warm_up(sides: dict[str, Side]) -> dict[str, str]:
    """Runs two untimed steps per side; drops a compiled side that fails, and returns the reason."""
    failures = {}
    for name, side in list(sides.items()):
        start = time.perf_counter()
        try:
            side(1)
            side(1)
        except Exception as error:
            if name != "open_clip_compiled":
                raise
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            logging.warning("torch.compile does not work here: %s", failures[name])
            del sides[name]
            continue
        logging.info("%s is ready after %.0f s", name, time.perf_counter() - start)
    return failures


def check_same_training(sides: dict[str, Side], tolerance: float) -> None:
    """Checks for equal parameter counts, and equal losses before and after a step."""
    num_params = {name: side.num_params for name, side in sides.items()}
    losses = {name: side.losses[:2] for name, side in sides.items()}
    logging.info("losses of the first two steps: %s", losses)
    for i in range(2):
        values = [side[i] for side in losses.values()]
        if max(values) - min(values) > tolerance or len(set(num_params.values())) > 1:
            raise AssertionError(f"the sides train differently: {losses}, {num_params} parameters")


def time_rounds(sides: dict[str, Side], rounds: int, steps: int) -> dict[str, list[float]]:
    """Returns seconds per step of every side and round; rotates the order between rounds."""
    secs: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            sides[name](steps)
            secs[name].append((time.perf_counter() - start) / steps)
        logging.info("round %d: %s", i + 1, {n: round(s[-1], 3) for n, s in secs.items()})
    return secs


def diht_config(name: str, device: str, batch_size: int) -> ml_collections.ConfigDict:
    """Returns the training config of our side."""
    from diht_jax.config import default_config

    config = default_config()
    config.total_steps = 10_000
    config.model.name = name
    config.model.dtype = "float32" if device == "cpu" else "bfloat16"
    config.data.batch_size = batch_size
    config.optimizer.update(
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        b1=BETAS[0],
        b2=BETAS[1],
        eps=EPSILON,
        weight_decay=WEIGHT_DECAY,
        clip_global_norm=CLIP_NORM,
        max_logit_scale=MAX_LOGIT_SCALE,
    )
    return config


class Side(Protocol):
    """A timed side: calling it runs a number of training steps to completion."""

    num_params: int
    losses: list[float]

    def __call__(self, steps: int) -> None: ...


class DihtStep:
    """Our side: the jitted step of the recipe."""

    def __init__(self, config: ml_collections.ConfigDict, images: np.ndarray, tokens: np.ndarray):
        import jax

        from diht_jax import sharding
        from diht_jax.training.program import TrainProgram

        program = TrainProgram(config, config.total_steps, jax.devices()[:1])
        self._state = program.create_state()
        self._step = program.step(self._state)
        self._batch = jax.make_array_from_process_local_data(
            sharding.batch_sharding(program.mesh), {"images": images, "tokens": tokens}
        )
        self.num_params = sum(p.size for p in jax.tree.leaves(self.params))
        self.losses: list[float] = []

    @property
    def params(self) -> dict[str, Any]:
        """The current parameters."""
        return self._state.params

    def __call__(self, steps: int) -> None:
        """Runs `steps` steps and waits for the last one."""
        import jax

        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        self.losses.append(float(metrics["loss"]))


def random_pairs(arch: Architecture, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 images [b, size, size, 3] and int32 tokens [b, t] of random text lengths."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, arch.image_size, arch.image_size, 3), np.uint8)
    tokens = rng.integers(1, arch.vocab_size - 2, (batch_size, arch.context_length), np.int32)
    ends = rng.integers(8, 32, batch_size)[:, None]
    index = np.arange(arch.context_length)[None, :]
    tokens = np.where(index == ends, arch.vocab_size - 1, np.where(index < ends, tokens, 0))
    tokens[:, 0] = arch.vocab_size - 2
    return images, tokens.astype(np.int32)


def format_row(row: dict[str, Any]) -> str:
    """Formats the results of one architecture as a paragraph."""
    lines = [f"{row['model']}, {row['dtype']}, batch {row['batch_size']}"]
    for name, speed in row["median_images_per_sec"].items():
        rate = row["model_flops_per_sec"][name]
        mfu = "" if row["mfu"] is None else f", MFU {100 * row['mfu'][name]:.1f}%"
        lines.append(f"  {name:20s} {speed:9.2f} images/s  {rate / 1e12:8.3f} TFLOP/s{mfu}")
    lines.append(f"  ratio to {row['fastest_open_clip']}: {row['ratio']:.3f}")
    return "\n".join(lines)


def _prepare_process(device: str, threads: int | None) -> int:
    """Sets the options that JAX and torch read at import; returns the number of cores."""
    assert not {"jax", "torch"} & sys.modules.keys(), "imported too early for these settings"
    cores = sorted(os.sched_getaffinity(0))
    if threads is not None:
        if not 1 <= threads <= len(cores):
            raise ValueError(f"--threads={threads}: expected 1 to {len(cores)}")
        os.sched_setaffinity(0, cores[:threads])
        cores = cores[:threads]
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        keep_freed_memory()  # as `diht_jax.train` does; the other sides benefit as well
    # Both share one GPU: JAX must not preallocate all of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return len(cores)


if __name__ == "__main__":
    command_line.run(main)
