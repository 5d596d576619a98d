"""Runs parts in one process: `python -m benchmarks.first_hour.worker JOB.json LINES.jsonl`.

Writes a line at the end of each part, also if the part raises an exception. If a part ends the
process, the runner detects it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import math
import os
import sys
import time
import traceback
from typing import Any

from packaging.requirements import Requirement

from benchmarks.first_hour.plan import Setting
from benchmarks.record import describe_machine, package_versions


def main(job_path: str, lines_path: str) -> None:
    """Runs the parts of a job, in their order."""
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    setting = Setting(**job["setting"])
    with open(lines_path, "ab", buffering=0) as lines:
        for part in job["parts"]:
            lines.write(json.dumps(run(part, setting)).encode() + b"\n")
            gc.collect()


def run(part: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """Runs a part, and returns its entry."""
    absent = [problem for name in part["packages"] if (problem := _missing(name))]
    if absent:
        return {"status": "absent", "secs": 0.0, "error": "; ".join(absent)}
    start = time.monotonic()
    try:
        if not part["starts_commands"]:
            _prepare(setting, part["function"])
        module, _, function = part["function"].partition(":")
        found = getattr(importlib.import_module(module), function)(setting, **part["arguments"])
        entry = {"status": "done", **_plain(found)}
    except Exception as error:
        traceback.print_exc()
        lines = traceback.format_exception(error)
        entry = {"status": "failed", "error": "".join(lines[-4:])[-3000:].strip()}
    # Read after the part: only imported packages count.
    entry |= {"versions": package_versions(), "machine": describe_machine()}
    return {**entry, "secs": round(time.monotonic() - start, 1)}


def _missing(text: str) -> str | None:
    """Returns why a required distribution is missing or unsuitable, or None."""
    needed = Requirement(text)
    try:
        version = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{needed.name} is not installed"
    if not needed.specifier.contains(version, prereleases=True):
        return f"{needed.name} is {version}; expected {needed.specifier}"
    return None


def _prepare(setting: Setting, function: str) -> None:
    """Sets training's flags, and caches compiled programs for other parts and later starts."""
    from diht_jax.hardware import compiler, schedule

    # The compiler ends the process at an unknown flag; `describe` finds out which are unknown.
    if not function.endswith(":describe"):
        compiler.set_flags(setting.device)
    if setting.device == "tpu" and function.endswith(":measure_step"):
        schedule.request_dump()  # for the bound; libtpu reads its flags once, at its start
    compiler.keep_programs(os.path.join(setting.output, "programs"))
    import jax

    # Steps reuse the program compiled for their report. Tiny programs are many and compile fast.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0 if setting.small else 1)
    if jax.default_backend() != setting.device:
        raise ValueError(
            f"--device {setting.device}: JAX finds {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}; install the extra '{setting.device}' on a machine "
            "with that device"
        )


def _plain(value: Any) -> Any:
    """Replaces non-finite numbers by their names, and NumPy's types by Python's."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


if __name__ == "__main__":
    main(*sys.argv[1:])
