"""The bar chart of two or more results.

Drawing only; `results` has the table of the same numbers.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence
from typing import Any

from diht_jax.evaluation.results import LETTERS, describe_model, metric_of
from diht_jax.storage.atomic_file import write_atomically

_COLORS = ("#8c959f", "#0969da", "#1a7f37", "#bf3989", "#9a6700")
_ROOM = 0.76  # of the bars of one metric, the distance of metrics being 1


def draw_comparison(results: Sequence[dict[str, Any]], path: str | pathlib.Path) -> None:
    """Writes a PNG with a bar for each result, and its interval, for every share that all have.

    Metrics of other units are left out: they do not fit on an axis in percent.

    Args:
        results: of `results.read_results`.
        path: of the file; its folder is made when missing.

    Raises:
        ValueError: they have no task with a common metric that is a share.
    """
    first, *others = [{result["task"]: result for result in r["results"]} for r in results]
    rows = [
        (f"{task}  {metric.label}", name, [tasks[task] for tasks in (first, *others)])
        for task, result in first.items()
        if all(task in tasks for tasks in others)
        for name in result["metrics"]
        if (metric := metric_of(result, name)).unit == "share"
        and all(name in tasks[task]["metrics"] for tasks in others)
    ]
    if not rows:
        raise ValueError("the results have no task in common, so there is nothing to draw")
    # On a figure of its own: pyplot would keep it, and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bar = _ROOM / len(results)
    height = 1.2 + 0.25 * len(results) * (1 + len(rows))
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side, (letter, described) in enumerate(zip(LETTERS, results, strict=False)):
        offset = (side - (len(results) - 1) / 2) * bar
        color = _COLORS[side % len(_COLORS)]
        for row, (_, name, measured) in enumerate(rows):
            result = measured[side]
            value = 100 * result["metrics"][name]
            label = f"{letter}: {describe_model(described)}" if row == 0 else None
            axes.barh(row + offset, value, bar, color=color, label=label)
            end = value
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
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
