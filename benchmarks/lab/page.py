"""Writes the pages of the report: advice, claims, tables, figures, and a list of missing runs.

    python -m benchmarks.lab.page

Uses only result files that match the current definitions of the experiments. Files of an earlier
definition are only counted.
"""

from __future__ import annotations

import collections
import pathlib
import re
import statistics
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks.lab import figures
from benchmarks.lab.experiments import (
    AMOUNT,
    BLOCKS,
    CURVE_SAMPLES,
    CUT_SIZES,
    EXPERIMENTS,
    FEW_SHOTS,
    GRIDS,
    SHOTS,
    STUDENTS,
    block_of,
    key_of,
    metrics_of,
    runs_of,
)
from benchmarks.lab.prose import ENDING, INTRODUCTION, METHOD, NOTES, SCOPE, SWITCHES
from benchmarks.lab.statistics import LEVEL, NUM_RESAMPLES, WAITING, Estimate
from benchmarks.lab.verdicts import FIRST, SECOND, Row, describe, judge, read_results
from benchmarks.record import RESULTS
from diht_jax import command_line
from diht_jax.storage.files import write_bytes

_DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
# Page -> (title, its blocks).
PAGES = {
    "drawn": ("Webs drawn anew", ("drawn",)),
    "filter": ("Filter and captions", ("filter", "noise", "captions", "captioning", "long_texts")),
    "second_web": ("A second web, and amounts", ("second_web", "amount")),
    "clipart": ("Real titles", ("clipart",)),
    "hard_negatives": (
        "Hard negatives and batches",
        ("hard_negatives", "batch", "composition", "concepts", "rates"),
    ),
    "wrong_captions": ("Wrong and equal captions", ("emoji", "equal_captions")),
    "distillation": ("Teachers", ("distillation", "photos", "affinity")),
    "students": (
        "Students",
        ("few_shot", "few_shot_k", "fine_tuning", "optimizer", "sizes", "order", "grid", "b32"),
    ),
}
# Further metrics in the tables of a student, next to the primary one.
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
    "amount": {
        f"scenes_{samples}/r10": f"R@10 after {samples:,} samples" for samples in CURVE_SAMPLES
    },
    "unseen_k": {
        f"{method}_{k}": f"{name}, {k}"
        for k in FEW_SHOTS
        for method, name in (("prompts", "from the prompts"), ("scratch", "scratch"))
        if (method, k) != ("prompts", 1)
    },
    "concepts": {"validation/r10": "R@10, validation artist"},
    "emoji": {"emoji/t2i_r1": "text to image R@1", "emoji/i2t_r1": "image to text R@1"},
}
_NAMES = {
    "composition/swaps": "swaps",
    "scenes/r10": "R@10, scenes",
    "long/r10": "R@10, long texts",
    "emoji/r10": "R@10, emoji",
    "clipart/r10": "R@10, clip art",
    "concepts/r10": "R@10, unseen concepts",
    "prompts_1": "from the prompts, 1",
    "cifar10/top1": "top-1",
    **{metric: name for beside in _BESIDE.values() for metric, name in beside.items()
       if metric != "scenes/r10"},
}  # fmt: skip
_METHODS = {"prompts": "from the prompts", "penalty": "with an L2 penalty", "scratch": "scratch"}
_MOST_GRID_ROWS = 18


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("results", str(RESULTS / "lab"), "Folder of the result files.")
    flags.DEFINE_string("output", str(_DOCS / "experiments"), "Folder of the pages and figures.")


def main() -> None:
    """Reads the results, and writes the pages and figures."""
    results = read_results(pathlib.Path(flags.FLAGS.results))
    folder = pathlib.Path(flags.FLAGS.output)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = judge(results)
    for block in BLOCKS:
        figure = images / f"{block}.svg"
        drawn = [
            (row.contrast, row.found, row.label)
            for row in rows
            if row.contrast.block == block and row.found is not None
        ]
        figure.unlink(missing_ok=True)
        if drawn:
            text = figures.draw_contrasts(drawn, f"Contrasts: {BLOCKS[block][0]}")
            write_bytes(figure, text.encode())
    outdated = sum(1 for _ in pathlib.Path(flags.FLAGS.results).glob("*.json")) - len(results)
    if curves := find_curves(results):
        write_bytes(images / "amount_curves.svg", figures.draw_curves(curves).encode())
    for name, text in format_pages(rows, results, outdated).items():
        write_bytes(folder / name, text.encode())
    print(f"{folder}: {len(results)} runs")


def find_curves(results: dict[str, dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Returns (samples seen, mean R@10) by name, for each arm of `amount` that has runs."""
    curves = {}
    for experiment in AMOUNT:
        metrics = [
            r["metrics"] for r in results.values() if r["experiment"]["name"] == experiment.name
        ]
        if metrics:
            total = STUDENTS[experiment.student].config["total_examples"]
            points = {samples: f"scenes_{samples}/r10" for samples in CURVE_SAMPLES}
            points[total] = "scenes/r10"
            curves[experiment.name] = [
                (samples, statistics.fmean(each[metric] for each in metrics))
                for samples, metric in points.items()
            ]
    return curves


def format_pages(
    rows: Sequence[Row], results: dict[str, dict[str, Any]], outdated: int
) -> dict[str, str]:
    """Returns the pages as Markdown, by file name."""
    method = [METHOD, _format_missing(results), ENDING]
    pages = {"index.md": _format_index(rows, results, outdated), "method.md": "\n".join(method)}
    described = describe(results)
    for name, (title, blocks) in PAGES.items():
        parts = [f"# {title}\n\n[How the differences are measured](method.md).\n"]
        parts += [_format_block(block, rows, described, results) for block in blocks]
        pages[f"{name}.md"] = "\n".join(parts)
    return {name: text.rstrip("\n") + "\n" for name, text in pages.items()}


def _format_index(rows: Sequence[Row], results: dict[str, dict[str, Any]], outdated: int) -> str:
    planned = sum(e.seeds for e in EXPERIMENTS.values() if block_of(e.name) not in GRIDS)
    made = sum(block_of(r["experiment"]["name"]) not in GRIDS for r in results.values())
    parts = [
        INTRODUCTION,
        _format_switches([*rows, *describe(results)]),
        SCOPE,
        "## Primary claims\n",
        _format_claims([row for row in rows if row.rank == FIRST]),
        "## Secondary claims\n",
        _format_claims([row for row in rows if row.rank == SECOND]),
        "## All contrasts\n",
        f"{made} of {planned} runs are made."
        + (f" {outdated} result files are of an earlier definition." if outdated else "")
        + "\n",
        "| page | contrasts |\n|---|---|",
    ]
    for block in (block for _, blocks in PAGES.values() for block in blocks):
        inside = [row for row in rows if row.contrast.block == block]
        parts.append(f"| {_link(block)} | {_count_labels(inside) if inside else 'none'} |")
    return "\n".join([*parts, ""])


def _format_switches(rows: Sequence[Row]) -> str:
    """Formats the table of settings, each with its effect, strongest control and limits."""
    by_key = {key_of(row.contrast): row for row in rows}

    def effects(named: Sequence[tuple[str, tuple[str, ...]]]) -> str:
        return "; ".join(f"{name}: {_effect(by_key[key])}" for name, key in named) or "none"

    lines = [
        "| switch | effect, in points | runs | holds for | strongest control | elsewhere "
        "| advice |",
        "|---|---|---|---|---|---|---|",
    ]
    for switch in SWITCHES:
        row = by_key[switch.effect]
        lines.append(
            f"| {switch.name} | {_effect(row)} | {row.runs[0]} and {row.runs[1]} "
            f"| {switch.holds_for} | {effects(switch.control)} | {effects(switch.elsewhere)} "
            f"| {switch.advice} |"
        )
    return "\n".join([*lines, ""])


def _effect(row: Row) -> str:
    return f"{_points(row.found.mean)} ({_interval(row.found)})" if row.found else WAITING


def _format_claims(rows: Sequence[Row]) -> str:
    """Formats contrasts as a table; primary ones have Holm's p, bounded by the resamples."""
    corrected = any(row.rank == FIRST for row in rows)
    least = 2 * len(rows) / (NUM_RESAMPLES + 1)
    lines = [
        "| claim | difference | 95% interval | margin | runs, treated and control |"
        + (" Holm's p |" if corrected else "")
        + " result |",
        "|---|---|---|---|---|---|" + ("---|" if corrected else ""),
    ]
    for row in sorted(rows, key=lambda row: list(BLOCKS).index(row.contrast.block)):
        contrast = row.contrast
        p, result = "", row.label
        if row.corrected is not None:
            p = f"{'≤ ' if row.corrected <= least else ''}{row.corrected:.2g}"
            if row.corrected > 1 - LEVEL and (row.found.low > 0 or row.found.high < 0):
                result += ", not after correction"
        lines.append(
            f"| {_link(contrast.block)}: {contrast.claim} "
            f"| {_points(row.found.mean) if row.found else ''} "
            f"| {_interval(row.found) if row.found else ''} | {100 * contrast.margin:.1f} "
            f"| {_runs(row)} |" + (f" {p} |" if corrected else "") + f" {result} |"
        )
    return "\n".join([*lines, ""])


def _runs(row: Row) -> str:
    """Formats the runs of both arms, and the planned numbers if some are missing."""
    made, wanted = (
        f"{treated} and {control}" for treated, control in (row.runs, runs_of(row.contrast))
    )
    return made if made == wanted else f"{made} of {wanted}"


def _count_labels(rows: Sequence[Row]) -> str:
    counts = collections.Counter(row.label for row in rows)
    return ", ".join(f"{count} {label}" for label, count in counts.most_common())


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
    if block in NOTES:
        lines += [NOTES[block], ""]
    lines += [f"`python -m benchmarks.lab.run --only {block}`{_describe_files(files)}", ""]
    if any(row.found for row in inside):
        lines += [f"![contrasts: {title}](images/{block}.svg)", ""]
    if block == "amount" and files:
        lines += ["![R@10 over samples seen, by amount and filter](images/amount_curves.svg)", ""]
    if block == "few_shot":
        lines += _format_shots(files)
    elif files:
        lines += _format_experiments(block, names, files)
    if inside:
        lines += [
            "| contrast | metric | means | difference | 95% interval | margin | runs | result |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [_format_contrast(row) for row in inside]
    if beside:
        lines += ["", "Looked at afterwards:", ""]
        lines += ["| contrast | metric | means | difference | 95% interval | what it is |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [f"{_describe_contrast(row)} {row.contrast.claim} |" for row in beside]
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
                # Sorts grids: rates by the validation artist, others by their primary metric.
                chosen = values[-1] if block == "rates" else values[0]
                table.append((statistics.fmean(chosen), name, len(found), values))
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
    margin = f"{100 * row.contrast.margin:.1f}"
    return f"{_describe_contrast(row)} {margin} | {_runs(row)} | {row.label} |"


def _describe_contrast(row: Row) -> str:
    contrast, found = row.contrast, row.found
    names = f"`{contrast.treated}` − `{contrast.control}`"
    metrics = " − ".join(dict.fromkeys(_NAMES.get(m, f"`{m}`") for m in metrics_of(contrast)))
    if contrast.treated == contrast.control:
        names = f"`{contrast.treated}`"
    means = " − ".join(f"{100 * mean:.1f}" for mean in row.means)
    return (
        f"| {names} | {metrics} | {means} | {_points(found.mean) if found else ''} "
        f"| {_interval(found) if found else ''} |"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _interval(found: Estimate) -> str:
    return f"{_points(found.low)} to {_points(found.high)}"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}%{spread}"


def _link(block: str) -> str:
    page, inside = next((name, b) for name, (_, b) in PAGES.items() if block in b)
    title = BLOCKS[block][0]
    anchor = "#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    return f"[{title}]({page}.md{anchor if len(inside) > 1 else ''})"


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
