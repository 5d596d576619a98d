"""Benchmark: all measurements for the first hour on an accelerator, as one command.

    python -m benchmarks.first_hour --device gpu --limit_secs 540
    python -m benchmarks.first_hour --device cpu --small --output /tmp/first_hour

Measures versions, accepted flags, and rates of products and copies; attention kernels and XLA's;
the recipes' training steps and their compiled bounds, with profiles; open_clip's step; embedding
with SWAG, and text-spotting; 20 steps of a run that SIGTERM stops and the same command resumes. On
TPUs, also measures collectives, the forms of the loss, and a checkpoint in a bucket. All input is
synthetic, and only --bucket uses the network.

Each part runs in its own process. OUTPUT/first_hour_DEVICE.json is rewritten after each part. If a
part fails or lacks a package, the reason is recorded, and the next part follows. The same command
runs the missing parts, and then retries those that failed. Exits with 75 if parts are left, and
with 1 if all parts were tried and one failed.

--table copies the JSON file to benchmarks/results and fills the page's table from it.
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
# Like `diht_jax.train`, exits with this status if the same command continues the work.
_UNFINISHED = 75


def define_flags() -> None:
    """Defines the flags of this command."""
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
    """Runs the missing parts, or fills the table."""
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
    # Otherwise, a stopped measurement would keep the device busy.
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
