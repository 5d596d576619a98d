"""Command: shows the report of a filter job on the terminal, or merges several reports into one.

    python -m data_prep.reports --input=/data/kept
    python -m data_prep.reports --input=/data/kept_a,/data/kept_b --output=/data/both

Prints the funnel and some pairs of each outcome. With --output, writes `report.json` and
`report.html` as for one job. Reports are merged by reading the decisions of all jobs again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from absl import flags, logging

from data_prep.decisions.report import Report, gather, read_report
from data_prep.decisions.table import find_outputs
from data_prep.reports import page
from diht_jax import command_line
from diht_jax.storage import files
from diht_jax.terminal import escape, print_escaped

_SHOWN_PAIRS = 2  # per outcome
_SHOWN_CHARS = 80  # per caption


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    flags.DEFINE_list("input", None, "Folders with a report.json each.")
    flags.DEFINE_alias("inputs", "input")
    flags.DEFINE_string("output", None, "Folder for the merged report; unset: only print it.")


def main() -> None:
    """Merges and prints the reports that the flags name, and writes the result if requested."""
    command_line.require_flags("input")
    report = merge_reports(flags.FLAGS.input)
    lines = [
        f"{page.spell_outcome(outcome):36} {escape(sample['caption'][:_SHOWN_CHARS])}"
        for outcome, found in page.samples_by_outcome(report).items()
        for sample in found[:_SHOWN_PAIRS]
    ]
    print_escaped(
        "\n".join(
            [page.format_funnel(report["funnel"], report["counts"]["text_spotting"]), "", *lines]
        )
    )
    for warning in report["warnings"]:
        logging.warning("%s", warning)
    folder = flags.FLAGS.output
    if folder is not None:
        files.make_folder(folder)
        page.write_report(folder, report)
        print_escaped(f"look at {files.join(folder, page.PAGE)}")


def merge_reports(folders: Sequence[str | os.PathLike[str]]) -> Report:
    """Merges the reports of several finished folders. Returns the report itself for one folder."""
    reports = [read_report(folder) for folder in folders]
    if len(reports) == 1:
        return reports[0]
    outputs: list[str] = []
    for folder, report in zip(folders, reports, strict=True):
        merged = [job["output"] for job in report["jobs"]]  # several if it is a merged report
        for part_of in merged if len(merged) > 1 else [os.fspath(folder)]:
            outputs += find_outputs(part_of, "--input")[0]
    merged = gather(
        outputs,
        [job for report in reports for job in report["jobs"]],
        samples_per_outcome=reports[0]["samples_per_outcome"],
        report_samples=reports[0]["report_samples"],
        clean_label=reports[0]["clean_label"],
    )
    found, stated = merged["counts"]["read"], sum(r["counts"]["read"] for r in reports)
    if found != stated:
        raise ValueError(
            f"{', '.join(map(str, folders))}: files of decisions hold {found:,} pairs, and "
            f"the jobs have read {stated:,}; some are missing: run the same filters once more"
        )
    return merged


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
