"""The report of a filter job, or of several: queries over their decisions, as plain data.

`report.json` holds it. How it looks belongs in `data_prep.reports`.
"""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc

from data_prep.decisions.funnel import Funnel, spell_outcome
from data_prep.decisions.log import (
    EXTREMES,
    SAMPLES_SUFFIX,
    SECONDS_SUFFIX,
    choose_samples,
    read_samples,
)
from data_prep.decisions.table import (
    FOLDER,
    KEPT,
    SOURCE,
    SUFFIX,
    decisions_path,
    find_decisions,
    read_decisions,
)
from data_prep.jobs import shards
from data_prep.sources.img2dataset import merge_download_stats
from data_prep.steps.registry import ordered_steps
from data_prep.text_spotting.config import name_machine, warn_of_machines
from diht_jax.storage import files
from diht_jax.terminal import escape

REPORT = "report.json"
DROPPED = "dropped"

SCORES = {name: words for step in ordered_steps() for name, words in step.scores.items()}
# Histogram -> lower ends of its bins; the last bin has no upper end.
BINS: dict[str, Sequence[float]] = {
    "complexity": tuple(range(13)),
    "actions": tuple(range(7)),
    "caption_words": tuple(range(0, 37, 2)),
    "image_side": (0, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048),
    **{name: starts for step in ordered_steps() for name, starts in step.bins.items()},
}
NAMES = ("actions", "objects")
COLUMNS = (
    "outcome",
    "reason",
    "label",
    "words",
    "complexity",
    "actions",
    "width",
    "height",
    "format",
    "looked",
    "object_names",
    "action_names",
    *SCORES,  # those that were recorded
)
_GROUPED = ("outcome", "reason", "label", "format", "looked")  # of few values each

_VERSION = 3
_BLOCK_ROWS, _BLOCK_PARTS = 2**17, 256  # that are counted at a time
_MAX_DAMAGED = 100
_MAX_NAMES = 1000  # that are reported of each kind
_COMPACT_ROWS = 2**18  # names that wait to be summed
_PRINTED_CHARS = 80  # of a caption
_NAME_WORDS = 4  # of a caption from which on it is hardly a name; an edge of BINS["caption_words"]
_FEW = 0.05  # of all pairs, kept of names

Report = dict[str, Any]


def gather(
    outputs: Sequence[str],
    jobs: Sequence[Mapping[str, Any]],
    *,
    samples_per_outcome: int,
    report_samples: int,
    clean_label: str = "clean",
) -> Report:
    """Asks the decisions of parts, and the files next to them, for all that the report shows.

    Args:
        outputs: of the parts.
        jobs: of every job its "input", "settings", "config_hash", "failed" and number of "shards".
        samples_per_outcome: samples of each outcome in "counts", as [rank, key, caption].
        report_samples: samples of each outcome with pictures.
        clean_label: the label of good pairs.
    """
    counts, facts, seconds = Counts(), _Facts(), collections.Counter()
    waiting: list[pyarrow.RecordBatch] = []

    def read_parts() -> Iterator[bytes]:
        for batches, stats, times, content in _read_all(outputs):
            waiting.extend(batches)
            if sum(map(len, waiting)) >= _BLOCK_ROWS or len(waiting) >= _BLOCK_PARTS:
                counts.add(_join(waiting))
                waiting.clear()
            facts.add(stats["counts"])
            for name in ("pairs", "wall_secs", "cpu_secs"):
                seconds[name] += times.get(name, 0)
            for stage, secs in times.get("cpu_secs_of_stages", {}).items():
                seconds[f"stage/{stage}"] += secs
            yield content

    most = max(samples_per_outcome, report_samples)
    chosen = choose_samples(read_parts(), most)
    if waiting:
        counts.add(_join(waiting))
    funnel = counts.funnel()
    scored = {
        name: {end: chosen.pop(f"{name}/{end}")[:report_samples] for end in EXTREMES}
        for name in SCORES
        if f"{name}/lowest" in chosen
    }
    texts = {
        outcome: [[s["rank"], s["key"], s["caption"]] for s in found[:samples_per_outcome]]
        for outcome, found in chosen.items()
    }
    report: Report = {
        "version": _VERSION,
        "jobs": list(jobs),
        "funnel": [
            {"stage": stage, "reason": reason, "pairs": pairs, "share": funnel.share(pairs)}
            for stage, reason, pairs in funnel.rows()
        ],
        "throughput": _throughput(funnel, seconds),
        "counts": funnel.to_json() | {"image_formats": counts.image_formats(), "samples": texts},
        "measures": counts.measures(),
        "download": facts.download,
        "versions": {k: dict(sorted(v.items())) for k, v in sorted(facts.versions.items())},
        "failed": [failed for job in jobs for failed in job.get("failed", ())],
        "warnings": [],
        "seconds": {k: round(v, 4) for k, v in sorted(seconds.items())},
        "samples": [
            {"outcome": outcome} | sample
            for outcome, found in chosen.items()
            for sample in found[:report_samples]
        ],
        "scored": scored,
        "samples_per_outcome": samples_per_outcome,
        "report_samples": report_samples,
        "clean_label": clean_label,
    }
    report["warnings"] = [
        *facts.warnings(),
        *_warn_of_failed(report["failed"]),
        *_warn_of_names(funnel, report["measures"]["histograms"]["caption_words"]),
    ]
    return report


class Counts:
    """Sums over the rows of decisions that were added: outcomes, histograms, names, labels.

    They are the same for any order and division of the rows into tables.
    """

    def __init__(self) -> None:
        self._groups: collections.Counter[tuple[str | None, ...]] = collections.Counter()
        sides = (KEPT, DROPPED)
        self._bins = {(n, s): np.zeros(len(BINS[n]), np.int64) for n in BINS for s in sides}
        self._names: dict[tuple[str, str], list[pyarrow.Table]] = {
            (kind, side): [] for kind in NAMES for side in sides
        }

    def add(self, rows: pyarrow.Table) -> None:
        """Adds rows with the columns `COLUMNS`; scores may be missing."""
        grouped = rows.select(_GROUPED).group_by(list(_GROUPED)).aggregate([([], "count_all")])
        groups = zip(*(grouped[name].to_pylist() for name in _GROUPED), strict=True)
        self._groups.update(dict(zip(groups, grouped["count_all"].to_pylist(), strict=True)))
        is_kept = pc.equal(rows["outcome"], KEPT)
        for side, chosen in ((KEPT, is_kept), (DROPPED, pc.invert(is_kept))):
            self._add_side(side, rows.filter(chosen))

    def _count(self, *columns: str) -> collections.Counter[tuple[Any, ...]]:
        """Number of rows for each combination of values."""
        places = [_GROUPED.index(name) for name in columns]
        found: collections.Counter[tuple[Any, ...]] = collections.Counter()
        for values, rows in self._groups.items():
            found[tuple(values[place] for place in places)] += rows
        return found

    def funnel(self) -> Funnel:
        """Counts of outcomes, and what was done to find text."""
        looked = collections.Counter({value: n for (value,), n in self._count("looked").items()})
        spotting = collections.Counter(
            {
                "read": looked["read"],
                "no_run": looked["no_run"],
                "gated": looked["gated"] + looked["audited"] + looked["missed"],
                "audited": looked["audited"] + looked["missed"],
                "missed": looked["missed"],
            }
        )
        return Funnel(dict(self._count("outcome", "reason")), +spotting)

    def image_formats(self) -> dict[str, int]:
        """Format -> kept pairs."""
        found = {name: pairs for (name,), pairs in self._count("format").items()}
        return {name: found[name] for name in sorted(filter(None, found))}

    def measures(self) -> dict[str, Any]:
        """Histograms, frequent names and labels of the pairs, JSON-able.

        Returns:
            histograms: name of `BINS` -> "kept" or "dropped" -> lower end of the bin -> pairs. A
                pair counts where it was measured: a caption that a gate refused has no complexity,
                an image that nobody opened has no size, and no pair a score without its step.
            names: "actions" or "objects" -> "kept" or "dropped" -> name -> pairs whose first
                caption has it, of the most frequent.
            labels: outcome -> label -> pairs, where the config names a label.
        """
        histograms: dict[str, Any] = {name: {} for name in BINS}
        for (name, side), found in self._bins.items():
            filled = np.flatnonzero(found)
            histograms[name][side] = {str(BINS[name][i]): int(found[i]) for i in filled}
        names: dict[str, Any] = {kind: {} for kind in NAMES}
        for (kind, side), tables in self._names.items():
            order = [("count", "descending"), ("name", "ascending")]
            rows = _sum_names(tables).sort_by(order).slice(0, _MAX_NAMES)
            names[kind][side] = dict(
                zip(rows["name"].to_pylist(), rows["count"].to_pylist(), strict=True)
            )
        labels: dict[str, dict[str, int]] = {}
        for (stage, reason, label), pairs in self._count("outcome", "reason", "label").items():
            if label is not None:
                outcome = stage if reason is None else f"{stage}/{reason}"
                labels.setdefault(outcome, {})[label] = pairs
        return {"histograms": histograms, "names": names, "labels": labels}

    def _add_side(self, side: str, rows: pyarrow.Table) -> None:
        words = rows.filter(pc.not_equal(rows["outcome"], SOURCE))["words"]
        measured = {
            "complexity": rows["complexity"],
            "actions": rows["actions"],
            "caption_words": words,
            "image_side": pc.min_element_wise(rows["width"], rows["height"]),
            **{name: rows[name] for name in SCORES if name in BINS and name in rows.column_names},
        }
        for name, values in measured.items():
            numbers = values.drop_null().to_numpy()
            places = np.searchsorted(BINS[name], numbers, side="right") - 1
            self._bins[name, side] += np.bincount(places, minlength=len(BINS[name]))
        for kind, column in (("actions", "action_names"), ("objects", "object_names")):
            found = pc.value_counts(pc.list_flatten(rows[column]))
            table = pyarrow.table({"name": found.field("values"), "count": found.field("counts")})
            tables = self._names[kind, side]
            tables.append(table)
            if sum(map(len, tables)) > _COMPACT_ROWS + 2 * len(tables[0]):
                self._names[kind, side] = [_sum_names(tables)]


def _join(batches: list[pyarrow.RecordBatch]) -> pyarrow.Table:
    """One table of them; a score that a part did not record is null there."""
    tables = [pyarrow.Table.from_batches([batch]) for batch in batches]
    return pyarrow.concat_tables(tables, promote_options="default").unify_dictionaries()


def _sum_names(tables: list[pyarrow.Table]) -> pyarrow.Table:
    if not tables:
        return pyarrow.table({"name": pyarrow.array([], pyarrow.string()), "count": []})
    total = pyarrow.concat_tables(tables).group_by("name").aggregate([("count", "sum")])
    return total.rename_columns({"count_sum": "count"})


class _Facts:
    """Facts of parts besides counts: versions, machines, downloads, damage."""

    def __init__(self) -> None:
        self.download: dict[str, Any] = {}
        self.versions: dict[str, collections.Counter[str]] = {}
        self._spotters: collections.Counter[str] = collections.Counter()
        self._damaged: list[str] = []
        self._num_damaged = 0

    def add(self, stated: Mapping[str, Any]) -> None:
        """Adds the counts in the statistics of a part."""
        merge_download_stats(self.download, stated.get("download"))
        if stated.get("spotter") is not None:
            self._spotters[name_machine(stated["spotter"])] += 1
        for name, version in stated.get("versions", {}).items():
            self.versions.setdefault(name, collections.Counter())[version] += 1
        if "damaged" in stated:
            self._num_damaged += 1
            self._damaged = [*self._damaged, stated["damaged"]][:_MAX_DAMAGED]

    def warnings(self) -> list[str]:
        """Warnings that a person should read before the pairs are used."""
        found = [
            f"shards were made with unlike versions of {name}: "
            + ", ".join(f"{v} ({count:,} shards)" for v, count in sorted(of_version.items()))
            for name, of_version in sorted(self.versions.items())
            if len(of_version) > 1
        ]
        if self._damaged:
            found.append(
                f"{self._num_damaged:,} archives are damaged, and only the pairs before the damage "
                f"are here, such as those of {self._damaged[0]}"
            )
        return [*filter(None, [warn_of_machines(self._spotters)]), *found]


def _warn_of_failed(failed: Sequence[Mapping[str, str]]) -> list[str]:
    if not failed:
        return []
    return [
        f"{len(failed):,} input shards failed, and nothing of them is here, such as "
        f"{failed[0]['source']}: {failed[0]['error']}"
    ]


def _warn_of_names(funnel: Funnel, words: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A warning where captions are names, of which CAT keeps next to nothing."""
    dropped_at = funnel.dropped()
    dropped = sum(dropped_at["caption"].values())
    earlier = itertools.takewhile(lambda stage: stage != "caption", dropped_at)
    arrived = funnel.read - sum(sum(dropped_at[stage].values()) for stage in earlier)
    short = sum(n for of_side in words.values() for w, n in of_side.items() if int(w) < _NAME_WORDS)
    if funnel.kept > _FEW * arrived or min(dropped, short) <= arrived / 2:
        return []
    return [
        f"{short:,} of {arrived:,} captions have fewer than {_NAME_WORDS} words, as "
        "names of classes have, and the rules for captions are made for the sentences of the web: "
        "--config prep/convert is for names, and keeps every pair whose picture can be read"
    ]


def _read_all(outputs: Sequence[str]) -> Iterator[tuple[list, dict, dict, bytes]]:
    """Decisions, statistics, times and samples of each part, in order."""
    yield from files.map_many(_read_part, outputs, outputs[0] if outputs else "")


def _read_part(output: str) -> tuple[list[pyarrow.RecordBatch], dict, dict, bytes]:
    batches = list(read_decisions(decisions_path(output), list(COLUMNS)))
    path = output + shards.STATS_SUFFIX
    stats = shards.read_json(path)
    if stats.get("output", {}).get("file") != os.path.basename(output):
        raise ValueError(f"{path}: of something else; delete it, and run the filter again")
    seconds = files.read_object(output + SECONDS_SUFFIX) or {}
    return batches, stats, seconds, read_samples(output + SAMPLES_SUFFIX)


def _throughput(funnel: Funnel, seconds: Mapping[str, float]) -> dict[str, float]:
    """Pairs per second of processor time, in all and by stage; stages count what they did."""
    dropped = {stage: sum(found.values()) for stage, found in funnel.dropped().items()}
    arrived = funnel.read - dropped[SOURCE]
    pairs_of = {"writing": funnel.kept}
    for step in ordered_steps():
        pairs_of[step.timer or step.name] = arrived
        arrived -= dropped.get(step.name, 0)
    found = {}
    for name, secs in sorted(seconds.items()):
        stage = name.removeprefix("stage/")
        if name == "cpu_secs" or (stage != name and stage != "loading"):  # once in a process
            pairs = pairs_of.get(stage, funnel.read)
            if secs > 0 and pairs:
                found[stage] = round(pairs / secs, 2)
    return found


def get_funnel(report: Report) -> Funnel:
    """The funnel of a report."""
    return Funnel.from_json(report["counts"])


def samples_by_outcome(report: Report) -> list[tuple[str, list[dict[str, Any]]]]:
    """The samples of each outcome: what was kept first, then the order of the funnel."""
    found = {
        outcome: list(group)
        for outcome, group in itertools.groupby(report["samples"], lambda s: s["outcome"])
    }
    order = [KEPT, *(f"{row['stage']}/{row['reason']}" for row in report["funnel"])]
    return [(name, found[name]) for name in dict.fromkeys(order) if name in found]


def format_samples(report: Report, per_outcome: int) -> str:
    """Some pairs of each outcome for a terminal, a line each: outcome and caption."""
    return "\n".join(
        f"{spell_outcome(outcome):36} {escape(sample['caption'][:_PRINTED_CHARS])}"
        for outcome, found in samples_by_outcome(report)
        for sample in found[:per_outcome]
    )


def read_report(folder: str | os.PathLike[str]) -> Report:
    """Reads `report.json` of a folder.

    Raises:
        ValueError: there is none, or another version's.
    """
    path = files.join(os.fspath(folder), REPORT)
    try:
        report = shards.read_json(path)
        if report["version"] != _VERSION:
            raise ValueError(f"version {report['version']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no report of `python -m data_prep.filter` ({type(error).__name__}: {error}); "
            "run that command on the folder's input once more"
        ) from error
    return report


def merge_reports(folders: Sequence[str | os.PathLike[str]]) -> Report:
    """The report of several finished folders as one; of one folder, what it holds."""
    reports = [read_report(folder) for folder in folders]
    if len(reports) == 1:
        return reports[0]
    outputs: list[str] = []
    for folder, report in zip(folders, reports, strict=True):
        merged = [job["output"] for job in report["jobs"]]  # where this one was merged of others
        for part_of in merged if len(merged) > 1 else [os.fspath(folder)]:
            outputs += _find_outputs(part_of)
    return gather(
        outputs,
        [job for report in reports for job in report["jobs"]],
        samples_per_outcome=reports[0]["samples_per_outcome"],
        report_samples=reports[0]["report_samples"],
        clean_label=reports[0]["clean_label"],
    )


def _find_outputs(folder: str) -> Iterable[str]:
    """The parts, or filtered tables, of a finished folder."""
    for path in find_decisions(folder, "--input")[0]:
        if path.endswith(SUFFIX):
            yield path.removesuffix(SUFFIX)
        else:
            yield files.join(folder, path.rpartition(f"{FOLDER}/")[2].removesuffix(".parquet"))
