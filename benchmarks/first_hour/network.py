"""Measures several devices and a bucket: collectives, forms of the loss, and a checkpoint."""

from __future__ import annotations

import time
import uuid
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.contrastive_loss import AXES, mapped_loss_and_grads
from benchmarks.first_hour.plan import Setting
from benchmarks.first_hour.steps import devices_for, recipe_config
from benchmarks.first_hour.timing import repetitions, secs_of_call
from diht_jax.training.program import TrainProgram
from diht_jax.training.workdir.checkpoint import Checkpointer

_KIB, _MIB = 1 << 10, 1 << 20
_WIDTH = 512


def measure_collectives(setting: Setting) -> dict[str, Any]:
    """Measures the seconds of each collective over all devices, 1 KB to 64 MB per device."""
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    ring = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]
    operations = {
        "all_reduce": lambda x: jax.lax.psum(x, "all"),
        "all_gather": lambda x: jax.lax.all_gather(x, "all", tiled=True),
        "reduce_scatter": lambda x: jax.lax.psum_scatter(x, "all", tiled=True),
        "permute": lambda x: jax.lax.ppermute(x, "all", ring),
    }
    sizes = [_KIB << power for power in range(0, 17, 2)]
    if setting.small:
        sizes = [_KIB, _MIB]
    rows = []
    for num_bytes in sizes:
        x = jax.device_put(
            np.ones(num_bytes // 4 * mesh.size, np.float32),
            NamedSharding(mesh, PartitionSpec("all")),
        )
        for name, operation in operations.items():
            run = jax.jit(
                jax.shard_map(
                    operation,
                    mesh=mesh,
                    in_specs=PartitionSpec("all"),
                    out_specs=PartitionSpec() if name == "all_reduce" else PartitionSpec("all"),
                    check_vma=name != "all_gather",
                )
            )
            secs = secs_of_call(lambda run=run, x=x: run(x), **repetitions(setting.small))
            rows.append({"collective": name, "bytes": num_bytes, "secs": secs})
    return {"devices": mesh.size, "rows": rows}


def compare_losses(setting: Setting) -> dict[str, Any]:
    """Measures the contrastive loss and its gradients, streaming and gathered, on all devices."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(-1, 1), AXES)
    rows = []
    for of_each in (8,) if setting.small else (64, 256, 1024):
        size = of_each * mesh.size
        keys = jax.random.split(jax.random.key(0))
        split = NamedSharding(mesh, PartitionSpec(AXES))
        embeddings = []
        for key in keys:
            drawn = jax.random.normal(key, (size, _WIDTH), jnp.float32)
            unit = drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
            embeddings.append(jax.device_put(unit, split))
        row: dict[str, Any] = {"global_batch": size, "width": _WIDTH}
        for impl in ("streaming", "gathered"):
            run = jax.jit(mapped_loss_and_grads(mesh, impl))
            row[f"{impl}_loss"] = float(run(*embeddings, jnp.float32(10.0))[0])
            row[f"{impl}_secs"] = secs_of_call(
                lambda run=run, embeddings=embeddings: run(*embeddings, jnp.float32(10.0)),
                **repetitions(setting.small),
            )
        rows.append(row)
    return {"devices": mesh.size, "rows": rows}


def save_and_restore(setting: Setting) -> dict[str, Any]:
    """Saves the state of ViT-B/16 to the bucket, restores it, and deletes it there."""
    if setting.bucket is None:
        return {"skipped": "no --bucket is named"}
    program = TrainProgram(recipe_config(setting, "diht_vitb16"), 100_000, devices_for(setting))
    state = program.create_state()
    before = jax.tree.map(np.asarray, state)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(before))
    folder = epath.Path(setting.bucket) / f"first_hour_{uuid.uuid4().hex[:8]}"
    try:
        start = time.perf_counter()
        writer = Checkpointer(folder, keep_last=1)
        writer.save(state, {"next_example": 7})
        writer.close()
        saved = time.perf_counter()
        reader = Checkpointer(folder, keep_last=1)
        restored, position, _ = reader.restore(program.abstract_state())
        jax.block_until_ready(restored)
        ended = time.perf_counter()
        reader.close()
    finally:
        folder.rmtree(missing_ok=True)
    same = jax.tree.map(lambda a, b: np.array_equal(a, np.asarray(b)), before, restored)
    return {
        "where": setting.bucket,
        "bytes": num_bytes,
        "save_secs": saved - start,
        "restore_secs": ended - saved,
        "save_bytes_per_sec": num_bytes / (saved - start),
        "restore_bytes_per_sec": num_bytes / (ended - saved),
        "same_bits": all(jax.tree.leaves(same)) and position == {"next_example": 7},
    }
