"""HTML report of a filter job: funnel, histograms, scores, frequent names, sample pairs.

All data comes from `decisions.report`; the template is `filter.html` of `diht_jax.pages`. This
module also formats the tables for the terminal. If pairs have a label (`label_field` of the
config), the report shows precision and recall of each filter against it. In the demo, for example,
the label names the noise in each pair.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.decisions.log import EXTREMES
from data_prep.decisions.report import (
    BINS,
    DROPPED,
    NAMES,
    REPORT,
    SCORES,
    Funnel,
    Report,
    stage_reasons,
)
from data_prep.decisions.table import KEPT
from data_prep.steps.registry import ordered_steps
from diht_jax.pages.render import bar, render
from diht_jax.storage import files
from diht_jax.terminal import escape, format_table

PAGE = "report.html"

_TITLES = {
    "complexity": "Complexity of the caption",
    "actions": "Actions in the caption",
    "caption_words": "Words of the caption",
    "image_side": "Shorter side of the image, px",
}
_RECALL = "recall: "
_LISTED = 25  # names per list
_SHOWN_SPOTS = 6  # texts below a picture
_LABELS = 10  # labels that fit below a histogram
_MOST_BINS = 40


def write_report(folder: str | os.PathLike[str], report: Report) -> None:
    """Writes the report of one or several jobs to `report.json` and `report.html` in a folder."""
    folder = os.fspath(folder)
    files.write_object(files.join(folder, REPORT), report, with_checksum=True)

    def rate(per_sec: float) -> str:
        return f"{per_sec:,.0f}" if per_sec >= 100 else f"{per_sec:.1f}"

    throughput = dict(report["throughput"])
    seconds, total = report["seconds"], throughput.pop("cpu_secs", 0.0)
    stages = ("reading", *(step.timer or step.name for step in ordered_steps()), "writing")
    rows = [
        [name, rate(throughput[name]), f"{seconds[f'stage/{name}']:,.1f}"]
        for name in stages
        if name in throughput
    ]
    if rows or total:
        rows.append(["all", rate(total), f"{seconds['cpu_secs']:,.1f}"])
    wall_secs = seconds.get("wall_secs", 0.0)
    histograms = report["measures"]["histograms"]
    render(
        "filter.html",
        files.join(folder, PAGE),
        title="What the filter kept",
        report=funnel_data(report),
        num_shards=sum(job["shards"] for job in report["jobs"]),
        throughput=rows,
        wall_secs=wall_secs,
        worker_rate=rate(seconds.get("pairs", 0) / max(wall_secs, 1e-9)),
        plots=[
            (_TITLES[name], *_plot(BINS[name], histograms[name]))
            for name in _TITLES
            if any(histograms[name].values())
        ],
        scores=_score_sections(report),
        names=_names(report["measures"]["names"]),
        outcomes=pairs_to_show(report),
        versions=[f"{name} {' and '.join(sorted(of))}" for name, of in report["versions"].items()],
    )


def funnel_data(report: Report) -> dict[str, Any]:
    """Returns the report, extended by the rows and notes of the macros `funnel` and `noise`."""
    counts, labels = report["counts"], report["measures"]["labels"]
    notes = [describe_spotting(counts["text_spotting"])] if counts["text_spotting"] else []
    if d := report["download"]:
        statuses = ", ".join(f"{name} {count:,}" for name, count in d["status_dict"].items())
        notes.append(
            f"img2dataset before: {d['count']:,} rows, {d['successes']:,} downloaded, "
            f"{d['failed_to_download']:,} failed to download, {d['failed_to_resize']:,} to resize "
            f"({statuses})"
        )
    jobs, rows = [], []
    for job in report["jobs"]:
        text = json.dumps(job["settings"], indent=1, sort_keys=True, ensure_ascii=False)
        jobs.append(job | {"settings_text": text})
    for row in report["funnel"]:
        css = "k" if row["stage"] in ("read", KEPT) else "d"
        rows.append([*_funnel_cells(row), bar(row["share"], 160, css)])
    return report | {
        "jobs": jobs,
        "kept_share": counts["kept"] / max(counts["read"], 1),
        "notes": notes,
        "noise_rows": table_rows(labels, report["clean_label"]) if labels else [],
        "funnel_rows": rows,
    }


def _funnel_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Formats a row of `Funnel.rows` as texts, for the page and the terminal."""
    reason = spell_reason(row["stage"], row["reason"])
    return row["stage"], reason, f"{row['pairs']:,}", f"{100 * row['share']:.1f}%"


def pairs_to_show(report: Report, most: int | None = None) -> list[tuple[str, list[dict]]]:
    """Returns (title, samples) for each outcome, with everything that the page shows of a sample.

    Args:
        report: report from `decisions.report`.
        most: maximum number of samples per outcome; None for all.
    """
    return [
        (spell_outcome(outcome), list(map(_describe, found[:most])))
        for outcome, found in samples_by_outcome(report).items()
        if found
    ]


def samples_by_outcome(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Groups samples by outcome: kept ones first, then in the order of the funnel."""
    found: dict[str, list[dict[str, Any]]] = {KEPT: []}
    for row in report["funnel"]:
        found[f"{row['stage']}/{row['reason']}"] = []
    for sample in report["samples"]:
        found.setdefault(sample["outcome"], []).append(sample)
    return found


def _describe(sample: Mapping[str, Any]) -> dict[str, Any]:
    read = [(text, confidence) for _, text, confidence in sample["spots"] if text is not None]
    described = dict(sample) | {"read": read[:_SHOWN_SPOTS], "became": None}
    if "became" in sample:
        described["became"] = spell_outcome(sample["became"])
    if sample["image"] is not None:
        width, height = sample["size"]
        # Limits the height of tall pictures.
        described["shown_width"] = min(250, round(220 * width / height))
        described["polygons"] = polygons = []
        for box, text, _ in sample["spots"]:  # see `text_spotting.ocr.Box`
            if len(box) == 4:
                left, right, top, bottom = box
                box = (left, top, right, top, right, bottom, left, bottom)
            corners = (f"{x:g},{y:g}" for x, y in zip(box[::2], box[1::2], strict=True))
            polygons.append((" ".join(corners), text is not None and text == sample["match"]))
    return described


def _plot(
    starts: Sequence[float], outcomes: Mapping[str, Mapping[str, int]]
) -> tuple[list[dict[str, Any]], int]:
    """Returns the bins of a histogram, and the highest count.

    Fine bins are merged, so that few remain between the first and the last one with pairs.
    """
    sides = [[outcomes[side].get(str(start), 0) for start in starts] for side in (KEPT, DROPPED)]
    counts, ends = np.array(sides), [*starts[1:], None]
    first, last, size = 0, len(starts) - 1, 1
    if len(starts) > _MOST_BINS:
        filled = np.flatnonzero(counts.any(axis=0)).tolist()
        for size in (1, 2, 5, 10, 20, 50):
            first, last = filled[0] // size, filled[-1] // size
            if last - first < _MOST_BINS:
                break
    for stride in (1, 2, 5):
        if last - first < stride * _LABELS:
            break
    bins, highest = [], 0
    for number in range(first, last + 1):
        own = slice(size * number, size * (number + 1))
        start, end = starts[own][0], ends[own][-1]
        kept, dropped = counts[:, own].sum(axis=1).tolist()
        highest = max(highest, kept + dropped)
        if end is None:
            name = f"{start:g} and more"
        elif isinstance(start, int):
            name = str(start) if end - 1 == start else f"{start} to {end - 1}"
        else:
            name = f"{start:g} to {end:g}"
        label = "" if number % stride else f"{start:g}{'+' if end is None else ''}"
        bins.append({"name": name, "kept": kept, "dropped": dropped, "label": label})
    return bins, highest


def _score_sections(report: Report) -> list[dict[str, Any]]:
    """Returns a section per score: histogram, shares of pairs below some values, both ends."""
    sections = []
    for name, ends in report.get("scored", {}).items():
        outcomes, plot, shares = report["measures"]["histograms"].get(name), None, []
        if outcomes is not None and any(outcomes.values()):
            starts = BINS[name]
            plot = (f"Pairs by {name}", *_plot(starts, outcomes))
            counts = [
                sum(side.get(str(start), 0) for side in outcomes.values()) for start in starts
            ]
            below = np.cumsum([0, *counts]) / sum(counts)
            nearest = [int(np.argmin(abs(below[:-1] - share))) for share in (0.1, 0.5, 0.9)]
            shares = [(starts[i], float(below[i])) for i in dict.fromkeys(nearest)]
        shown = [(end, list(map(_describe, ends[end]))) for end in EXTREMES]
        sections.append({"title": SCORES[name], "plot": plot, "shares": shares, "ends": shown})
    return sections


def _names(names: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[tuple[str, list]]:
    lists = []
    for kind, side in itertools.product(NAMES, (KEPT, DROPPED)):
        order = collections.Counter(names[kind][side]).most_common(_LISTED)
        rows = [
            [name, f"{count:,}", bar(count / order[0][1], 80, "k" if side == KEPT else "d")]
            for name, count in order
        ]
        if rows:
            lists.append((f"{kind}, {side}", rows))
    return lists


def spell_reason(stage: str, reason: str) -> str:
    """Returns a reason as text for people, such as "no words" for "empty" of the caption stage.

    For an unknown reason, underscores become spaces; a phrase with names of fields is unchanged.
    """
    if words := stage_reasons().get(stage, {}).get(reason):
        return words
    return reason if " " in reason else reason.replace("_", " ")


def spell_outcome(outcome: str) -> str:
    """Returns an outcome as text for people: "Kept", or "Dropped, caption: no words"."""
    if outcome == KEPT:
        return "Kept"
    stage, _, reason = outcome.partition("/")
    return f"Dropped, {stage}: {spell_reason(stage, reason)}"


def describe_spotting(counts: Mapping[str, Any]) -> str:
    """Returns a sentence about how pictures were searched for text."""
    text = (
        f"text-spotting: {counts.get('read', 0):,} pictures read, "
        f"{counts.get('gated', 0):,} without a trace of text at the first look, "
        f"{counts.get('no_run', 0):,} with captions that no spotter reads"
    )
    if audited := counts.get("audited", 0):
        missed = counts.get("missed", 0)
        text += f"; audit of the first look: {missed:,} of {audited:,} showed the caption"
    return text


def format_funnel(
    rows: Sequence[Mapping[str, Any]], text_spotting: Mapping[str, int] | None = None
) -> str:
    """Formats the rows of `Funnel.rows` as a table, with a line about text-spotting."""
    header = ("stage", "reason", "pairs", "share")
    table = format_table(header, list(map(_funnel_cells, rows)), "llrr", rule=False)
    return f"{table}\n{describe_spotting(text_spotting)}" if text_spotting else table


def table_rows(labels: Mapping[str, Mapping[str, int]], clean_label: str) -> list[list[str]]:
    """Scores each filter that dropped pairs, in order, and all filters together.

    Args:
        labels: outcome -> label -> pairs, as in the measures of a report.
        clean_label: label of good pairs; all other labels are noise, listed by frequency.

    Returns:
        A header, and for each filter: its name, the number of dropped pairs, the share of noise
        among them (precision), and for each label the share dropped of the pairs that reached the
        filter (recall), or "-" if none did.
    """
    total: collections.Counter[str] = collections.Counter()
    for counts in labels.values():
        total.update(counts)
    kinds = [label for label, _ in total.most_common() if label != clean_label]
    spelled = [label.replace("_", " ") for label in (*kinds, clean_label)]
    header = ["filter", "drops", "precision", *(f"{_RECALL}{word}" for word in spelled[:-1])]
    rows = [[*header, f"{spelled[-1]} lost"]]

    def score(name: str, dropped: Mapping[str, int], arrived: Mapping[str, int]) -> None:
        drops = sum(dropped.values())
        noise = drops - dropped.get(clean_label, 0)
        shares = [noise / drops if drops else 0.0]
        for label in (*kinds, clean_label):
            shares.append(dropped.get(label, 0) / arrived[label] if arrived[label] else math.nan)
        cells = ["-" if math.isnan(share) else f"{100 * share:.1f}%" for share in shares]
        rows.append([name, f"{drops:,}", *cells])

    arrived = total.copy()
    outcomes = (outcome.partition("/") for outcome in labels)
    met = Funnel({(stage, reason): 1 for stage, _, reason in outcomes})
    for row in met.rows()[1:-1]:
        stage, reason = row["stage"], row["reason"]
        name = spell_reason(stage, reason)
        if name[:2] not in ("C:", "A:", "T:"):  # the paper's filters have letters
            name = f"{stage}: {name}"
        dropped = labels[f"{stage}/{reason}"]
        score(name, dropped, arrived)
        arrived.subtract(dropped)
    dropped = total.copy()
    dropped.subtract(labels.get(KEPT, {}))
    score("all filters", dropped, total)
    return rows


def format_noise_table(labels: Mapping[str, Mapping[str, int]], clean_label: str) -> str:
    """Formats the table of `table_rows` for the terminal."""
    header, *rows = [[escape(cell) for cell in row] for row in table_rows(labels, clean_label)]
    header = [cell.removeprefix(_RECALL) for cell in header]
    title = "against known noise; under each kind of it the recall, of the pairs that came so far:"
    return f"{title}\n{format_table(header, rows, 'l'.ljust(len(header), 'r'), rule=False)}"
