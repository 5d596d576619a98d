"""Command: merges the reports of several filter jobs into one.

    python -m data_prep.reports --inputs=/data/kept_a,/data/kept_b --output=/data/both

The output folder gets `report.json` and `report.html`, as those of one job.
"""

from __future__ import annotations

import pathlib

from absl import flags, logging

from data_prep.reports.page import PAGE, write_report
from data_prep.reports.summary import merge_reports
from diht_jax import command_line

_INPUTS = flags.DEFINE_list("inputs", None, "Folders with a report.json each.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the merged report.", required=True)


def main() -> None:
    """Merges the reports that the flags name."""
    report = merge_reports(_INPUTS.value)
    folder = pathlib.Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder, report)
    print(report.funnel.format_table())
    for warning in report.warnings():
        logging.warning("%s", warning)
    print(f"look at {folder / PAGE}")


if __name__ == "__main__":
    command_line.run(main)
