"""Runs the properties of a kind under hypothesis, in a process that may die without harm."""

from __future__ import annotations

import collections
import dataclasses
import faulthandler
import functools
import importlib
import os
import pathlib
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.fuzz.judge import OUTCOMES, require

# Of the processor's time, so that a busy machine makes no difference.
LIMIT_SECS = 20
# How much the resident memory may grow in one case. A picture of the largest allowed size takes
# 200 MB as RGB, and copies of it are made where it is transparent.
LIMIT_BYTES = 700 * 2**20
# What a case may reserve beyond what the libraries have; a request for more is a MemoryError.
_LIMIT_ADDRESSES = 4 * 2**30

# No example is remembered between runs, and the seed is always given: runs repeat exactly.
_COMMON = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("suite", _COMMON, phases=[Phase.generate])
settings.register_profile("long", _COMMON, phases=[Phase.generate, Phase.shrink])


class HangError(BaseException):
    """A case takes too long; no `except Exception` may catch it, nor is it worth shrinking."""


@dataclasses.dataclass
class Result:
    """What came of one property.

    Attributes:
        outcomes: outcome -> cases.
        failure: None, or the traceback of a case that fails, with what it drew.
        secs: of all of its cases.
        slowest: of one of them.
    """

    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failure: str | None = None
    secs: float = 0.0
    slowest: float = 0.0


def properties(module: Any) -> dict[str, Callable[[Any, pathlib.Path], str]]:
    """Name -> function of each property of a kind, in the order of the file."""
    prefix = "check_"
    own = {n: f for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__}
    return {n.removeprefix(prefix): f for n, f in own.items() if n.startswith(prefix)}


def serve(connection: Connection, base: pathlib.Path, log: pathlib.Path) -> None:
    """Answers requests: (module,) by its properties' names; (module, name, ...) by a `Result`.

    Sends None for each case that begins before the answer. Whatever is printed goes into the log.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    signal.signal(signal.SIGPROF, raise_hang)
    while True:
        module_name, *request = connection.recv()
        found = properties(_prepared(module_name, base))
        if not request:
            connection.send(list(found))
            continue
        name, *options = request
        report = functools.partial(connection.send, None)
        connection.send(run(found[name], f"{module_name}/{name}", base, *options, report))


@functools.cache
def _prepared(module_name: str, base: pathlib.Path) -> Any:
    """The module of a kind, imported and warmed up."""
    module = importlib.import_module(module_name)
    if hasattr(module, "prepare"):
        folder = base / module_name
        folder.mkdir()
        module.prepare(folder)
    return module


def run(
    function: Callable[[Any, pathlib.Path], str],
    title: str,
    base: pathlib.Path,
    cases: int,
    seed: int,
    profile: str = "suite",
    report: Callable[[], None] = lambda: None,
) -> Result:
    """Runs one property on drawn cases, each in an empty folder and within the limits."""
    result = Result()
    folder = base / "case"

    @hypothesis.seed(f"{seed}/{title}")
    @settings(settings.get_profile(profile), max_examples=cases)
    @hypothesis.given(st.data())
    def run_cases(data: Any) -> None:
        report()
        folder.mkdir()
        start = time.perf_counter()
        try:
            outcome = _run_within_limits(function, data.draw, folder)
        finally:
            secs = time.perf_counter() - start
            result.secs, result.slowest = result.secs + secs, max(result.slowest, secs)
            shutil.rmtree(folder)
        require(outcome in OUTCOMES, f"no outcome: {outcome!r}")
        result.outcomes[outcome] += 1

    try:
        run_cases()
    except (Exception, HangError):
        result.failure = traceback.format_exc()
    return result


def _run_within_limits(function: Callable, draw: Any, folder: pathlib.Path) -> str:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # restarts the peak, VmHWM
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


def raise_hang(*_: Any) -> None:
    """Handles the signal of the timer."""
    raise HangError(f"more than {LIMIT_SECS} s of processor time")
