"""Runs the properties of the kinds under hypothesis, in a process that may die."""

from __future__ import annotations

import collections
import dataclasses
import faulthandler
import functools
import importlib
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import hypothesis
import pebble
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.compiling import xla_flags
from tests.fuzz.judge import OUTCOMES, require

# Kind (a module of `kinds/`) -> its share of the cases.
WEIGHTS = {"tars": 18, "tables": 11, "records": 25, "images": 20, "weights": 16}
WEIGHTS |= {"written": 10}
LIMIT_SECS = 20  # CPU time per case, so that a busy machine makes no difference
# How much the resident memory may grow in one case. An image of the largest allowed size takes
# 200 MB as RGB, and a transparent image is copied.
LIMIT_BYTES = 700 * 2**20
# Address space that a case may reserve beyond the libraries'; more is a MemoryError.
_LIMIT_ADDRESSES = 4 * 2**30
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": xla_flags()}

# No example is remembered between runs and the seed is always given, so runs repeat exactly.
_COMMON = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("suite", _COMMON, phases=[Phase.generate])
settings.register_profile("long", _COMMON, phases=[Phase.generate, Phase.shrink])


class HangError(BaseException):
    """A case takes too long. No `except Exception` may catch it, and it is not worth shrinking."""


@dataclasses.dataclass
class Result:
    """The result of one property.

    Attributes:
        outcomes: outcome -> cases.
        failure: None, or the traceback of a failing case and its drawn values.
    """

    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failure: str | None = None


def share_out(cases: int, kinds: Mapping[str, int] = WEIGHTS) -> dict[str, int]:
    """Maps each kind to its number of cases, rounded up, so the sum may exceed `cases`."""
    total = sum(kinds.values())
    return {kind: -(-cases * weight // total) for kind, weight in kinds.items()}


def run(
    jobs: Mapping[str, int],
    seed: int,
    profile: str = "suite",
    on_cases: Callable[[int], Any] = lambda cases: None,
) -> dict[str, Result]:
    """Runs properties; a process that dies or hangs costs only its current property.

    Args:
        jobs: kind or `KIND:PROPERTY` -> cases.
        seed: of all properties.
        profile: "suite", or "long", which shrinks failing cases.
        on_cases: called with a property's number of cases when they are done.

    Returns:
        `KIND:PROPERTY` -> its result.
    """
    results = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        base = pathlib.Path(folder)
        environment = _ENVIRONMENT | {"HYPOTHESIS_STORAGE_DIRECTORY": str(base / "hypothesis")}
        context = multiprocessing.get_context("spawn")
        with (
            mock.patch.dict(os.environ, environment),
            pebble.ProcessPool(1, context=context, initializer=_begin, initargs=[base]) as pool,
        ):
            for job, cases in jobs.items():
                kind, _, name = job.partition(":")
                module = f"tests.fuzz.kinds.{kind}"
                names = [name] if name else pool.schedule(_names, [module, base]).result()
                for name in names:
                    count = -(-cases // len(names))
                    request = [module, name, base, count, seed, profile]
                    longest = 600 + LIMIT_SECS * count  # only against hangs that no signal ends
                    try:
                        result = pool.schedule(_run, request, timeout=longest).result()
                    except (pebble.ProcessExpired, TimeoutError) as error:
                        log = (base / "log").read_text(errors="replace")[-3000:]
                        result = Result(failure=f"the process died or hung: {error}\n{log}")
                    results[f"{kind}:{name}"] = result
                    on_cases(count)
    return results


def _begin(base: pathlib.Path) -> None:
    """Redirects the output of a process into a log, and installs the signal handler for hangs."""
    log = os.open(base / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    signal.signal(signal.SIGPROF, _raise_hang)


def _raise_hang(*_: Any) -> None:
    raise HangError(f"more than {LIMIT_SECS} s of processor time")


def _names(module_name: str, base: pathlib.Path) -> list[str]:
    """Returns the names of a kind's properties, in the order of the file."""
    own = vars(_prepared(module_name, base))
    return [name.removeprefix("check_") for name in own if name.startswith("check_")]


@functools.cache
def _prepared(module_name: str, base: pathlib.Path) -> Any:
    """Returns the module of a kind, imported and warmed up."""
    module = importlib.import_module(module_name)
    if hasattr(module, "prepare"):
        module.prepare(pathlib.Path(tempfile.mkdtemp(dir=base)))
    return module


def _run(
    module_name: str, name: str, base: pathlib.Path, cases: int, seed: int, profile: str
) -> Result:
    """Runs one property on drawn cases, each in an empty folder and within the limits."""
    function = getattr(_prepared(module_name, base), f"check_{name}")
    result = Result()
    folder = pathlib.Path(tempfile.mkdtemp(dir=base)) / "case"

    @hypothesis.seed(f"{seed}/{module_name}/{name}")
    @settings(settings.get_profile(profile), max_examples=cases)
    @hypothesis.given(st.data())
    def run_cases(data: Any) -> None:
        folder.mkdir()
        try:
            outcome = _run_within_limits(function, data.draw, folder)
        finally:
            shutil.rmtree(folder)
        require(outcome in OUTCOMES, f"no outcome: {outcome!r}")
        result.outcomes[outcome] += 1

    try:
        run_cases()
    except (Exception, HangError):
        result.failure = traceback.format_exc()
    return result


def _run_within_limits(function: Callable, draw: Any, folder: pathlib.Path) -> str:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = _status_bytes("VmRSS")
    limit = _status_bytes("VmSize") + _LIMIT_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECS)
    try:
        outcome = function(draw, folder)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    grown = _status_bytes("VmHWM") - before
    require(grown <= LIMIT_BYTES, f"memory grew by {grown >> 20} MiB")
    return outcome


def _status_bytes(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
