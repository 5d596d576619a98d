"""Runs parts in processes of their own, and keeps what each has given in one JSON file."""

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
# Of a failed process's output, what the JSON file keeps.
_KEPT_CHARS = 3000


class Results:
    """The JSON file of a run: an entry for each part that was tried.

    Attributes:
        path: of the file.
        parts: name of a part -> `status` ("done", "failed" or "absent"), `secs`, `error` where it
            is not done, and what it measured.
    """

    def __init__(self, folder: pathlib.Path, device: str, *, small: bool):
        """Reads the file where there is one.

        Raises:
            ValueError: it is of another form of the command, or no JSON.
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
        """The whole file."""
        return json.loads(self.path.read_text("utf-8"))

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Writes the file with the entry of a part."""
        self.parts[name] = entry
        write_result(self._name, {"small": self._small, "parts": self.parts}, self._folder)
        error = f": {entry['error'].splitlines()[-1]}" if entry.get("error") else ""
        logging.info("%s: %s after %.0f s%s", name, entry["status"], entry["secs"], error)


def run_parts(parts: Sequence[Part], setting: Setting, results: Results, limit_secs: float) -> None:
    """Runs what has no result, then what had failed, each once, until the time is over."""
    deadline = time.monotonic() + limit_secs
    pathlib.Path(setting.output).mkdir(parents=True, exist_ok=True)
    missing = [part for part in parts if part.name not in results.parts]
    tried = [part for part in parts if part.name in results.parts]
    failed = [part for part in tried if results.parts[part.name]["status"] != "done"]
    waiting, is_first = [*missing, *failed], True
    while waiting:
        left = deadline - time.monotonic()
        # What takes longer than is left waits for the next start; a shorter part comes before it.
        fitting = [part for part in waiting if setting.small or part.expected_secs <= left]
        if is_first:
            fitting = waiting
        if left <= 0 or not fitting:
            return
        is_first = False
        # The small form saves the time of starting a process for each.
        together = fitting[:1]
        if setting.small:
            _, alike = next(itertools.groupby(fitting, lambda part: part.starts_commands))
            together = list(alike)
        ended = _run_process(together, setting, results, deadline)
        tried = together[: max(1, ended)]
        waiting = [part for part in waiting if part not in tried]


def _run_process(parts: Sequence[Part], setting: Setting, results: Results, deadline: float) -> int:
    """Runs parts one after the other in a process; returns how many of them have a result now."""
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
    """The lines that have been ended since the last call."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            return
        yield line


def _environment(device: str, shares_device: bool) -> dict[str, str]:
    """For JAX to take the device or end, and to leave room there for torch where that comes too."""
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
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _explain_end(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit status {code}"
