"""Command: merges the reports of several filter jobs into one.

    python -m data_prep.reports --input=/data/kept_a,/data/kept_b --output=/data/both

The output folder gets `report.json` and `report.html`, as those of one job.
"""

from __future__ import annotations

from absl import flags, logging

from data_prep.jobs import files
from data_prep.reports.page import PAGE, write_report
from data_prep.reports.summary import merge_reports
from diht_jax import command_line


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    flags.DEFINE_list("input", None, "Folders with a report.json each.", required=True)
    flags.DEFINE_alias("inputs", "input")
    flags.DEFINE_string("output", None, "Folder for the merged report.", required=True)


def main() -> None:
    """Merges the reports that the flags name."""
    report = merge_reports(flags.FLAGS.input)
    folder = flags.FLAGS.output
    files.make_folder(folder)
    write_report(folder, report)
    print(report.funnel.format_table())
    for warning in report.warnings():
        logging.warning("%s", warning)
    print(f"look at {files.join(folder, PAGE)}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
