"""Benchmark records: results with the machine, package versions and date.

Every benchmark ends with `write_result`. The JSON files are kept in the repository and cited by
`docs/benchmarks/`. The benchmarks themselves define how they measure.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
from typing import Any

from diht_jax.storage.files import write_bytes

RESULTS = pathlib.Path(__file__).resolve().parent / "results"

# Module -> its package; recorded if the benchmark has imported the module.
_PACKAGES = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "numpy": "numpy",
    "libtpu": "libtpu",
    "jax_cuda12_plugin": "jax-cuda12-plugin",
    "jax_cuda13_plugin": "jax-cuda13-plugin",
    "grain": "grain",
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "cykooz_resizer": "cykooz-resizer",
    "torch": "torch",
    "torchvision": "torchvision",
    "open_clip": "open_clip_torch",
    "webdataset": "webdataset",
}


def write_result(
    name: str,
    payload: dict[str, Any],
    directory: str | os.PathLike[str] = RESULTS,
    command: str | None = None,
) -> pathlib.Path:
    """Writes `directory/NAME.json`, and replaces an existing file.

    Args:
        name: name of the benchmark: lower-case letters, digits and `_`.
        payload: results, ready for JSON. Keys include their units (`_secs`, `_bytes`).
        directory: `benchmarks/results` by default.
        command: command that produces this result; defaults to that of this process.

    Returns:
        The path of the file, which contains the payload's keys and `benchmark`, `command`,
        `machine`, `versions` and `date_utc`.

    Raises:
        ValueError: the name is not a plain file name, or the payload uses a reserved key, is not
            finite or is not JSON.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"name: expected lower-case letters, digits and '_', got {name!r}")
    head = {
        "benchmark": name,
        "command": command or command_line(),
        "date_utc": utc_now(),
        "machine": describe_machine(),
        "versions": package_versions(),
    }
    reserved = sorted(head.keys() & payload.keys())
    if reserved:
        raise ValueError(f"payload: the keys {', '.join(reserved)} are written by write_result")
    try:
        text = json.dumps({**head, **payload}, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"payload of '{name}' is no plain, finite JSON: {error}") from error
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    write_bytes(path, f"{text}\n".encode())
    return path


def utc_now() -> str:
    """Returns date and time, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def children_cpu_secs() -> float:
    """Returns the processor time of all ended child processes."""
    times = os.times()
    return times.children_user + times.children_system


def command_line() -> str:
    """Returns the command of this process as typed in the root of the repository."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = (
        f"-m {spec.name.removesuffix('.__main__')}" if spec else pathlib.Path(sys.argv[0]).name
    )
    return " ".join(["python", program, *sys.argv[1:]])


def describe_machine() -> dict[str, Any]:
    """Returns `cpu`, `cores`, `memory_gb`, and `accelerator` (None if there is none).

    Uses only libraries that are already imported to find the accelerator.
    """
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(memory_bytes / 1e9, 1),
        "accelerator": _accelerator(),
    }


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that are currently imported."""
    versions = {"python": platform.python_version()}
    for module, package in _PACKAGES.items():
        if module in sys.modules:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = getattr(sys.modules[module], "__version__", "unknown")
    return versions


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def _accelerator() -> str | None:
    if "jax" in sys.modules:
        import jax

        device = jax.devices()[0]
        if device.platform != "cpu":
            return f"{jax.device_count()} x {device.device_kind}"
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return None
