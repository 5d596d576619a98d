"""Benchmark: everything that the first hour on an accelerator has to show, as one command.

    python -m benchmarks.first_hour --device gpu --limit_secs 540
    python -m benchmarks.first_hour --device cpu --small --output /tmp/first_hour

Versions, accepted flags, rates of products and copies; attention kernels next to XLA's; the
recipes' own steps next to their compiled bounds, with profiles; open_clip's step; embedding of SWAG
and text-spotting; 20 steps of a run that SIGTERM stops and the same command continues; on TPUs also
collectives, the forms of the loss, and a checkpoint in a bucket. All input is synthetic, and no
network is used but that of --bucket.

Each part runs in a process of its own, and OUTPUT/first_hour_DEVICE.json is written again after
each. A part that fails, or lacks a package, is recorded with the reason, and the next one follows.
The same command does what is missing, and then tries again what had failed. Exits with 75 where
parts are left, and with 1 where all were tried and one failed.

--table copies the JSON file to benchmarks/results and fills the page's table with it.
"""

from __future__ import annotations

import pathlib
import signal
import sys

from absl import flags

from benchmarks.first_hour.plan import DEVICES, PARTS, Setting, parts_for
from benchmarks.first_hour.runner import Results, run_parts
from benchmarks.first_hour.table import fill_page, format_table
from benchmarks.record import RESULTS
from diht_jax import command_line

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "first_hour.md"
# As `diht_jax.train` exits where the same command goes on.
_UNFINISHED = 75


def define_flags() -> None:
    """The command line of `main`."""
    flags.DEFINE_enum("device", "cpu", DEVICES, "What to measure.")
    flags.DEFINE_integer("limit_secs", 540, "No part is begun or goes on after this time.")
    flags.DEFINE_string("output", None, "Folder of the results; runs/first_hour_DEVICE if unset.")
    flags.DEFINE_bool("small", False, "Tiny models, all in one process: does everything run?")
    flags.DEFINE_list("parts", None, f"Of {', '.join(part.name for part in PARTS)}; all if unset.")
    flags.DEFINE_string(
        "bucket", None, "Where a checkpoint is saved and restored: gs://NAME/FOLDER."
    )
    flags.DEFINE_bool("table", False, "Measure nothing: fill the table of --page.")
    flags.DEFINE_string("page", None, "For --table; docs/benchmarks/first_hour.md if unset.")
    flags.DEFINE_string("results", None, "Folder for --table; benchmarks/results if unset.")


def main() -> None:
    """Runs what is missing, or fills the table."""
    given = flags.FLAGS
    folder = pathlib.Path(given.output or f"runs/first_hour_{given.device}").resolve()
    results = Results(folder, given.device, small=given.small)
    if given.table:
        if not results.parts:
            raise ValueError(f"--table: {results.path} has no part; run the command without it")
        page, kept = given.page or PAGE, pathlib.Path(given.results or RESULTS, results.path.name)
        kept.write_bytes(results.path.read_bytes())
        fill_page(pathlib.Path(page), given.device, results.read())
        print(f"filled: {page}\nkept: {kept}")
        return
    setting = Setting(given.device, given.small, str(folder), given.bucket)
    parts = parts_for(given.device, given.parts)
    # Else a stopped measurement would keep the device busy.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_parts(parts, setting, results, given.limit_secs)
    print(format_table(results.read()))
    print(results.path)
    left = [part.name for part in parts if part.name not in results.parts]
    if left:
        print(f"left, for the same command: {', '.join(left)}")
        sys.exit(_UNFINISHED)
    if any(results.parts[part.name]["status"] == "failed" for part in parts):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
