"""XLA settings of the training command: compiler flags for its machine, and a compilation cache.

Both must be set before JAX initialises its devices. The user's environment takes precedence.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from diht_jax.hardware.chips import find_chip

# NVIDIA GPUs. Collectives overlap with computation (latency-hiding scheduler, high-priority stream,
# pipelining across the iterations of a loop), and small ones are combined.
# From JAX's GPU performance tips and MaxText's settings for H100s, without
# xla_gpu_enable_pipelined_all_gather: with sharded parameters and micro-batches it moves a whole
# forward pass into the next iteration (docs/benchmarks/gpus.md).
# Every process autotunes all kernels. With sharded autotuning, XLA's default, processes that
# compile a program would wait a day for a process that finds it in its cache.
GPU_FLAGS = (
    "--xla_gpu_shard_autotuning=false",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_highest_priority_async_stream=true",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=67108864",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
)
# TPUs. The latency-hiding scheduler is on by default. These flags fuse collectives with computation
# and overlap the reduction of gradients with the backward pass. From MaxText's for v5e and v5p.
TPU_FLAGS = (
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
# Excludes kernels with a nondeterministic order of summation.
DETERMINISTIC_FLAGS = ("--xla_gpu_exclude_nondeterministic_ops=true",)
# Platform name -> (environment variable that its compiler reads, flags).
FLAGS = {"gpu": ("XLA_FLAGS", GPU_FLAGS), "tpu": ("LIBTPU_INIT_ARGS", TPU_FLAGS)}

# Options of the training step by the name of the chip. An instruction on a v5e gets 32 of its
# 128 MiB of on-chip memory (16 by default), for larger tiles of products. The two products of an
# MLP stay apart, which the compiler's own count of cycles prefers (docs/benchmarks/pods.md).
STEP_OPTIONS: dict[str, dict[str, bool | int]] = {
    "v5e": {"xla_tpu_scoped_vmem_limit_kib": 32768, "xla_tpu_dot_dot_fusion": False},
}
_CPU_INFO = pathlib.Path("/proc/cpuinfo")


def set_flags(platform_name: str | None, extra: Sequence[str] = ()) -> str:
    """Adds the flags of a platform to the environment, except those that are already set.

    Args:
        platform_name: "gpu" or "tpu"; any other platform has no flags.

    Returns:
        One line for the log; empty if there is nothing to set.
    """
    if platform_name not in FLAGS:
        return ""
    variable, wanted = FLAGS[platform_name]
    given = os.environ.get(variable, "")
    names = {_flag_name(flag) for flag in given.split()}
    added = [flag for flag in (*wanted, *extra) if _flag_name(flag) not in names]
    os.environ[variable] = " ".join([*added, given]).strip()
    return f"{variable}={os.environ[variable]}"


def deterministic_flags(platform_name: str | None, folder: str) -> tuple[str, ...]:
    """Returns the flags for bit-identical results across starts on GPUs; empty for other platforms.

    Args:
        folder: local folder for autotuning results, so that later starts choose the same kernels;
            created if missing. With a URL they are not stored; cache compiled programs instead.
    """
    if platform_name != "gpu":
        return ()
    if "://" in folder:
        return DETERMINISTIC_FLAGS
    os.makedirs(folder, exist_ok=True)
    path = os.path.abspath(folder)
    quote = "'" if " " in path else ""  # XLA reads quotes as a shell does
    return (*DETERMINISTIC_FLAGS, f"--xla_gpu_per_fusion_autotune_cache_dir={quote}{path}{quote}")


def compiler_options(platform_name: str) -> dict[str, bool | int]:
    """Returns the flags of a platform as compiler options, except those set in the environment.

    A compiler does not read the environment again after it is loaded, and a program may be compiled
    for another platform than this process's own. GPU flags without an option in this version of XLA
    are omitted: in jax 0.11.2 those that pipeline reductions, which it still accepts as flags.

    Args:
        platform_name: of the devices to compile for: "gpu", "cuda" or "tpu"; any other platform
            has no flags.

    Returns:
        `compiler_options` of `jax.stages.Lowered.compile`.
    """
    platform_name = {"cuda": "gpu"}.get(platform_name, platform_name)
    variable, wanted = FLAGS.get(platform_name, ("", ()))
    given = {_flag_name(flag) for flag in os.environ.get(variable, "").split()}
    taken = [flag for flag in wanted if _flag_name(flag) not in given]
    if platform_name == "gpu":  # these are XLA's own options, which every platform can check
        taken = [flag for flag in taken if refusal(flag) is None]
    pairs = (flag.lstrip("-").split("=") for flag in taken)
    return {name: json.loads(value) for name, value in pairs}


def step_options(device_kind: str) -> dict[str, bool | int]:
    """Returns the compiler options of the training step that are for one kind of chip.

    Args:
        device_kind: see `chips.find_chip`.

    Returns:
        `compiler_options` of `jax.jit`, without those that `LIBTPU_INIT_ARGS` sets. In a process
        with TPUs, those that its libtpu lacks are also omitted.
    """
    chip = find_chip(device_kind)
    options = STEP_OPTIONS.get(chip.name, {}) if chip else {}
    given = {_flag_name(flag) for flag in os.environ.get("LIBTPU_INIT_ARGS", "").split()}
    taken = {name: value for name, value in options.items() if name not in given}
    if jax.default_backend() == "tpu":  # its compiler is the one that gets them
        taken = {n: v for n, v in taken.items() if refusal(f"{n}={json.dumps(v)}") is None}
    return taken


@functools.cache
def refusal(flag: str) -> str | None:
    """Returns the error of this process's compiler for a flag as an option, or None."""
    name, _, value = flag.lstrip("-").partition("=")
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), "float32"))
    try:
        lowered.compile(compiler_options={name: json.loads(value)})
    except Exception as error:  # their class depends on the version
        return str(error).splitlines()[0]
    return None


def accelerator() -> str | None:
    """Returns the accelerator that JAX will use: "gpu", "tpu" or None.

    Reads only the environment and device files, because initialising JAX would fix its flags.
    """
    chosen = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if chosen:
        return {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}.get(chosen)
    if has_tpu():
        return "tpu"
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    has_plugin = any(map(importlib.util.find_spec, plugins))
    are_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "gpu" if _has_device("nvidia[0-9]*") and has_plugin and not are_hidden else None


def has_tpu() -> bool:
    """Returns whether this host has TPUs and the package libtpu."""
    found = _has_device("accel[0-9]*") or _has_device("vfio/[0-9]*")
    return found and importlib.util.find_spec("libtpu") is not None


def keep_programs(folder: str | None, max_gib: float = math.inf) -> None:
    """Enables JAX's persistent compilation cache, unless the environment sets its folder.

    It stores programs that take over a second to compile
    (`JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`). Programs for a CPU may use instructions that
    another CPU lacks, even if JAX does not distinguish them; so each kind of CPU has a subfolder.

    Args:
        folder: path (`~` is expanded) or URL; empty or None disables the cache.
        max_gib: size limit of a subfolder, with least-recently-used eviction. It does not apply to
            URLs, whose files cannot be locked, or if `JAX_COMPILATION_CACHE_MAX_SIZE` is set.
    """
    settings: Any = jax.config  # has an attribute for each of its flags
    if not folder or settings.jax_compilation_cache_dir:
        return
    path = f"{folder.rstrip('/')}/{_cpu_digest()}"
    bounded = "://" not in folder and math.isfinite(max_gib)
    if "://" not in folder:
        path = os.path.abspath(os.path.expanduser(path))
        try:
            os.makedirs(path, exist_ok=True)
            if bounded:
                _add_times_of_use(pathlib.Path(path))
        except OSError as error:
            logging.warning(
                "config.compilation_cache=%s: %s; programs are compiled anew", folder, error
            )
            return
    jax.config.update("jax_compilation_cache_dir", path)
    if bounded and settings.jax_compilation_cache_max_size == -1:
        jax.config.update("jax_compilation_cache_max_size", int(max_gib * 2**30))
    most = settings.jax_compilation_cache_max_size
    size = f"at most {most / 2**30:g} GiB" if most >= 0 else "of any size"
    logging.info("compiled programs are kept in %s (%s)", path, size)


def _add_times_of_use(folder: pathlib.Path) -> None:
    """Adds missing access-time files to a cache that may have been written without a size limit.

    JAX writes this file next to each program if the cache has a limit. If one is missing, also
    after a process was killed between the two writes, JAX cannot evict and stores nothing anymore.
    """
    for program in folder.glob("*-cache"):
        time_of_use = folder / f"{program.name.removesuffix('-cache')}-atime"
        # Another process may be deleting programs.
        with contextlib.suppress(FileNotFoundError):
            if not time_of_use.exists():
                time_of_use.write_bytes(program.stat().st_mtime_ns.to_bytes(8, "little"))


def _has_device(pattern: str) -> bool:
    return any(pathlib.Path("/dev").glob(pattern))


def _flag_name(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-")


def _cpu_digest() -> str:
    """Returns a hash of 16 hexadecimal digits that identifies the kind of CPU."""
    facts = f"{platform.machine()} {platform.processor()}"
    try:
        info = _CPU_INFO.read_text()
    except OSError:
        info = ""
    for key in ("vendor_id", "cpu family", "model", "model name", "flags", "Features"):
        # The first core's entry.
        found = re.search(rf"^{key}\s*:(.*)$", info, re.MULTILINE)
        facts += f"\n{key}: {found[1].strip() if found else ''}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
