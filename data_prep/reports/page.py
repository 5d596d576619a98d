"""`report.html` of a filter job: the funnel, histograms, frequent names, and pairs to look at.

Everything that the page shows comes from `summary`. A page is one file without links to others; its
frame, its style and the parts that other pages share are in `html`.
"""

from __future__ import annotations

import html
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.jobs import shards
from data_prep.reports.funnel import KEPT, spell_outcome, spell_reason
from data_prep.reports.html import render_bar, render_page, render_table
from data_prep.reports.noise_scores import table_rows
from data_prep.reports.statistics import BINS, DROPPED, NAMES, TITLES
from data_prep.reports.summary import REPORT, FilterReport
from data_prep.steps.registry import ordered_steps
from data_prep.text_spotting.config import describe_counts
from diht_jax.storage import files

PAGE = "report.html"

_LISTED = 25  # names of each list
_SHOWN_SPOTS = 6  # texts under a picture
_PLOT = (400, 120)  # px of a histogram's bars
_LABELS = 9  # bins of which each has its label

PAGE_STYLE = """
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr));
         gap: 20px 40px; }
.plots svg, .plots figcaption { width: 100%; overflow: visible; } figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 4px; }
.k { background: #0969da; fill: #0969da; } .d { background: #d4a72c; fill: #d4a72c; }
.plots text { font: 11px system-ui, sans-serif; fill: #656d76; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 4px 0 12px; }
.picture { position: relative; max-width: 250px; }
.picture img { display: block; width: 100%; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.picture polygon { fill: none; stroke: #bf8700; stroke-width: 1.5; }
.picture polygon.m { stroke: #cf222e; stroke-width: 2.5; }
.graph { font: 12px/1.4 ui-monospace, monospace; } .m { color: #cf222e; font-weight: 600; }
p, summary { overflow-wrap: anywhere; }
.card .note { font-size: 12px; } .warning { color: #cf222e; }
pre { font-size: 12px; overflow-x: auto; background: #f6f8fa; padding: 10px; }
details { margin-top: 24px; } summary { cursor: pointer; }
"""


def write_report(folder: str | os.PathLike[str], report: FilterReport) -> None:
    """Writes `report.json` and `report.html` into a folder."""
    folder = os.fspath(folder)
    shards.write_json(files.join(folder, REPORT), report.to_json())
    files.write_bytes(files.join(folder, PAGE), render_report(report).encode("utf-8", "replace"))


def render_report(report: FilterReport) -> str:
    """The page, as text.

    Args:
        report: of one job, or merged of several.
    """
    inputs = "; ".join(html.escape(str(job["input"])) for job in report.jobs)
    count = sum(job["shards"] for job in report.jobs)
    funnel = report.funnel
    parts = [
        f"<h1>What the filter kept</h1><p>{funnel.kept:,} of {funnel.read:,} pairs "
        f"({100 * report.share(funnel.kept):.1f}%) of {count:,} input "
        f"{'shard' if count == 1 else 'shards'}: {inputs}.</p>",
        f"<h2>Funnel</h2>{render_funnel(report)}",
        render_noise(report),
        f"<h2>Throughput</h2>{_throughput(report)}",
        _histograms(report),
        _names(report),
        _samples(report),
        _versions(report),
        *(_settings(job) for job in report.jobs),
    ]
    return render_page("What the filter kept", parts, PAGE_STYLE)


def render_funnel(report: FilterReport) -> str:
    """The counts of every outcome with their bars, and the notes on them."""
    rows = []
    for stage, reason, pairs in report.funnel.rows():
        share = report.share(pairs)
        css = "k" if stage in ("read", KEPT) else "d"
        rows.append(
            [
                stage,
                html.escape(spell_reason(stage, reason)),
                f"{pairs:,}",
                f"{100 * share:.1f}%",
                render_bar(share, 160, css),
            ]
        )
    table = render_table(["stage", "reason", "pairs", "share", ""], rows, texts=2, bars=1)
    notes = []
    if report.funnel.text_spotting:
        notes.append(describe_counts(report.funnel.text_spotting))
    if report.download:
        d = report.download
        statuses = ", ".join(f"{name} {count:,}" for name, count in d["status_dict"].items())
        notes.append(
            f"img2dataset before: {d['count']:,} rows, {d['successes']:,} downloaded, "
            f"{d['failed_to_download']:,} failed to download, {d['failed_to_resize']:,} to resize "
            f"({statuses})"
        )
    text = "".join(f"<p class=note>{html.escape(note)}.</p>" for note in notes)
    text += "".join(f"<p class=warning>{html.escape(note)}.</p>" for note in report.warnings())
    return f'<div class="wide">{table}</div>{text}'


def render_noise(report: FilterReport) -> str:
    """Precision and recall of each step where the noise is known; else nothing."""
    if not report.measures.labels:
        return ""
    header, *rows = (
        [html.escape(cell) for cell in row]
        for row in table_rows(report.measures.labels, report.clean_label)
    )
    return (
        f'<h2>Against known noise</h2><div class="wide">{render_table(header, rows)}</div>'
        "<p class=note>Precision: share of noise among the pairs that a filter dropped. Recall: "
        "share of a kind of noise that it dropped, of the pairs that came to it.</p>"
    )


def _throughput(report: FilterReport) -> str:
    rates = report.throughput()
    if not rates:
        return "<p class=note>The time was not kept.</p>"
    seconds = report.seconds
    total = rates.pop("cpu_secs", 0.0)
    rows = [
        [name, _rate(rates[name]), f"{seconds[f'stage/{name}']:,.1f}"]
        for name in ("reading", *(step.timer or step.name for step in ordered_steps()), "writing")
        if name in rates
    ]
    rows.append(["all", _rate(total), f"{seconds['cpu_secs']:,.1f}"])
    table = render_table(["stage", "pairs/s of a core", "core seconds"], rows)
    wall = seconds["wall_secs"]
    rate = _rate(seconds["pairs"] / max(wall, 1e-9))
    return (
        f"{table}<p class=note>Each stage by the pairs that came to it. The workers were at work "
        f"for {wall:,.1f} s together, {rate} pairs/s of a worker.</p>"
    )


def _rate(per_sec: float) -> str:
    return f"{per_sec:,.0f}" if per_sec >= 100 else f"{per_sec:.1f}"


def _histograms(report: FilterReport) -> str:
    plots = [
        _plot(TITLES[name], BINS[name], report.measures.histograms[name])
        for name in BINS
        if any(report.measures.histograms[name].values())
    ]
    if not plots:
        return ""
    return (
        '<h2>Histograms<span class="key k"></span><small>kept</small><span class="key d"></span>'
        f'<small>dropped</small></h2><div class="plots">{"".join(plots)}</div>'
        "<p class=note>A caption that a gate refused has no graph, and an image that no stage came "
        "to has no size.</p>"
    )


def _plot(title: str, starts: Sequence[int], outcomes: Mapping[str, Mapping[int, int]]) -> str:
    width, height = _PLOT
    kept = [outcomes[KEPT].get(start, 0) for start in starts]
    dropped = [outcomes[DROPPED].get(start, 0) for start in starts]
    most = max(k + d for k, d in zip(kept, dropped, strict=True))
    step = width / len(starts)
    marks = []
    for i, (start, k, d) in enumerate(zip(starts, kept, dropped, strict=True)):
        x, base = i * step + 1, height + 16
        label = _bin_label(starts, i)
        hover = f"<title>{label}: {k:,} kept, {d:,} dropped</title>"
        for css, count in (("k", k), ("d", d)):
            tall = height * count / most
            base -= tall
            marks.append(
                f'<rect class="{css}" x="{x:.1f}" y="{base:.1f}" width="{step - 2:.1f}" '
                f'height="{tall:.1f}">{hover}</rect>'
            )
        is_last = i + 1 == len(starts)
        # The last one ends with its bar, since the widest would stick out beyond it.
        at, anchor = (width - 1, "end") if is_last else (x + step / 2 - 1, "middle")
        if len(starts) <= _LABELS or i % 2 == 0 or is_last:
            text = f"{start}+" if is_last else start
            marks.append(
                f'<text x="{at:.1f}" y="{height + 30}" text-anchor="{anchor}">{text}</text>'
            )
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {width} {height + 36}">'
        f'<text x="0" y="10">{most:,}</text>{"".join(marks)}'
        f'<line x1="0" x2="{width}" y1="{height + 16}" y2="{height + 16}" stroke="#d0d7de"/>'
        "</svg></figure>"
    )


def _bin_label(starts: Sequence[int], i: int) -> str:
    if i + 1 == len(starts):
        return f"{starts[i]} and more"
    last = starts[i + 1] - 1
    return str(starts[i]) if last == starts[i] else f"{starts[i]} to {last}"


def _names(report: FilterReport) -> str:
    lists, missed = [], 0
    for kind, outcome in itertools.product(NAMES, (KEPT, DROPPED)):
        found = report.measures.most_common(kind, outcome, _LISTED)
        missed = max(missed, report.measures.missed[kind][outcome])
        if found:
            css = "k" if outcome == KEPT else "d"
            rows = [
                [html.escape(name), f"{count:,}", render_bar(count / found[0][1], 80, css)]
                for name, count in found
            ]
            lists.append(f"<div><h3>{kind}, {outcome}</h3>{render_table([], rows, bars=1)}</div>")
    if not lists:
        return ""
    error = f" Counts may be too low, by {missed:,} at most." if missed else ""
    return (
        "<h2>Most frequent actions and objects</h2><p class=note>Pairs whose first caption names "
        f'them.{error}</p><div class="columns">{"".join(lists)}</div>'
    )


def _samples(report: FilterReport) -> str:
    sections = [
        f"<h3>{html.escape(spell_outcome(outcome))}</h3>"
        f'<div class="images">{"".join(map(render_card, samples))}</div>'
        for outcome, samples in report.samples_by_outcome()
    ]
    if not sections:
        return ""
    return (
        "<h2>Pairs to look at</h2><p class=note>Random pairs of every outcome, with the graph of "
        "the first caption. Boxes: spotted text; <span class=m>red</span>: the line that repeats "
        f"the caption.</p>{''.join(sections)}"
    )


def render_card(sample: Mapping[str, Any]) -> str:
    """A pair to look at: picture, caption, graph of the caption, and what was spotted."""
    parts = [_picture(sample), f"<p>{html.escape(sample['caption']) or '<i>no caption</i>'}</p>"]
    if "evidence" in sample:
        parts.append(f'<p class="m">{html.escape(sample["evidence"])}</p>')
    graph = sample["graph"]
    if graph:
        lines = [
            f"{name}: {graph[name]}"
            for name in ("objects", "actions", "relations")
            if graph[name] != "-"
        ]
        text = "<br>".join(map(html.escape, [*lines, f"complexity: {graph['complexity']}"]))
        parts.append(f'<p class="graph">{text}</p>')
    read = [(text, confidence) for _, text, confidence in sample["spots"] if text is not None]
    if read:
        shown = ", ".join(
            f"<span{_mark(text, sample)}>{html.escape(text)}</span> {confidence:.2f}"
            for text, confidence in read[:_SHOWN_SPOTS]
        )
        parts.append(f'<p class="note">spotted: {shown}</p>')
    parts.append(f'<p class="note">{html.escape(sample["key"])}</p>')
    return f'<div class="card">{"".join(parts)}</div>'


def _picture(sample: Mapping[str, Any]) -> str:
    if sample["image"] is None:
        return f"<p><i>picture: {html.escape(sample['error'])}</i></p>" if sample["error"] else ""
    width, height = sample["size"]
    polygons = "".join(
        f'<polygon points="{_corners(box)}" vector-effect="non-scaling-stroke"'
        f"{_mark(text, sample)}/>"
        for box, text, _ in sample["spots"]
    )
    # Narrow enough for the height of a tall picture to stay in bounds.
    shown = min(250, round(220 * width / height))
    return (
        f'<div class="picture" style="width:{shown}px">'
        f'<img src="data:image/jpeg;base64,{sample["image"]}" alt="{html.escape(sample["key"])}">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{polygons}</svg></div>'
    )


def _mark(text: str | None, sample: Mapping[str, Any]) -> str:
    """An attribute for the line that repeats the caption."""
    return ' class="m"' if text is not None and text == sample["match"] else ""


def _corners(box: Sequence[float]) -> str:
    """Of a box of `text_spotting.ocr`: x_min, x_max, y_min, y_max, or four points."""
    if len(box) == 4:
        left, right, top, bottom = box
        box = (left, top, right, top, right, bottom, left, bottom)
    return " ".join(f"{x:g},{y:g}" for x, y in zip(box[::2], box[1::2], strict=True))


def _versions(report: FilterReport) -> str:
    """The packages that took part; those of shards from before they were recorded are unknown."""
    found = [f"{name} {' and '.join(of)}" for name, of in report.versions_json().items()]
    return f"<p class=note>Made with {html.escape(', '.join(found))}.</p>" if found else ""


def _settings(job: Mapping[str, Any]) -> str:
    text = json.dumps(job["settings"], indent=1, sort_keys=True, ensure_ascii=False)
    return (
        f"<details><summary>Settings of {html.escape(str(job['input']))} (hash "
        f"{html.escape(str(job['config_hash']))})</summary><pre>{html.escape(text)}</pre></details>"
    )
