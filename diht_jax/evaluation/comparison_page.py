"""The bar chart of two results.

Called by `python -m diht_jax.evaluate --compare`. Drawing only; what is printed is known to
`report`.
"""

from __future__ import annotations

import io
import pathlib
from typing import Any

from diht_jax.data.atomic_file import write_atomically
from diht_jax.evaluation.report import describe_model, metric_label

_COLORS = ("#8c959f", "#0969da")
_BAR = 0.38


def draw_comparison(
    first: dict[str, Any], second: dict[str, Any], path: str | pathlib.Path
) -> None:
    """Writes a PNG with two bars, and their intervals, for every metric that both have.

    Median ranks are left out: they are no fractions, and less is better.

    Args:
        first, second: of `report.read_results`.
        path: of the file; its folder is made when missing.

    Raises:
        ValueError: the two have no task with a common metric.
    """
    pairs = [
        (result, others[result["task"]])
        for others in [{result["task"]: result for result in second["results"]}]
        for result in first["results"]
        if result["task"] in others
    ]
    rows = [
        (f"{a['task']}  {metric_label(name)}", name, (a, b))
        for a, b in pairs
        for name in a["metrics"]
        if name in b["metrics"] and not name.endswith("rank")
    ]
    if not rows:
        raise ValueError("the two results have no task in common, so there is nothing to draw")
    # On a figure of its own: pyplot would keep it, and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side, results in enumerate((first, second)):
        offset = (side - 0.5) * _BAR
        for place, (_, name, both) in enumerate(rows):
            result = both[side]
            value = 100 * result["metrics"][name]
            label = f"{'AB'[side]}: {describe_model(results)}" if place == 0 else None
            axes.barh(place + offset, value, _BAR, color=_COLORS[side], label=label)
            end = value
            if name in result.get("intervals", {}):
                low, high = (100 * bound for bound in result["intervals"][name])
                axes.plot([low, high], [place + offset] * 2, color="#1f2328", linewidth=1.2)
                end = max(value, high)
            axes.text(end + 0.6, place + offset, f"{value:.1f}", va="center", fontsize=8)
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
