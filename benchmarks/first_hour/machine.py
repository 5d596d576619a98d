"""Describes the machine: devices, driver, accepted compiler flags, and basic rates."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.first_hour.plan import Setting
from benchmarks.first_hour.timing import repetitions, secs_of_call
from diht_jax.hardware.chips import find_chip
from diht_jax.hardware.compiler import DETERMINISTIC_FLAGS, FLAGS, refusal, step_options

_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE")


def describe(setting: Setting) -> dict[str, Any]:
    """Returns devices, driver, environment, and the training flags that the compiler accepts."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    # On a CPU, checks the names of the GPU's flags, since XLA is one library.
    flags = FLAGS.get(setting.device, FLAGS["gpu"])[1]
    if setting.device != "tpu":
        flags = (*flags, *DETERMINISTIC_FLAGS)
    of_step = step_options(device.device_kind)
    flags = (*flags, *(f"--{name}={json.dumps(value)}" for name, value in of_step.items()))
    refused = {flag: problem for flag in flags if (problem := refusal(flag))}
    return {
        "devices": jax.device_count(),
        "device_kind": device.device_kind,
        "platform_version": device.client.platform_version,
        "chip": (chip := find_chip(device.device_kind)) and chip.name,
        "memory_limit_bytes": stats.get("bytes_limit"),
        "driver": _driver(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "flags_accepted": [flag for flag in flags if flag not in refused],
        "flags_refused": refused,
    }


def measure_rates(setting: Setting) -> dict[str, Any]:
    """Measures products, copies in device memory, and transfers between host and device."""
    times = repetitions(setting.small)
    chip = find_chip(jax.devices()[0].device_kind)
    size = 256 if setting.small else 2048 if setting.device == "cpu" else 8192
    # A square product, and one from the MLP of ViT-B/16.
    width = 64 if setting.small else 768
    shapes = [(size, size, size), (12 * size, width, 4 * width)]
    products = []
    for dtype in ("bfloat16", "float32"):
        for m, k, n in shapes:
            rate = 2 * m * k * n / _product_secs(m, k, n, dtype, times)
            share = rate / chip.peak_flops if chip and dtype == "bfloat16" else None
            products.append(
                {"m": m, "k": k, "n": n, "dtype": dtype, "flops_per_sec": rate, "of_peak": share}
            )
    num_bytes = 2**20 if setting.small else 2**28 if setting.device == "cpu" else 2**30
    x = jnp.zeros(num_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    copied = 2 * num_bytes / secs_of_call(lambda: add(x), **times)
    # A quarter of the bytes, since transfers are slow. Not zeros, which would share a single page.
    host = np.ones(num_bytes // 16, np.float32)
    x = jax.device_put(host)
    to_device = secs_of_call(lambda: jax.device_put(host).block_until_ready(), **times)
    # A new array each time, since JAX caches fetched values.
    to_host = secs_of_call(lambda: np.asarray(add(x)), **times)
    return {
        "products": products,
        "copy_bytes_per_sec": copied,
        "copy_of_peak": copied / chip.hbm_bytes_per_sec if chip else None,
        "to_device_bytes_per_sec": host.nbytes / to_device,
        "to_host_bytes_per_sec": host.nbytes / to_host,
    }


def _product_secs(m: int, k: int, n: int, dtype: str, times: dict[str, int]) -> float:
    keys = jax.random.split(jax.random.key(0))
    a = jax.random.normal(keys[0], (m, k), dtype)
    b = jax.random.normal(keys[1], (k, n), dtype)
    multiply = jax.jit(jnp.matmul)
    return secs_of_call(lambda: multiply(a, b), **times)


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
