"""Time of a new user until an image is found by its text, and until pairs are filtered.

    python -m benchmarks.first_minutes --folder /tmp/first_minutes

Clones this checkout's last commit into the folder, which must not exist, and makes an environment
there with an empty home, without any downloaded or compiled files. Runs the commands of the
quickstart and of `docs/guides/install.md` on the images of `data_prep.examples`. Writes
`benchmarks/results/first_minutes.json`: wall time and processor time of each command, their sums,
and the numbers of pairs before and after the filter.
"""

from __future__ import annotations

import csv
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from benchmarks.record import children_cpu_secs, write_result
from diht_jax import command_line

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_QUERY = "red tomato"
# Each command runs in a new shell, in the folder of the clone, its environment and the images.
_PLACES = {"REPOSITORY": str(_REPOSITORY), "PYTHON": sys.executable}
_UNTIL_FOUND = (
    "git clone --quiet REPOSITORY clone",
    "PYTHON -m venv env",
    "pip install --quiet ./clone",
    "python -m data_prep.examples pictures --output .",
    "python -m diht_jax.search --model clipart_tiny --input pictures --output search.html "
    f"'{_QUERY}'",
)
_UNTIL_FILTERED = (
    "pip install --quiet './clone[prep]'",
    "python -m data_prep.filter --config prep/cat --config.input=pictures/captions.csv "
    "--config.output=kept",
)


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("folder", None, "Where everything comes to lie; kept.", required=True)


def main() -> None:
    """Runs the commands one after another, and writes their times."""
    folder = pathlib.Path(flags.FLAGS.folder).resolve()
    if folder.exists():
        raise ValueError(f"--folder={folder}: exists; name one that does not")
    (folder / "home").mkdir(parents=True)
    found = [_timed(command, folder) for command in _UNTIL_FOUND]
    filtered = [_timed(command, folder) for command in _UNTIL_FILTERED]
    with open(folder / "pictures" / "captions.csv", newline="") as file:
        num_pairs = sum(1 for _ in csv.DictReader(file))
    kept_keys = (folder / "kept" / "kept_keys.txt").read_text().splitlines()
    payload = {
        "until_found": _summary(found),
        "until_filtered": _summary([*found, *filtered]),
        "commands": [*found, *filtered],
        "num_pairs": num_pairs,
        "num_kept": len(kept_keys),
    }
    print("written:", write_result("first_minutes", payload))


def _timed(command: str, folder: pathlib.Path) -> dict[str, Any]:
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environment["HOME"] = str(folder / "home")
    environment["PATH"] = f"{folder / 'env' / 'bin'}:{environment['PATH']}"
    typed = command
    for name, path in _PLACES.items():
        typed = typed.replace(name, shlex.quote(path))
    cpu_secs, start_secs = children_cpu_secs(), time.perf_counter()
    subprocess.run(typed, shell=True, cwd=folder, env=environment, check=True)
    secs = time.perf_counter() - start_secs
    return {
        "command": command,
        "secs": round(secs, 1),
        "cpu_secs": round(children_cpu_secs() - cpu_secs, 1),
    }


def _summary(commands: list[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "minutes": round(sum(c["secs"] for c in commands) / 60, 1),
        "cpu_minutes": round(sum(c["cpu_secs"] for c in commands) / 60, 1),
    }


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
