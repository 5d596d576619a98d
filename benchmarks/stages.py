"""Compares the cost of recipes in stages with recipes that use full-size images from the start.

    python -m benchmarks.pod_fit --only diht_vitb16_stages:stage=1,diht_vitl14_stages:stage=1
    python -m benchmarks.stages

Prints chip-hours from the lower bounds compiled by `benchmarks.pod_fit`, with everything overlapped
and with everything in the order of its schedule. Later stages compute the step of a recipe without
stages, and have the same bound.
"""

from __future__ import annotations

import json
from typing import Any

from absl import app

from benchmarks.record import RESULTS
from diht_jax.config import load_recipe

# Recipe in stages -> the rows of its stages, and the recipes that produce the same model.
STAGES = {
    "diht_vitb16_stages": (("diht_vitb16_stages:stage=1", "diht_vitb16"), ("diht_vitb16",)),
    "diht_vitl14_stages": (
        ("diht_vitl14_stages:stage=1", "diht_vitl14", "diht_vitl14_336"),
        ("diht_vitl14", "diht_vitl14_336"),
    ),
}


def main(_: list[str]) -> None:
    """Prints a table for TPUs and for GPUs."""
    tpus = json.loads((RESULTS / "pod_fit.json").read_text())["recipes"]
    gpus = json.loads((RESULTS / "pod_fit_gpus.json").read_text())["gpus"]
    suffix = ", h100:64x8"
    gpus = {name.removesuffix(suffix): row for name, row in gpus.items() if name.endswith(suffix)}
    print("| recipe | samples | v5e:16x16: step | chip-hours | h100:64x8: step | chip-hours |")
    print("|---|--:|--:|--:|--:|--:|")
    for recipe, (rows, single) in STAGES.items():
        stages = [(f"{recipe}:stage={n}", row) for n, row in enumerate(rows, 1)]
        both = (stages, [(name, name) for name in single])
        whole = [print_part(parts, tpus, gpus) for parts in both]
        print(f"| stages against none | | | {' | | '.join(map(_ratio, *whole))} |")
        scheduled = [
            [
                sum(chip_hours(part, rows[name], "scheduled_secs") for part, name in parts)
                for rows in (tpus, gpus)
            ]
            for parts in both
        ]
        cells = [
            f"{few:,.0f} of {many:,.0f}, {_ratio(few, many)}"
            for few, many in zip(*scheduled, strict=True)
        ]
        print(f"| the same as scheduled | | | {' | | '.join(cells)} |")


def _ratio(few: float, many: float) -> str:
    return f"{many / few:.1f} times less"


def chip_hours(recipe: str, row: dict[str, Any], bound: str) -> float:
    """Returns the chip-hours of a recipe with its argument, by one of the bounds in its row."""
    stem, _, argument = recipe.partition(":")
    config = load_recipe(stem, argument)
    steps = config.total_examples / config.data.batch_size
    return steps * row[bound] * row["chips"] / 3600


def print_part(parts: list[tuple[str, str]], *machines: dict[str, dict[str, Any]]) -> list[float]:
    """Prints a line for each part of a training run, and one for the total.

    Args:
        parts: recipe with its argument, and the name of the row with its bound.
        *machines: name of a row -> row.

    Returns:
        Chip-hours of all parts on each machine.
    """
    totals = [0.0 for _ in machines]
    for recipe, name in parts:
        stem, _, argument = recipe.partition(":")
        samples = load_recipe(stem, argument).total_examples
        cells = []
        for index, rows in enumerate(machines):
            hours = chip_hours(recipe, rows[name], "step_secs")
            totals[index] += hours
            cells += [f"{1e3 * rows[name]['step_secs']:,.0f} ms", f"{hours:,.0f}"]
        print(f"| `{recipe}` | {samples / 1e9:g} billion | {' | '.join(cells)} |")
    print(f"| together | | | {' | | '.join(f'**{total:,.0f}**' for total in totals)} |")
    return totals


if __name__ == "__main__":
    app.run(main)
