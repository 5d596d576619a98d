"""The plot of WiSE-FT: the target metric against the reference metric, along the interpolation.

Drawing only: the numbers come in with the record.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping
from typing import Any

from diht_jax.evaluation.protocols.base import Metric
from diht_jax.storage.atomic_file import write_atomically


def draw_trade_off(
    record: Mapping[str, Any], metrics: Mapping[str, Metric], path: str | pathlib.Path
) -> None:
    """Writes a PNG: a point for each alpha, joined in their order.

    Args:
        record: of `diht_jax.average`, with `grid`, `target` and `reference`.
        metrics: of the tasks, by "TASK/METRIC".
        path: of the file.
    """
    # On a figure of its own: pyplot would keep it, and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = sorted(record["grid"], key=lambda row: row["alpha"])
    values = {}
    for axis, name in (("x", record["reference"]), ("y", record["target"])):
        is_share = metrics[name].unit == "share"
        values[axis] = [(100 if is_share else 1) * row["metrics"][name] for row in rows]
        label = f"{name.rpartition('/')[0]}: {metrics[name].label or name.rpartition('/')[2]}"
        getattr(axes, f"set_{axis}label")(label + (", %" if is_share else ""))
        if metrics[name].lower_is_better:
            getattr(axes, f"invert_{axis}axis")()
    axes.plot(values["x"], values["y"], "o-", color="#0969da")
    for row, x, y in zip(rows, values["x"], values["y"], strict=True):
        axes.annotate(
            f"{row['alpha']:g}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8
        )
    for index, label, color in (
        (0, "alpha 0: first model", "#656d76"),
        (-1, "alpha 1: second", "#cf222e"),
    ):
        if rows[index]["alpha"] == (0 if index == 0 else 1):
            axes.plot(values["x"][index], values["y"][index], "s", color=color, label=label, ms=8)
    axes.set_title("interpolated weights (WiSE-FT); the numbers are alpha", fontsize=11)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(pathlib.Path(path), buffer.getvalue())
