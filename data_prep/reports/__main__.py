"""Command: shows the report of a filter job on the terminal, or merges those of several into one.

    python -m data_prep.reports --input=/data/kept
    python -m data_prep.reports --input=/data/kept_a,/data/kept_b --output=/data/both

It prints the funnel and some pairs of every outcome. The output folder gets `report.json` and
`report.html`, as those of one job. Several jobs are merged by reading their decisions again.
"""

from __future__ import annotations

from absl import flags, logging

from data_prep.decisions.funnel import spell_outcome
from data_prep.decisions.report import get_funnel, merge_reports
from data_prep.reports.page import PAGE, samples_by_outcome, write_report
from diht_jax import command_line
from diht_jax.storage import files
from diht_jax.terminal import escape, print_escaped

_SHOWN_PAIRS = 2  # of each outcome
_SHOWN_CHARS = 80  # of a caption


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    flags.DEFINE_list("input", None, "Folders with a report.json each.", required=True)
    flags.DEFINE_alias("inputs", "input")
    flags.DEFINE_string("output", None, "Folder for the merged report; unset: only print it.")


def main() -> None:
    """Shows the reports that the flags name as one, and writes it."""
    report = merge_reports(flags.FLAGS.input)
    lines = [
        f"{spell_outcome(outcome):36} {escape(sample['caption'][:_SHOWN_CHARS])}"
        for outcome, found in samples_by_outcome(report)
        for sample in found[:_SHOWN_PAIRS]
    ]
    print_escaped("\n".join([get_funnel(report).format_table(), "", *lines]))
    for warning in report["warnings"]:
        logging.warning("%s", warning)
    folder = flags.FLAGS.output
    if folder is not None:
        files.make_folder(folder)
        write_report(folder, report)
        print_escaped(f"look at {files.join(folder, PAGE)}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
