"""The plot of a few-shot result: accuracy by number of shots, each method, with its spread.

Drawing only: the numbers come in with the result.
"""

from __future__ import annotations

import io
import pathlib
from typing import Any

from diht_jax.evaluation.fewshot.grid import PENALTY, PROMPT_INIT, SCRATCH
from diht_jax.storage.atomic_file import write_atomically

_LOOKS = {
    PROMPT_INIT: ("from the prompts (DiHT)", "#0969da", "o-"),
    SCRATCH: ("linear probe from scratch", "#cf222e", "s--"),
    PENALTY: ("from the prompts, L2 penalty", "#8250df", "^:"),
}


def draw_few_shot(result: dict[str, Any], path: str | pathlib.Path) -> None:
    """Writes a PNG.

    Args:
        result: of `grid.evaluate_few_shot`; every draw is a faint dot, the line goes through
            the means, the bars are one standard deviation over the draws.
        path: of the file; its folder is made when missing.
    """
    # On a figure of its own: pyplot would keep it, and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = result["results"]
    positions = range(len(rows))
    zero_shot = 100 * result["zero_shot"]["test"]
    axes.axhline(zero_shot, color="#656d76", linestyle=":", label=f"zero-shot, {zero_shot:.1f}%")
    for method, (label, color, style) in _LOOKS.items():
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
