"""Writes the pages of the report: verdicts, tables, figures, and which runs are missing.

    python -m benchmarks.lab.page

Everything comes from the result files that belong to today's experiments; files of an earlier
definition are counted, and not used.
"""

from __future__ import annotations

import collections
import math
import pathlib
import re
import statistics
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks.lab import figures
from benchmarks.lab.experiments import (
    BLOCKS,
    CUT_SIZES,
    EXPERIMENTS,
    GAIN,
    GRIDS,
    SHOTS,
    STUDENTS,
    Contrast,
    block_of,
    metrics_of,
    seeds_of,
)
from benchmarks.lab.prose import ENDING, INTRODUCTION, NOTES
from benchmarks.lab.statistics import CONFIRMED, WAITING, Estimate
from benchmarks.lab.verdicts import Row, describe, judge, read_results
from benchmarks.record import RESULTS
from diht_jax import command_line
from diht_jax.storage.files import write_bytes

_DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
# Page -> (title, its blocks).
PAGES = {
    "filter": ("Filter and captions", ("filter", "noise", "captions", "captioning", "long_texts")),
    "hard_negatives": ("Hard negatives and batches", ("hard_negatives", "batch", "composition")),
    "wrong_captions": ("Wrong and equal captions", ("emoji", "equal_captions")),
    "distillation": ("Teachers", ("distillation", "affinity")),
    "students": (
        "Students",
        ("few_shot", "fine_tuning", "optimizer", "sizes", "order", "grid", "b32"),
    ),
}
# Metrics that stand beside the primary one, by student.
_BESIDE = {
    "web": {
        "scenes/t2i_r1": "text to image R@1",
        "scenes/i2t_r1": "image to text R@1",
        "color/top1": "colours",
        "shape/top1": "shapes",
    },
    "composition": {
        "composition/swap_color": "colours swapped",
        "composition/swap_shape": "shapes swapped",
        "composition/swap_objects": "objects swapped",
        "composition/replacements": "colour or shape replaced",
    },
    "long": {"scenes/r10": "R@10, short texts"},
    "averaged": {
        "averaged_scenes/r10": "R@10, scenes, mean with the start",
        "cifar10/top1": "top-1",
        "averaged_cifar10/top1": "top-1, mean with the start",
    },
    "sizes": {f"scenes_{size}/r10": f"R@10, first {size} numbers" for size in CUT_SIZES},
    "emoji": {"emoji/t2i_r1": "text to image R@1", "emoji/i2t_r1": "image to text R@1"},
}
_NAMES = {
    "composition/swaps": "swaps",
    "scenes/r10": "R@10, scenes",
    "long/r10": "R@10, long texts",
    "emoji/r10": "R@10, emoji",
    "cifar10/top1": "top-1",
    **{metric: name for beside in _BESIDE.values() for metric, name in beside.items()
       if metric != "scenes/r10"},
}  # fmt: skip
_METHODS = {"prompts": "from the prompts", "penalty": "with an L2 penalty", "scratch": "scratch"}
_MOST_GRID_ROWS = 10


def define_flags() -> None:
    """The command line of `main`."""
    flags.DEFINE_string("results", str(RESULTS / "lab"), "Folder of the result files.")
    flags.DEFINE_string("output", str(_DOCS / "experiments"), "Folder of the pages and figures.")


def main() -> None:
    """Reads the results, writes pages and figures."""
    results = read_results(pathlib.Path(flags.FLAGS.results))
    folder = pathlib.Path(flags.FLAGS.output)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = judge(results)
    for block in BLOCKS:
        figure = images / f"{block}.svg"
        drawn = [
            (row.contrast, row.found, row.verdict)
            for row in rows
            if row.contrast.block == block and row.found is not None
        ]
        figure.unlink(missing_ok=True)
        if drawn:
            text = figures.draw_contrasts(drawn, f"Contrasts: {BLOCKS[block][0]}")
            write_bytes(figure, text.encode())
    outdated = sum(1 for _ in pathlib.Path(flags.FLAGS.results).glob("*.json")) - len(results)
    for name, text in format_pages(rows, results, outdated).items():
        write_bytes(folder / name, text.encode())
    print(f"{folder}: {len(results)} runs")


def format_pages(
    rows: Sequence[Row], results: dict[str, dict[str, Any]], outdated: int
) -> dict[str, str]:
    """The pages as Markdown, by the names of their files."""
    pages = {"index.md": _format_index(rows, results, outdated)}
    described = describe(results)
    for name, (title, blocks) in PAGES.items():
        parts = [f"# {title}\n\n[How the differences are measured](index.md).\n"]
        parts += [_format_verdicts([row for row in rows if row.contrast.block in blocks])]
        parts += [_format_block(block, rows, described, results) for block in blocks]
        pages[f"{name}.md"] = "\n".join(parts)
    return pages


def _format_index(rows: Sequence[Row], results: dict[str, dict[str, Any]], outdated: int) -> str:
    planned = sum(e.seeds for e in EXPERIMENTS.values() if block_of(e.name) not in GRIDS)
    made = sum(block_of(r["experiment"]["name"]) not in GRIDS for r in results.values())
    parts = [
        INTRODUCTION.format(count=len(rows)),
        f"## Verdicts\n\n{made} of {planned} runs are made; of {len(rows)} contrasts "
        f"{_count_verdicts(rows)}."
        + (f" {outdated} result files are of an earlier definition." if outdated else "")
        + "\n",
        "| block | contrasts |\n|---|---|",
    ]
    for name, (_, blocks) in PAGES.items():
        for block in blocks:
            inside = [row for row in rows if row.contrast.block == block]
            link = f"[{BLOCKS[block][0]}]({name}.md#{_anchor(block)})"
            parts.append(f"| {link} | {_count_verdicts(inside) if inside else 'none'} |")
    return "\n".join([*parts, "", _format_missing(results), ENDING])


def _format_verdicts(rows: Sequence[Row]) -> str:
    lines = [
        "Gains are in points of the metric.",
        "",
        "| claim | difference | 95% interval | margin | runs | Holm's p | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: list(BLOCKS).index(row.contrast.block)):
        contrast = row.contrast
        lines.append(
            f"| [{BLOCKS[contrast.block][0]}](#{_anchor(contrast.block)}): {contrast.claim} "
            f"| {_points(row.found.mean) if row.found else ''} "
            f"| {_interval(row.found) if row.found else ''} | {_margin(contrast)} "
            f"| {row.seeds} of {seeds_of(contrast)} "
            f"| {'' if row.corrected is None else f'{row.corrected:.2g}'} | {_verdict(row)} |"
        )
    return "\n".join([*lines, ""])


def _verdict(row: Row) -> str:
    if row.verdict == WAITING:
        return "waiting for runs"
    weak = row.verdict == CONFIRMED and not _is_left_by_holm(row)
    return f"**{row.verdict}**" + (", not after Holm" if weak else "")


def _is_left_by_holm(row: Row) -> bool:
    """Whether a confirmed contrast stays so; only what is confirmed is weakened."""
    return row.corrected < 0.05


def _count_verdicts(rows: Sequence[Row]) -> str:
    counts = collections.Counter(row.verdict for row in rows)
    left = sum(row.verdict == CONFIRMED and _is_left_by_holm(row) for row in rows)
    words = [f"{count} {verdict}" for verdict, count in sorted(counts.items())]
    weaker = f" confirmed ({left or 'none'} after Holm's correction)"
    return ", ".join(words).replace(" confirmed", weaker)


def _format_missing(results: dict[str, dict[str, Any]]) -> str:
    lines = ["## Missing runs", ""]
    for block, (title, _) in BLOCKS.items():
        missing = []
        for name, experiment in EXPERIMENTS.items():
            seeds = [i for i in range(experiment.seeds) if f"{name}_seed{i}" not in results]
            if block_of(name) == block and seeds:
                missing.append((name, seeds, experiment.seeds))
        if not missing:
            continue
        total = sum(len(seeds) for _, seeds, _ in missing)
        names = ", ".join(
            f"`{name}`" + ("" if len(seeds) == of else f" (seeds {', '.join(map(str, seeds))})")
            for name, seeds, of in missing
        )
        if block in GRIDS:
            names = "one for each setting"
        lines.append(f"- {title}, {total} runs, `--only {block}`: {names}")
    return "\n".join([*lines, ""])


def _format_block(
    block: str,
    rows: Sequence[Row],
    described: Sequence[Row],
    results: dict[str, dict[str, Any]],
) -> str:
    title, question = BLOCKS[block]
    inside = [row for row in rows if row.contrast.block == block]
    beside = [row for row in described if row.contrast.block == block and row.found]
    used = dict.fromkeys(
        name for row in inside for name in (row.contrast.control, row.contrast.treated)
    )
    names = list(used) or [name for name in EXPERIMENTS if block_of(name) == block]
    files = {n: r for n, r in results.items() if r["experiment"]["name"] in names}
    lines = [f"## {title}", "", question, ""]
    if inside:
        lines += [f"Contrasts: {_count_verdicts(inside)}.", ""]
    if block in NOTES:
        lines += [NOTES[block], ""]
    lines += [f"`python -m benchmarks.lab.run --only {block}`{_describe_files(files)}", ""]
    if any(row.found for row in inside):
        lines += [f"![contrasts: {title}](images/{block}.svg)", ""]
    if block == "few_shot":
        lines += _format_shots(files)
    elif files:
        lines += _format_experiments(block, names, files)
    header = "| contrast | metric | means | difference | t interval | bootstrap |"
    if inside:
        lines += [f"{header} refuted if |", "|---|---|---|---|---|---|---|"]
        lines += [f"{_format_contrast(row)} {row.contrast.refuted_by} |" for row in inside]
    if beside:
        lines += ["", "Looked at afterwards, without a verdict:", "", f"{header} what it is |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [f"{_format_contrast(row)} {row.contrast.claim} |" for row in beside]
    return "\n".join([*lines, ""])


def _describe_files(files: dict[str, dict[str, Any]]) -> str:
    if not files:
        return " has not been run yet."
    return f": {len(files)} runs."


def _format_experiments(
    block: str, names: Sequence[str], files: dict[str, dict[str, Any]]
) -> list[str]:
    lines = []
    for student in dict.fromkeys(EXPERIMENTS[name].student for name in names):
        primary = STUDENTS[student].metric
        columns = {primary: _NAMES.get(primary, primary), **_BESIDE.get(student, {})}
        table = []
        for name in names:
            found = [r for r in files.values() if r["experiment"]["name"] == name]
            if found and EXPERIMENTS[name].student == student:
                values = [[r["metrics"][metric] for r in found] for metric in columns]
                table.append((statistics.fmean(values[0]), name, len(found), values))
        if block in GRIDS:
            table = sorted(table, reverse=True)[:_MOST_GRID_ROWS]
        if table:
            lines += [f"| experiment | runs | {' | '.join(columns.values())} |"]
            lines += ["|" + "---|" * (len(columns) + 2)]
            lines += [
                f"| `{name}` | {count} | {' | '.join(map(_spread, values))} |"
                for _, name, count, values in table
            ]
            lines.append("")
    return lines


def _format_shots(files: dict[str, dict[str, Any]]) -> list[str]:
    if not files:
        return []
    metrics = [result["metrics"] for result in files.values()]
    lines = [
        f"Zero-shot: {_spread([m['zero_shot'] for m in metrics])}.",
        "",
        f"| shots | {' | '.join(_METHODS.values())} |",
        "|---|---|---|---|",
    ]
    for k in SHOTS:
        cells = [_spread([each[f"{method}_{k}"] for each in metrics]) for method in _METHODS]
        lines.append(f"| {k} | {' | '.join(cells)} |")
    return [*lines, ""]


def _format_contrast(row: Row) -> str:
    contrast, found = row.contrast, row.found
    names = f"`{contrast.treated}` − `{contrast.control}`"
    metrics = " − ".join(dict.fromkeys(_NAMES.get(m, f"`{m}`") for m in metrics_of(contrast)))
    if contrast.treated == contrast.control:
        names = f"`{contrast.treated}`"
    means = " − ".join(f"{100 * mean:.1f}" for mean in row.means)
    resampled = ""
    if found and found.resampled:
        resampled = f"{_points(found.resampled[0])} to {_points(found.resampled[1])}"
    return (
        f"| {names} | {metrics} | {means} | {_points(found.mean) if found else ''} "
        f"| {_interval(found) if found else ''} | {resampled} |"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _interval(found: Estimate) -> str:
    if not math.isfinite(found.low):
        return "one run"
    return f"{_points(found.low)} to {_points(found.high)}"


def _margin(contrast: Contrast) -> str:
    return _points(contrast.margin if contrast.kind == GAIN else -contrast.margin)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}%{spread}"


def _anchor(block: str) -> str:
    return re.sub(r"[^\w -]", "", BLOCKS[block][0].lower()).replace(" ", "-")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
