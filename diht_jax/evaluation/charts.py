"""Charts of results as PNG files, drawn with matplotlib: comparisons, few-shot, interpolations."""

from __future__ import annotations

import io
import itertools
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diht_jax.evaluation.comparison import LETTERS
from diht_jax.evaluation.results import describe_model, metric_of
from diht_jax.storage import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from diht_jax.evaluation.protocols.base import Metric

_GREY, _BLUE, _RED, _PURPLE = "#656d76", "#0969da", "#cf222e", "#8250df"
_GREEN = "#1a7f37"
_BAR_COLORS = ("#8c959f", _BLUE, _GREEN, "#bf3989", "#9a6700")
_LINE_LETTERS, _MOST_LETTERS = 24, 150  # characters of a text next to its pictures
_BARS_ROOM = 0.76  # height of a metric's group of bars, in units of the distance between metrics
# Maps a few-shot method to label, color and marker.
_METHODS = {
    "prompt_init": ("from the prompts (DiHT)", _BLUE, "o-"),
    "scratch": ("linear probe from scratch", _RED, "s--"),
    "prompt_penalty": ("from the prompts, L2 penalty", _PURPLE, "^:"),
}


def draw_comparison(results: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws a bar with its interval per result, for each metric in percent that all results have.

    Metrics of other units do not fit on the axis and are left out. Results without a common metric
    in percent are a ValueError.
    """
    first, *others = [{result["task"]: result for result in r["results"]} for r in results]
    rows = [
        (f"{task}  {metric.label}", name, [tasks[task] for tasks in (first, *others)])
        for task, result in first.items()
        for name in result["metrics"]
        if (metric := metric_of(result, name)).unit == "share"
        and all(task in tasks and name in tasks[task]["metrics"] for tasks in others)
    ]
    if not rows:
        raise ValueError("the results have no task in common, so there is nothing to draw")
    bar = _BARS_ROOM / len(results)
    figure = _new_figure(9, 1.2 + 0.25 * len(results) * (1 + len(rows)))
    axes = figure.add_subplot()
    for side, (letter, described) in enumerate(zip(LETTERS, results, strict=False)):
        offset = (side - (len(results) - 1) / 2) * bar
        color = _BAR_COLORS[side % len(_BAR_COLORS)]
        for row, (_, name, measured) in enumerate(rows):
            result = measured[side]
            value = end = 100 * result["metrics"][name]
            label = f"{letter}: {describe_model(described)}" if row == 0 else None
            axes.barh(row + offset, value, bar, color=color, label=label)
            if name in result.get("intervals", {}):
                low, high = (100 * bound for bound in result["intervals"][name])
                axes.plot([low, high], [row + offset] * 2, color="#1f2328", linewidth=1.2)
                end = max(value, high)
            axes.text(end + 0.6, row + offset, f"{value:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("%; the thin lines are 95% intervals, where there are any")
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_few_shot(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws the accuracy of each few-shot method by the number of shots, from `evaluate_few_shot`.

    Faint dots are single draws, lines connect the means, and bars are one standard deviation.
    """
    figure = _new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    rows = result["results"]
    positions = range(len(rows))
    zero_shot = 100 * result["zero_shot"]["test"]
    axes.axhline(zero_shot, color=_GREY, linestyle=":", label=f"zero-shot, {zero_shot:.1f}%")
    for method, (label, color, style) in _METHODS.items():
        means = [100 * row[method]["test_mean"] for row in rows]
        spreads = [100 * (row[method]["test_std"] or 0.0) for row in rows]
        axes.errorbar(positions, means, spreads, fmt=style, color=color, capsize=3, label=label)
        for position, row in zip(positions, rows, strict=True):
            values = [100 * value for value in row[method]["test"]]
            axes.plot([position] * len(values), values, ".", color=color, alpha=0.3)
    axes.set_xticks(list(positions), [str(row["shots"]) for row in rows])
    axes.set_xlabel("training images per class")
    axes.set_ylabel("accuracy on the test split, %")
    counts = result["counts"]
    axes.set_title(
        f"{pathlib.PurePath(result['test']).name}: {counts['test']:,} test images, "
        f"{counts['classes']:,} classes",
        fontsize=11,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_trade_off(
    record: Mapping[str, Any], metrics: Mapping[str, Metric], path: str | os.PathLike[str]
) -> None:
    """Draws WiSE-FT: the target metric over the reference metric, with one point per alpha.

    The record comes from `diht_jax.average`, with `grid`, `target` and `reference`.
    """
    figure = _new_figure(6.2, 4.8)
    axes = figure.add_subplot()
    rows = sorted(record["grid"], key=lambda row: row["alpha"])
    values = {}
    for axis, name in (("x", record["reference"]), ("y", record["target"])):
        is_share = metrics[name].unit == "share"
        values[axis] = [(100 if is_share else 1) * row["metrics"][name] for row in rows]
        label = f"{name.rpartition('/')[0]}: {metrics[name].label or name.rpartition('/')[2]}"
        axes.set(**{f"{axis}label": label + (", %" if is_share else "")})
        if metrics[name].lower_is_better:
            (axes.xaxis if axis == "x" else axes.yaxis).set_inverted(True)
    axes.plot(values["x"], values["y"], "o-", color=_BLUE)
    for row, x, y in zip(rows, values["x"], values["y"], strict=True):
        axes.annotate(
            f"{row['alpha']:g}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8
        )
    ends = ((0, 0, "alpha 0: first model", _GREY), (-1, 1, "alpha 1: second", _RED))
    for index, alpha, label, color in ends:
        if rows[index]["alpha"] == alpha:
            axes.plot(values["x"][index], values["y"][index], "s", color=color, label=label, ms=8)
    axes.set_title("interpolated weights (WiSE-FT); the numbers are alpha", fontsize=11)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    _save(figure, path)


def draw_retrievals(examples: Mapping[str, Any]) -> bytes:
    """Draws text queries with their top pictures, framed green or red, as a PNG.

    The examples come from `page.retrieval_examples`, with Pillow images.
    """
    queries = examples["text_queries"]
    columns = 1 + max(len(query["tiles"]) for query in queries)
    figure = _new_figure(2.4 + 1.5 * columns, 0.5 + 1.6 * len(queries))
    shares = {"width_ratios": [1.6, *[1] * columns]}
    grid = figure.subplots(len(queries), columns + 1, squeeze=False, gridspec_kw=shares)
    for query, (words, *cells) in zip(queries, grid, strict=True):
        text = textwrap.fill(textwrap.shorten(query["text"], _MOST_LETTERS), _LINE_LETTERS)
        # A dollar sign would start a formula.
        words.text(0, 0.5, text.replace("$", r"\$"), va="center", fontsize=9)
        words.axis("off")
        for tile, axes in itertools.zip_longest([*query["tiles"], query["right"]], cells):
            if tile is None:
                axes.axis("off")
                continue
            axes.imshow(tile["picture"])
            axes.set(xticks=[], yticks=[])
            axes.set_title(tile["label"], fontsize=8)
            for side in axes.spines.values():
                side.set(color=_GREEN if tile["right"] else _RED, linewidth=3)
    figure.suptitle(examples["title"].replace("$", r"\$"), fontsize=11)
    return _encode(figure)


def _new_figure(width: float, height: float) -> Figure:
    # Avoids pyplot, which would keep the figure alive and choose a window system.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    path = os.fspath(path)
    files.make_folder(os.path.dirname(path) or ".")
    files.write_bytes(path, _encode(figure))


def _encode(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
