"""The report of a job, merged from what lies beside its parts as a tree of tasks.

A task merges up to `FAN_OUT` parts, or up to as many merged groups, into one file, and an engine
runs the tasks, so that the process that starts them holds one group at a time, however many parts
there are. Groups are runs of parts in their order: the report is the same for every number of
workers and jobs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from data_prep.jobs.engine import Report
from data_prep.jobs.packed import PackedList
from data_prep.reports.funnel import Funnel
from data_prep.reports.summary import FilterReport
from diht_jax.storage import files

FAN_OUT = 128
# Beginning of the names of the groups' files, which are temporary: `shards.remove_temporary_files`
# knows them.
GROUPS = "merged"

Run = Callable[[Callable[["Group", Report], None], Sequence["Group"]], dict[str, str]]


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """What of a config decides how a report looks.

    Attributes:
        samples_per_outcome: examples as text.
        report_samples: examples with pictures.
        seed: of the choice.
        clean_label: the label of good pairs.
    """

    samples_per_outcome: int
    report_samples: int
    seed: int
    clean_label: str


@dataclasses.dataclass(frozen=True)
class Group:
    """A task: members that are merged into one file.

    Attributes:
        path: of the file.
        members: outputs of parts, or files of groups.
        are_parts: which of the two.
        settings: of the report.
    """

    path: str
    members: tuple[str, ...]
    are_parts: bool
    settings: ReportSettings

    @property
    def source(self) -> str:
        """What is merged, for messages."""
        return f"statistics of {self.members[0]} and {len(self.members) - 1} others"


def gather_report(
    outputs: Sequence[str],
    *,
    folder: str,
    job: dict[str, Any],
    settings: ReportSettings,
    run: Run,
) -> FilterReport:
    """Merges what lies beside the parts of a job.

    Args:
        outputs: of the parts that are done, in order.
        folder: where the files of groups go, until they are merged.
        job: its "input", "settings" and "config_hash".
        settings: of the report.
        run: runs `merge_group` for groups, and returns the failures.

    Raises:
        ValueError: a group could not be merged.
    """
    # Unlike those of any other process that merges the same parts.
    stamp = f"{os.getpid()}-{secrets.token_hex(4)}"
    members, are_parts, level = outputs, True, 0
    while len(members) > FAN_OUT:
        groups = PackedList(
            Group(
                files.join(folder, f".{GROUPS}.{level}-{start // FAN_OUT}.{stamp}.tmp"),
                tuple(members[start : start + FAN_OUT]),
                are_parts,
                settings,
            )
            for start in range(0, len(members), FAN_OUT)
        )
        if failures := run(merge_group, groups):
            source, error = next(iter(failures.items()))
            raise ValueError(f"{source} could not be merged: {error}")
        if not are_parts:
            _remove(members)
        members, are_parts, level = tuple(group.path for group in groups), False, level + 1
    report = _merge(members, are_parts, settings)
    if not are_parts:
        _remove(members)
    report.jobs = [job | {"shards": len(outputs)}]
    return report


def merge_group(group: Group, report: Report) -> None:
    """Merges the members of a group into its file; a task of `engine.run_tasks`."""
    merged = _merge(group.members, group.are_parts, group.settings)
    text = json.dumps(merged.to_json(with_all_names=True))
    files.write_bytes(group.path, text.encode("utf-8", "replace"))
    report(0)


def _merge(members: Sequence[str], are_parts: bool, settings: ReportSettings) -> FilterReport:
    merged = FilterReport(
        [],
        Funnel(settings.samples_per_outcome, settings.seed),
        samples_per_outcome=settings.report_samples,
        clean_label=settings.clean_label,
    )
    for member in members:
        if are_parts:
            merged.add_part(member)
        else:
            merged.merge(FilterReport.from_json(json.loads(files.read_bytes(member))))
    return merged


def _remove(paths: Sequence[str]) -> None:
    for path in paths:
        files.remove(path)
