"""Topologies of other machines, for ahead-of-time compilation.

Names of TPU slices are those of Google Cloud, `v5e:16x16`. GPUs follow the same pattern: `h100:8`
(one host) or `h100:4x8` (hosts x GPUs of a host). The devices can form a mesh to lower and compile
for, but cannot hold arrays.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from diht_jax.config.checks import nearest_name
from diht_jax.hardware.chips import Chip, find_chip
from diht_jax.hardware.compiler import compiler_options, has_tpu
from diht_jax.hardware.schedule import request_dump

LOCAL = "local"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str  # as requested
    chip: Chip | None  # peak rates of a device; None if it is not in the table
    shape: tuple[int, ...]  # of the torus, or (hosts, GPUs of a host)
    devices: tuple[jax.Device, ...]  # in the compiler's order
    memory_limit_bytes: int | None  # available to a program on one device; None if unknown
    # For `jax.stages.Lowered.compile`: the flags of training, and those for compiling without the
    # devices.
    compiler_options: dict[str, bool | int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _TpuFamily:
    """A family of TPU slices: its chip config for the compiler, and Google Cloud's slices."""

    config: str  # with "megacore", the two cores of a chip are one device
    largest: tuple[int, ...]
    small: tuple[str, ...]  # 3D tori also have all multiples of 4 along every axis


_SMALL_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")

_TPUS = {
    "v4": _TpuFamily("megacore", (16, 16, 16), _SMALL_3D),
    "v5e": _TpuFamily("default", (16, 16), _SMALL_2D),
    "v5p": _TpuFamily("megacore", (16, 16, 24), _SMALL_3D),
    "v6e": _TpuFamily("default", (16, 16), _SMALL_2D),
    "tpu7x": _TpuFamily("default", (16, 16, 36), _SMALL_3D),
}

# Compute capability, streaming multiprocessors, shared memory of a block (KiB), level-2 cache
# (MiB), clock (GHz), from NVIDIA's data sheets, for XLA's code generation.
_GPUS = {
    "a100": ((8, 0), 108, 163, 40, 1.41),
    "a100_80gb": ((8, 0), 108, 163, 40, 1.41),
    "h100": ((9, 0), 132, 227, 50, 1.98),
    "h200": ((9, 0), 132, 227, 50, 1.98),
}


def known_topologies() -> str:
    """Returns a one-line list of the known topologies, for error messages and --help."""
    tpus = ", ".join(
        f"{name}:{'x'.join(map(str, family.largest))}" for name, family in _TPUS.items()
    )
    gpus = ", ".join(f"{name}:8" for name in _GPUS)
    return f"TPU slices up to {tpus}; GPUs such as {gpus}, or HOSTSx8; or '{LOCAL}'"


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Parses the name of another machine's topology; its compiler need not be installed.

    Args:
        name: such as "v5e:16x16" or "h100:8".

    Returns:
        Family, and shape of the torus or hosts and GPUs: "v5e", (16, 16) or "h100", (8,).

    Raises:
        ValueError: there is no such topology (lists the known ones).
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    family = match.group(1) if match else name.partition(":")[0]
    if not match or family not in (*_TPUS, *_GPUS):
        nearest = nearest_name(family, [*_TPUS, *_GPUS])
        hint = f" did you mean '{nearest}:...'?" if nearest and nearest != family else ""
        raise ValueError(f"unknown topology '{name}';{hint} known: {known_topologies()}")
    shape = tuple(int(size) for size in match.group(2).split("x"))
    if family in _TPUS:
        _check_slice(name, family, shape)
    elif len(shape) > 2 or 0 in shape:
        raise ValueError(
            f"unknown topology '{name}'; expected the GPUs of one host, {family}:8, or "
            f"hosts x GPUs, {family}:4x8"
        )
    return family, shape


def get_topology(name: str) -> Topology:
    """Returns the topology called `name`.

    Args:
        name: such as "v5e:16x16", "h100:8", or "local" for the devices of this process.

    Raises:
        ValueError: there is no such topology (lists the known ones), or its compiler is missing
            (says what to install).
    """
    if name == LOCAL:
        if has_tpu():
            request_dump()
        devices = tuple(jax.devices())
        chip = find_chip(devices[0].device_kind)
        options = compiler_options(devices[0].platform)
        return Topology(name, chip, (len(devices),), devices, _memory_limit(devices, chip), options)
    family, shape = parse_topology(name)
    chip = find_chip(family)
    if family in _TPUS:
        devices, options = _tpu_devices(name, family, shape), compiler_options("tpu")
    else:
        devices = _gpu_devices(name, family, shape)
        # Unlike cuBLAS, Triton's matrix products are autotuned by running them on a GPU.
        options = {"xla_gpu_enable_triton_gemm": False, **compiler_options("gpu")}
    return Topology(name, chip, shape, devices, _memory_limit(devices, chip), options)


def _memory_limit(devices: tuple[jax.Device, ...], chip: Chip | None) -> int | None:
    platform = devices[0].platform
    if platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    if chip is None:
        return None
    if platform == "tpu":
        return chip.hbm_bytes
    # The fraction of a GPU's memory that JAX preallocates.
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    return int(share * chip.hbm_bytes)


def _check_slice(name: str, family: str, shape: tuple[int, ...]) -> None:
    known = _TPUS[family]
    cubes = len(known.largest) == 3 and not any(size % 4 for size in shape)
    fits = len(shape) == len(known.largest) and all(
        0 < size <= most for size, most in zip(sorted(shape), sorted(known.largest), strict=True)
    )
    if name.partition(":")[2] not in known.small and not (cubes and fits):
        largest = "x".join(map(str, known.largest))
        more = f", and multiples of 4 up to {largest}" if len(known.largest) == 3 else ""
        raise ValueError(
            f"unknown topology '{name}'; {family} slices are {', '.join(known.small)}{more}"
        )


def _tpu_devices(name: str, family: str, shape: tuple[int, ...]) -> tuple[jax.Device, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"'{name}' needs the TPU compiler, which comes with the package libtpu and "
            "runs on any x86 Linux machine: pip install 'jax[tpu]'"
        )
    _keep_libtpu_offline()
    request_dump()
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=name,
        chip_config_name=_TPUS[family].config,
        chips_per_host_bounds=(1, 1, 1) if math.prod(shape) == 1 else (2, 2, 1),
        num_slices=1,
    )
    return tuple(description.devices)


def _keep_libtpu_offline() -> None:
    """Sets the environment that libtpu reads when it is loaded, for use without TPUs.

    Otherwise libtpu queries the cloud's metadata server for the host name, logs errors, and locks
    the machine's TPUs against a second process.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def _gpu_devices(name: str, family: str, shape: tuple[int, ...]) -> tuple[jax.Device, ...]:
    hosts, per_host = (1, *shape)[-2:]
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=_target_config(family), topology=f"1x{hosts}x{per_host}"
        )
    except NotImplementedError as error:
        raise ValueError(
            f"'{name}' needs JAX's CUDA plugin, which compiles for GPUs on machines "
            "without one too: pip install 'jax[cuda13]'"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"JAX's CUDA plugin cannot compile for '{name}' here ({error}); on a machine "
            f"with such GPUs, ask for --topology {LOCAL}"
        ) from error
    return tuple(description.devices)


def _target_config(family: str) -> str:
    """Returns XLA's GpuTargetConfigProto as text."""
    (major, minor), cores, shared_kib, cache_mib, clock_ghz = _GPUS[family]
    chip = find_chip(family)
    assert chip is not None  # all of `_GPUS` are known
    return f"""
        platform_name: "CUDA"
        device_description_str: "NVIDIA {family.replace("_", "-").upper()}"
        dnn_version_info {{ major: 9 minor: 8 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {cores}
          fpus_per_core: {64 if major == 8 else 128}
          clock_rate_ghz: {clock_ghz}
          device_memory_size: {chip.hbm_bytes}
          memory_bandwidth: {int(chip.hbm_bytes_per_sec)}
          l2_cache_size: {cache_mib << 20}
          shared_memory_per_block: {48 << 10}
          shared_memory_per_block_optin: {shared_kib << 10}
          shared_memory_per_core: {(shared_kib + 1) << 10}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          registers_per_block_limit: 65536
          registers_per_core_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
    """
