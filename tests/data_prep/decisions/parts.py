"""Makes parts as the filter leaves them, from rows of decisions."""

from __future__ import annotations

import pathlib

from data_prep.decisions.log import SAMPLES_SUFFIX, SECONDS_SUFFIX, SampleLog
from data_prep.decisions.report import gather
from data_prep.decisions.table import DecisionWriter, decisions_path
from data_prep.jobs import shards
from diht_jax.storage import files


def write_part(
    output: pathlib.Path,
    rows: list[dict],
    facts: dict | None = None,
    log: SampleLog | None = None,
) -> str:
    """Writes decisions, statistics, times and samples of a part; its path."""
    writer = DecisionWriter()
    for number, row in enumerate(rows):
        writer.add(number, row)
    writer.write(decisions_path(str(output)))
    (log or SampleLog(0, 0, 0, 1)).write(f"{output}{SAMPLES_SUFFIX}")
    files.write_object(f"{output}{shards.STATS_SUFFIX}", {"counts": facts or {}})
    files.write_object(f"{output}{SECONDS_SUFFIX}", {})
    return str(output)


def gather_parts(*outputs: str) -> dict:
    """The report of parts."""
    return gather(outputs, [], samples_per_outcome=5, report_samples=4)
