"""Settings of XLA that the training command makes: flags for its machine, and a compile cache.

Both are set before JAX has asked for devices. What a user has set in the environment stays.
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

# NVIDIA GPUs. Collectives run next to the computation (the scheduler hides their latency, on a
# stream that goes first, also those between the trips of a loop), and small ones as one.
# From JAX's GPU performance tips and MaxText's settings for H100s, without
# xla_gpu_enable_pipelined_all_gather: with split parameters and micro-batches it pulls a whole
# forward pass into the next trip (docs/benchmarks/gpus.md).
# Each process times the kernels it chooses from by itself: divided among the processes, as XLA does
# by default, those that compile a program wait a day for one that has it in its cache already.
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
# TPUs. The latency-hiding scheduler is on by default; these fuse collectives with computation and
# let gradients be summed while the backward pass goes on. From MaxText's settings for v5e and v5p.
TPU_FLAGS = (
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
# Kernels whose sums have one order; the others are not taken.
DETERMINISTIC_FLAGS = ("--xla_gpu_exclude_nondeterministic_ops=true",)
# Where the compilers read them: the platform's name -> (environment variable, flags).
FLAGS = {"gpu": ("XLA_FLAGS", GPU_FLAGS), "tpu": ("LIBTPU_INIT_ARGS", TPU_FLAGS)}

_CPU_INFO = pathlib.Path("/proc/cpuinfo")


def set_flags(platform_name: str | None, extra: Sequence[str] = ()) -> str:
    """Adds the flags for a platform to the environment, but for those that it has already.

    Args:
        platform_name: "gpu", "tpu", or anything else for none.

    Returns:
        One line for the log; empty where there is nothing to set.
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
    """What a GPU needs for the same bits at every start; empty for other platforms.

    Args:
        folder: keeps which kernels were the fastest, so that the next start takes the same ones; is
            made. A URL keeps nothing: there the compiled programs have to be kept.
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
    """The same flags for one compilation, but for those that the environment has already.

    A compiler that is loaded reads no environment any more, and a program may be compiled for
    another platform than this process's own. Flags of GPUs that this version of XLA has no option
    for are left out: of jax 0.11.2, those that pipeline sums, which it still takes as flags.

    Args:
        platform_name: of the devices to compile for: "gpu", "cuda", "tpu", or anything else for
            none.

    Returns:
        `compiler_options` of `jax.stages.Lowered.compile`.
    """
    platform_name = {"cuda": "gpu"}.get(platform_name, platform_name)
    variable, wanted = FLAGS.get(platform_name, ("", ()))
    given = {_flag_name(flag) for flag in os.environ.get(variable, "").split()}
    taken = [flag for flag in wanted if _flag_name(flag) not in given]
    if platform_name == "gpu":  # all of XLA's platforms know the names of its own options
        taken = [flag for flag in taken if refusal(flag) is None]
    pairs = (flag.lstrip("-").split("=") for flag in taken)
    return {name: json.loads(value) for name, value in pairs}


@functools.cache
def refusal(flag: str) -> str | None:
    """Error of this process's compiler for a flag as an option, or None."""
    name, _, value = flag.lstrip("-").partition("=")
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), "float32"))
    try:
        lowered.compile(compiler_options={name: json.loads(value)})
    except Exception as error:  # their class depends on the version
        return str(error).splitlines()[0]
    return None


def accelerator() -> str | None:
    """The accelerator that JAX is going to take: "gpu", "tpu" or None.

    Looks at the environment and at device files only: JAX reads its flags when it looks itself.
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
    """True if this host has TPUs and the package that drives them."""
    found = _has_device("accel[0-9]*") or _has_device("vfio/[0-9]*")
    return found and importlib.util.find_spec("libtpu") is not None


def keep_programs(folder: str | None, max_gib: float = math.inf) -> None:
    """Keeps compiled programs for the next start, unless the environment names a folder for that.

    Those that take over a second to compile (`JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`).
    Programs for a CPU may use instructions that another CPU lacks, also where JAX takes both for
    the same; hence a subfolder for each kind of CPU.

    Args:
        folder: a path, `~` allowed, or the URL of a store; empty or None keeps nothing.
        max_gib: of a subfolder; what was used least recently makes room. Nothing is deleted in a
            store, whose files cannot be locked, nor where `JAX_COMPILATION_CACHE_MAX_SIZE` is set.
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
    """Gives a time of last use to the programs that lack one: those kept without a bound.

    JAX writes that time next to each program of a cache with a bound. Where one is missing, as also
    after a process was killed between the two, it can make no room and keeps nothing any more.
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
    """Sixteen digits that differ between kinds of CPU."""
    facts = f"{platform.machine()} {platform.processor()}"
    try:
        info = _CPU_INFO.read_text()
    except OSError:
        info = ""
    for key in ("vendor_id", "cpu family", "model", "model name", "flags", "Features"):
        # Of the first core.
        found = re.search(rf"^{key}\s*:(.*)$", info, re.MULTILINE)
        facts += f"\n{key}: {found[1].strip() if found else ''}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
