"""Runs cases in this process and reports each on standard output, one JSON object a line.

Started by `runner.py`, which reads the lines and survives whatever happens here. Arguments: the
seed, then `KIND:FIRST:STOP` for each kind.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import Any, TextIO

from tests.fuzz.cases import OUTCOMES, Draw

LIMIT_SECS = 20
# How much the resident memory may grow in one case. A picture of the largest allowed size takes
# 200 MB as RGB, and copies of it are made where it is transparent.
LIMIT_BYTES = 700 * 2**20
# What a case may reserve beyond what the libraries have; a request for more is a MemoryError.
_LIMIT_ADDRESSES = 4 * 2**30


class HangError(BaseException):
    """A case takes too long; no `except Exception` may catch it."""


def main(arguments: list[str]) -> None:
    """Runs what the arguments name."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is none of the report
    signal.signal(signal.SIGALRM, raise_hang)
    seed = int(arguments[0])
    for job in arguments[1:]:
        kind, first, stop = job.split(":")
        _tell(lines, state="preparing", kind=kind, case=int(first))
        module = importlib.import_module(f"tests.fuzz.{kind}")
        with tempfile.TemporaryDirectory(prefix=f"fuzz-{kind}-") as base:
            if hasattr(module, "prepare"):
                module.prepare(pathlib.Path(base))
            _limit_addresses()
            for number in range(int(first), int(stop)):
                _tell(lines, state="started", kind=kind, case=number)
                start = time.perf_counter()
                result = run_case(module, Draw(seed, kind, number), pathlib.Path(base) / "case")
                secs = time.perf_counter() - start
                _tell(lines, state="done", kind=kind, case=number, secs=secs, **result)


def run_case(module: Any, draw: Draw, folder: pathlib.Path) -> dict[str, str]:
    """One case in an empty folder.

    Returns:
        `mutation` and either `outcome` or `failure`, with a traceback.
    """
    names = list(module.MUTATIONS)
    name = names[draw.number % len(names)]
    folder.mkdir()
    before = _resident_bytes()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECS)
    try:
        outcome = module.MUTATIONS[name](draw, folder)
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = _resident_bytes() - before
        if outcome not in OUTCOMES:
            return {"mutation": name, "failure": f"no outcome: {outcome!r}"}
        if grown > LIMIT_BYTES:
            return {"mutation": name, "failure": f"memory grew by {grown >> 20} MiB"}
        return {"mutation": name, "outcome": outcome}
    except (Exception, HangError):
        return {"mutation": name, "failure": traceback.format_exc()}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(folder)


def _resident_bytes() -> int:
    """The most that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_addresses() -> None:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _LIMIT_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def raise_hang(*_: Any) -> None:
    """Handles the alarm."""
    raise HangError(f"more than {LIMIT_SECS} s")


def _tell(lines: TextIO, **report: Any) -> None:
    lines.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
