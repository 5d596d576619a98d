"""Writes the report: verdicts, tables, figures, and which runs are missing.

    python -m benchmarks.lab.page

Everything comes from the result files that belong to today's experiments; files of an earlier
definition are counted, and not used.
"""

from __future__ import annotations

import collections
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks.lab import figures
from benchmarks.lab.experiments import (
    BLOCKS,
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
from benchmarks.lab.statistics import CONFIRMED, WAITING, Estimate
from benchmarks.lab.verdicts import Row, judge, read_results
from benchmarks.record import RESULTS
from diht_jax import command_line
from diht_jax.data.atomic_file import write_atomically

_DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
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
    "emoji": {"emoji/t2i_r1": "text to image R@1", "emoji/i2t_r1": "image to text R@1"},
}
_NAMES = {
    "composition/swaps": "swaps",
    "scenes/r10": "R@10, scenes",
    "long/r10": "R@10, long texts",
    "emoji/r10": "R@10, emoji",
    "cifar10/top1": "top-1",
}
_METHODS = {"prompts": "from the prompts", "penalty": "with an L2 penalty", "scratch": "scratch"}
_MOST_GRID_ROWS = 10

_INTRODUCTION = """\
# Experiments

    python -m benchmarks.lab.run --list    # what is done, what is missing, and how long that takes
    python -m benchmarks.lab.run           # makes the missing runs; kill and start it at will
    python -m benchmarks.lab.page          # this page and its figures, from the result files

Which of the paper's claims hold in the small: tiny students on the synthetic web of the demo, on
emoji and on CIFAR-10. Every claim was registered with its margin, and with what would refute it,
before its runs were made (`benchmarks/lab/experiments.py`; its history shows when). Each run is
one file in `benchmarks/results/lab/`, with its command, revision, machine and versions.

**What cannot be said.** The shares and the kinds of noise of the synthetic web are this project's
choice, and its captions speak of shapes and colours. A verdict here is about these students on
these data. Nothing transfers to LAION by itself.

**How it is measured.** Students of equal seeds begin with the same parameters, and see the same
order where they have the same data. The primary metric on the web is the mean of text-to-image
and image-to-text recall at 10 among 2,000 scenes whose combinations never occur in training
(chance: 0.5%); of composition it is the share of these scenes' captions that are preferred to one
with the same words in another order (chance: 50%); on CIFAR-10 it is zero-shot top-1 on 1,000
photos. Differences are taken seed by
seed. The interval is Student's t over the seeds, 95%; beside it stands a bootstrap over seeds and
test items. A gain is *confirmed* where the lower bound is above 0 and the mean is at least the
margin, and *refuted* where the upper bound is below the margin; that something costs nothing is
confirmed where the lower bound is above minus the margin, and refuted where the upper bound is
below that. Everything else is *undecided*. There is no verdict before all registered runs are
there. Holm's p corrects for all {count} contrasts, those without runs included; with three seeds
hardly anything can survive that, so it stands beside the verdict.
"""


_ENDING = """\
## Experiments of your own

A line in a list of `benchmarks/lab/experiments.py`, and a contrast with its margin, before the
first run:

```python
Experiment("cat_beta_200", data="cat", config={"loss.beta": 2.0}, seeds=8)
Contrast("cat_beta_200", "cat", "hard_negatives", 0.01, "beta 2 helps", "less than a point")
```

Then `python -m benchmarks.lab.run --only cat_beta_200`, and `python -m benchmarks.lab.page`.

## On a cluster

    python -m benchmarks.lab.run --only grid --task_index=0 --num_tasks=72

makes the first of 72 shares: one run a task. In a Slurm array these are
`--task_index=$SLURM_ARRAY_TASK_ID --num_tasks=$SLURM_ARRAY_TASK_COUNT`. All tasks share one work
directory (`--workdir`), where data are made once, under a lock, and one folder of results. A task
that was stopped is started again as it was.

The paper chose its hyper-parameters with B/32 on a small scale. The block `b32` is that search: the
72 settings of `grid` with `configs/diht_vitb32.py`, 128 million samples in batches of 4,096, on
labelled records of your own:

    python -m benchmarks.lab.run --only b32 --train=/data/labelled --tasks=imagenet=/data/val \\
        --workdir=/shared/lab --results=/shared/lab/results --task_index=0 --num_tasks=72

A run uses all accelerators of its host, so that on a slice each host takes a task (JAX must see
that host alone). A search with more samples, other rates or another recipe changes one line of
`STUDENTS` or `_grid`. The block has not been run here.
"""


def define_flags() -> None:
    """The command line of `main`."""
    flags.DEFINE_string("results", str(RESULTS / "lab"), "Folder of the result files.")
    flags.DEFINE_string("output", str(_DOCS / "experiments.md"), "The page; figures go beside it.")


def main() -> None:
    """Reads the results, writes page and figures."""
    results = read_results(pathlib.Path(flags.FLAGS.results))
    page = pathlib.Path(flags.FLAGS.output)
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = judge(results)
    for block in BLOCKS:
        figure = images / f"lab_{block}.svg"
        drawn = [
            (row.contrast, row.found, row.verdict)
            for row in rows
            if row.contrast.block == block and row.found is not None
        ]
        figure.unlink(missing_ok=True)
        if drawn:
            text = figures.draw_contrasts(drawn, f"Contrasts: {BLOCKS[block][0]}")
            write_atomically(figure, text.encode())
    outdated = sum(1 for _ in pathlib.Path(flags.FLAGS.results).glob("*.json")) - len(results)
    write_atomically(page, format_page(rows, results, outdated).encode())
    print(f"{page}: {len(results)} runs")


def format_page(rows: Sequence[Row], results: dict[str, dict[str, Any]], outdated: int) -> str:
    """The page as Markdown."""
    planned = sum(e.seeds for e in EXPERIMENTS.values() if block_of(e.name) not in GRIDS)
    made = sum(block_of(r["experiment"]["name"]) not in GRIDS for r in results.values())
    counts = collections.Counter(row.verdict for row in rows)
    state = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    parts = [
        _INTRODUCTION.format(count=len(rows)),
        f"## Verdicts\n\n{made} of {planned} runs are made; of {len(rows)} contrasts: {state}."
        + (f" {outdated} result files are of an earlier definition." if outdated else "")
        + " Gains are in points of the metric.\n",
        _format_verdicts(rows),
        _format_missing(results),
    ]
    parts += [_format_block(block, rows, results) for block in BLOCKS]
    return "\n".join([*parts, _ENDING])


def _format_verdicts(rows: Sequence[Row]) -> str:
    lines = [
        "| claim | difference | 95% interval | margin | runs | Holm's p | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
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
    # Only what is confirmed is weakened by the correction.
    weak = row.verdict == CONFIRMED and row.corrected >= 0.05
    return f"**{row.verdict}**" + (", not after Holm" if weak else "")


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


def _format_block(block: str, rows: Sequence[Row], results: dict[str, dict[str, Any]]) -> str:
    title, question = BLOCKS[block]
    inside = [row for row in rows if row.contrast.block == block]
    used = dict.fromkeys(
        name for row in inside for name in (row.contrast.control, row.contrast.treated)
    )
    names = list(used) or [name for name in EXPERIMENTS if block_of(name) == block]
    files = {n: r for n, r in results.items() if r["experiment"]["name"] in names}
    lines = [f"## {title}", "", question, ""]
    lines += [f"`python -m benchmarks.lab.run --only {block}`{_describe_files(files)}", ""]
    if any(row.found for row in inside):
        lines += [f"![contrasts: {title}](images/lab_{block}.svg)", ""]
    if block == "few_shot":
        lines += _format_shots(files)
    elif files:
        lines += _format_experiments(block, names, files)
    if inside:
        lines += ["| contrast | difference | t interval | bootstrap | refuted if |"]
        lines += ["|---|---|---|---|---|"]
        lines += [_format_contrast(row) for row in inside]
    return "\n".join([*lines, ""])


def _describe_files(files: dict[str, dict[str, Any]]) -> str:
    if not files:
        return " has not been run yet."
    revisions = sorted({result["revision"][:7] for result in files.values()})
    changed = any(result["revision"].endswith("+changes") for result in files.values())
    dates = sorted({result["date_utc"][:10] for result in files.values()})
    machines = sorted(
        {f"{r['machine']['cores']} cores of {r['machine']['cpu']}" for r in files.values()}
    )
    return (
        f": {len(files)} runs of revision {', '.join(revisions)}"
        f"{' with changes' if changed else ''}, {' and '.join(dates)}, {' and '.join(machines)}."
    )


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
    metrics = metrics_of(contrast)
    names = (f"`{contrast.treated}`", f"`{contrast.control}`")
    if contrast.treated == contrast.control:
        names = tuple(f"`{metric}`" for metric in metrics)
    resampled = ""
    if found and found.resampled:
        resampled = f"{_points(found.resampled[0])} to {_points(found.resampled[1])}"
    return (
        f"| {names[0]} − {names[1]} | {_points(found.mean) if found else ''} "
        f"| {_interval(found) if found else ''} | {resampled} | {contrast.refuted_by} |"
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
    return BLOCKS[block][0].lower().replace(" ", "-")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
