"""Runs parts in subprocesses, and collects their results in one JSON file."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from absl import logging

from benchmarks.first_hour.plan import CPU_DEVICES, Part, Setting
from benchmarks.record import write_result

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_POLL_SECS = 0.1
# Number of last characters of a failed process's output that the JSON file keeps.
_KEPT_CHARS = 3000


class Results:
    """The JSON file of a run, with an entry for each part that was tried.

    Attributes:
        path: path of the file.
        parts: name of a part -> `status` ("done", "failed" or "absent"), `secs`, `error` unless it
            is done, and its measurements.
    """

    def __init__(self, folder: pathlib.Path, device: str, *, small: bool):
        """Reads the file if it exists.

        Raises:
            ValueError: the file is not a result of this command, or has another `small`.
        """
        self._name, self._folder, self._small = f"first_hour_{device}", folder, small
        self.path = folder / f"{self._name}.json"
        self.parts: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return
        try:
            found = self.read()
            self.parts, was_small = found["parts"], found["small"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}: no results of this command ({error}); take another --output"
            ) from error
        if was_small != small:
            raise ValueError(
                f"{self.path} was made {'with' if was_small else 'without'} --small; do the same, "
                "or take another --output"
            )

    def read(self) -> dict[str, Any]:
        """Returns the contents of the file."""
        return json.loads(self.path.read_text("utf-8"))

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Adds the entry of a part, and writes the file."""
        self.parts[name] = entry
        write_result(self._name, {"small": self._small, "parts": self.parts}, self._folder)
        error = f": {entry['error'].splitlines()[-1]}" if entry.get("error") else ""
        logging.info("%s: %s after %.0f s%s", name, entry["status"], entry["secs"], error)


def run_parts(parts: Sequence[Part], setting: Setting, results: Results, limit_secs: float) -> None:
    """Runs the missing parts, then the failed ones, each once, until the time is over."""
    deadline = time.monotonic() + limit_secs
    pathlib.Path(setting.output).mkdir(parents=True, exist_ok=True)
    missing = [part for part in parts if part.name not in results.parts]
    tried = [part for part in parts if part.name in results.parts]
    failed = [part for part in tried if results.parts[part.name]["status"] != "done"]
    waiting, is_first = [*missing, *failed], True
    while waiting:
        left = deadline - time.monotonic()
        # A part that takes longer than is left waits for the next start; shorter parts precede it.
        fitting = [part for part in waiting if setting.small or part.expected_secs <= left]
        if is_first:
            fitting = waiting
        if left <= 0 or not fitting:
            return
        is_first = False
        # With `small`, parts share a process, which saves starting one for each part.
        together = fitting[:1]
        if setting.small:
            _, alike = next(itertools.groupby(fitting, lambda part: part.starts_commands))
            together = list(alike)
        ended = _run_process(together, setting, results, deadline)
        tried = together[: max(1, ended)]
        waiting = [part for part in waiting if part not in tried]


def _run_process(parts: Sequence[Part], setting: Setting, results: Results, deadline: float) -> int:
    """Runs parts one after the other in a process; returns how many of them now have a result."""
    ended = 0
    with tempfile.TemporaryDirectory(prefix="first_hour_") as folder:
        job, lines = pathlib.Path(folder, "job.json"), pathlib.Path(folder, "lines.jsonl")
        log = pathlib.Path(folder, "log.txt")
        job.write_text(json.dumps({"setting": vars(setting), "parts": [vars(p) for p in parts]}))
        lines.touch()
        started = time.monotonic()
        with log.open("wb") as output, lines.open() as told:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.first_hour.worker", str(job), str(lines)],
                cwd=_REPOSITORY,
                env=_environment(setting.device, any("torch" in part.packages for part in parts)),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                is_running, in_time = True, True
                while is_running and in_time:
                    in_time = time.monotonic() < deadline
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_POLL_SECS)
                        is_running = False
                    for line in _whole_lines(told):
                        results.add(parts[ended].name, json.loads(line))
                        ended, started = ended + 1, time.monotonic()
            finally:
                _end_group(process)
        if ended < len(parts):
            why = _explain_end(process.returncode) if in_time else "its time was over"
            tail = log.read_text("utf-8", errors="replace")[-_KEPT_CHARS:]
            entry = {"status": "failed", "secs": round(time.monotonic() - started, 1)}
            results.add(parts[ended].name, entry | {"error": f"{tail}\n{why}".strip()})
            ended += 1
    return ended


def _whole_lines(file: TextIO) -> Iterator[str]:
    """Yields the lines that were completed since the last call."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            return
        yield line


def _environment(device: str, shares_device: bool) -> dict[str, str]:
    """Makes JAX use the device or fail, and leave memory for torch if they share the device."""
    environment = dict(os.environ)
    if device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
        flag = "--xla_force_host_platform_device_count"
        given = environment.get("XLA_FLAGS", "")
        if flag not in given:
            environment["XLA_FLAGS"] = f"{given} {flag}={CPU_DEVICES}".strip()
    else:
        environment["JAX_PLATFORMS"] = {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}[device]
    if shares_device:
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return environment


def _end_group(process: subprocess.Popen) -> None:
    """Kills a process and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _explain_end(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit status {code}"
