"""The demo on a fresh clone: its time including installation, and its table.

    python -m benchmarks.demo --folder /tmp/demo

Clones this checkout's last commit into the folder, which must not exist. Runs `bash run_demo.sh`
there with an empty home, which makes pip download and JAX compile as on a fresh machine. Writes
`benchmarks/results/demo.json`: total seconds and seconds per step, and the results of the four
students with their 95% intervals, in percent.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import time
from typing import Any

from absl import flags

from benchmarks.record import children_cpu_secs, write_result
from data_prep.reports.demo import METRICS, STUDENTS
from diht_jax import command_line

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# Name and seconds of a finished step in the output of run_demo.sh.
_STEP = re.compile(r"^(\S.*?) +(\d+) s$", re.MULTILINE)


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("folder", None, "Where the clone comes to lie; kept.", required=True)


def main() -> None:
    """Clones and runs the demo, and writes the results."""
    folder = pathlib.Path(flags.FLAGS.folder)
    if folder.exists():
        raise ValueError(f"--folder={folder}: exists; name one that does not")
    checkout, home = folder / "diht_jax", folder / "home"
    home.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", _REPOSITORY, checkout], check=True)
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "--short", "HEAD"])
    cpu_secs, start_secs = children_cpu_secs(), time.perf_counter()
    done = subprocess.run(
        ["bash", "run_demo.sh"],
        cwd=checkout,
        env={**os.environ, "HOME": str(home.resolve())},
        stderr=subprocess.PIPE,
        text=True,
    )
    total_secs = time.perf_counter() - start_secs
    print(done.stderr)
    if done.returncode:
        raise ValueError(f"{checkout}/run_demo.sh: exit status {done.returncode}")
    steps = {name: int(seconds) for name, seconds in _STEP.findall(done.stderr)}
    payload = {
        "commit": commit.decode().strip(),
        "total_secs": round(total_secs),
        "cpu_secs": round(children_cpu_secs() - cpu_secs),
        "steps_secs": steps,
        "rest_secs": round(total_secs - sum(steps.values())),
        "students": {
            name: _results(checkout / "demo_output" / f"{name}.json") for name in STUDENTS
        },
    }
    print(f"{total_secs:.0f} s, {payload['rest_secs']} of them no step: nearly all is installing")
    print("written:", write_result("demo", payload))


def _results(path: pathlib.Path) -> dict[str, Any]:
    """Reads `task metric` -> value and interval from a results file, in percent."""
    tasks = {result["task"]: result for result in json.loads(path.read_text())["results"]}
    return {
        f"{task} {metric}": {
            "percent": round(100 * tasks[task]["metrics"][metric], 2),
            "interval": [round(100 * bound, 2) for bound in tasks[task]["intervals"][metric]],
        }
        for task, metric in METRICS
    }


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
