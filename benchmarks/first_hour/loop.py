"""Runs 20 steps of `diht_jax.train` on synthetic photos, without and with an interruption."""

from __future__ import annotations

import io
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.first_hour.plan import Setting
from diht_jax.hardware import compiler
from diht_jax.records.formats import TFRecordWriter
from diht_jax.records.schema import Record, encode_record
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.multihost import EXIT_CODE

_STEPS, _STOP_AT = 20, 9
_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_KEPT_CHARS = 2000


def stop_and_resume(setting: Setting, recipe: str) -> dict[str, Any]:
    """Compares the losses of a stopped and resumed run with those of an uninterrupted run."""
    # A new folder, because a run left by an earlier attempt would be resumed.
    folder = pathlib.Path(setting.output, "loop", str(time.time_ns()))
    batch_size = 16 if setting.small else 32 if setting.device == "cpu" else 256
    write_photos(folder / "records", 8 * batch_size, 64 if setting.small else 384)

    def run(name: str, stop_at: int | None = None) -> dict[str, Any]:
        return _train(setting, recipe, batch_size, folder, name, stop_at)

    whole, stopped, resumed = run("whole"), run("stopped", _STOP_AT), run("stopped")
    expected, found = (read_metrics(folder / name) for name in ("whole", "stopped"))
    losses = [[row["loss"] for row in rows] for rows in (expected, found)]
    steps = [int(row["step"]) for row in found]
    shutil.rmtree(folder)  # gigabytes of checkpoints, in a folder that users copy
    return {
        "batch_size": batch_size,
        "stopped_at": _STOP_AT,
        "exit_codes": [whole["exit_code"], stopped["exit_code"], resumed["exit_code"]],
        "exit_codes_expected": [0, EXIT_CODE, 0],
        "secs": [whole["secs"], stopped["secs"], resumed["secs"]],
        "steps": steps,
        "losses": losses[0],
        "losses_when_resumed": losses[1],
        "largest_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "same_losses": losses[0] == losses[1] and steps == list(range(1, _STEPS + 1)),
        "images_per_sec": [row.get("images_per_sec") for row in expected],
    }


def write_photos(folder: pathlib.Path, count: int, side: int) -> None:
    """Writes records of JPEGs, smooth with noise like photos, each with its own caption."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with TFRecordWriter(folder / "train-00000.tfrecord") as writer:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
            smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
            rough = rng.integers(-12, 13, (side, side, 1), np.int16)
            photo = Image.fromarray(np.clip(smooth + rough, 0, 255).astype(np.uint8))
            data = io.BytesIO()
            photo.save(data, "JPEG", quality=90)
            writer.write(
                encode_record(
                    Record(f"{number:07d}", data.getvalue(), f"a photo of scene {number}")
                )
            )


def _train(
    setting: Setting,
    recipe: str,
    batch_size: int,
    folder: pathlib.Path,
    name: str,
    stop_at: int | None,
) -> dict[str, Any]:
    """Runs the training command, which sends itself a SIGTERM at step `stop_at`."""
    stop = [str(stop_at or 0)]
    argument = "debug=True" if setting.small else ""
    if setting.device == "gpu":
        argument = ",".join(filter(None, (argument, "topology=h100:8")))
    command = [
        *(sys.executable, "-m", "benchmarks.first_hour.stopped_train", *stop),
        *("--config", f"{recipe}:{argument}" if argument else recipe),
        *("--workdir", str(folder / name), f"--config.data.train={folder / 'records'}"),
        f"--config.data.batch_size={batch_size}",
        f"--config.total_steps={_STEPS}",
        *("--config.micro_batch=None", "--config.mesh.data=-1", "--config.mesh.fsdp=1"),
        *("--config.concepts.object_weight=0", "--config.concepts.attribute_weight=0"),
        *("--config.optimizer.warmup_steps=5", "--config.log_every_steps=1"),
        *("--config.evaluation.tasks=", "--config.evaluation.every_steps=None"),
        *("--config.checkpoint.best_metric=None", "--config.checkpoint.every_steps=100"),
        "--config.deterministic=True",
    ]
    if setting.small:
        sizes = ("vision_layers=1", "text_layers=1", "context_length=16", "vocab_size=700")
        command += [f"--config.model.overrides.{size}" for size in sizes]
        command.append(f"--config.compilation_cache={setting.output}/programs")
    environment = dict(os.environ)
    if setting.small and setting.device == "cpu":
        # One device, since eight on two cores wait for each other. The last of equal flags counts.
        flag = "--xla_force_host_platform_device_count=1"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if setting.device == "gpu":
        # All runs share the autotuned kernels, since other kernels round differently.
        flag = compiler.deterministic_flags("gpu", str(folder.parent / "autotuned"))[-1]
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=_REPOSITORY, env=environment, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != (EXIT_CODE if stop_at else 0):
        raise RuntimeError(
            f"diht_jax.train ended with {done.returncode}: {done.stderr[-_KEPT_CHARS:]}"
        )
    return {"exit_code": done.returncode, "secs": round(time.monotonic() - start, 1)}
