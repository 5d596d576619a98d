"""Compares training with the block-shuffled order and with the global permutation, over seeds.

    python -m benchmarks.orders --name demo --config configs/demo.py --train demo_output/filtered \\
        --tasks 'scenes=retrieval:demo_output/web/val_retrieval.tar?caption_template={caption}'

Trains a recipe with every seed in both orders of `config.data.order`, and evaluates the final
models. Equal seeds share the initialisation. Prints mean and spread, and writes
`benchmarks/results/orders_NAME.json`; resumes when started again.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from typing import Any

from absl import flags, logging

from benchmarks.distillation import results_of, run_command
from benchmarks.record import write_result
from diht_jax import command_line

ORDERS = ("global", "blocks")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("name", None, "Of the result: benchmarks/results/orders_NAME.json.")
    flags.DEFINE_string("config", "configs/demo.py", "The recipe.")
    flags.DEFINE_string("train", None, "Its data: config.data.train.")
    flags.DEFINE_list("tasks", None, "As --tasks of diht_jax.evaluate.")
    flags.DEFINE_list("overrides", [], "Other keys of the recipe, such as total_epochs=20.")
    flags.DEFINE_string("workdir", "runs/orders", "Where runs and their results lie.")
    flags.DEFINE_integer("seeds", 3, "Runs in each order.")


def main() -> None:
    """Trains and evaluates, and prints the results."""
    given = flags.FLAGS
    for name in ("name", "train", "tasks"):
        if not given[name].value:
            raise ValueError(f"--{name} is required")
    folder = pathlib.Path(given.workdir) / given.name
    folder.mkdir(parents=True, exist_ok=True)
    scores: dict[str, list[dict[str, float]]] = {order: [] for order in ORDERS}
    for seed in range(given.seeds):
        for order in ORDERS:
            run = folder / f"{order}_{seed}"
            if not results_of(run).exists():
                train_and_evaluate(run, seed, order)
            scores[order].append(read_metrics(run))
            logging.info("seed %d, %s: %s", seed, order, scores[order][-1])
    rows = [as_row(order, metric, scores) for metric in scores["global"][0] for order in ORDERS]
    print(format_rows(rows))
    settings = {name: given[name].value for name in ("config", "overrides", "seeds", "tasks")}
    print("written:", write_result(f"orders_{given.name}", {"settings": settings, "rows": rows}))


def train_and_evaluate(run: pathlib.Path, seed: int, order: str) -> None:
    """Trains and evaluates one run."""
    given = flags.FLAGS
    run_command(
        "diht_jax.train",
        f"--config={given.config}",
        f"--config.data.train={given.train}",
        f"--config.seed={seed}",
        f"--config.data.order={order}",
        *(f"--config.{text}" for text in given.overrides),
        f"--workdir={run}",
    )
    run_command(
        "diht_jax.evaluate",
        f"--model={run}",
        f"--tasks={','.join(given.tasks)}",
        f"--output={results_of(run)}",
        "--nopages",
    )


def read_metrics(run: pathlib.Path) -> dict[str, float]:
    """Returns the headline metrics: "TASK/METRIC" -> value."""
    found = json.loads(results_of(run).read_text())["results"]
    return {
        f"{result['task']}/{metric}": value
        for result in found
        for metric, value in result["metrics"].items()
        if metric in ("top1", "t2i_r1", "i2t_r1", "t2i_r10", "i2t_r10")
    }


def as_row(order: str, metric: str, scores: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Computes mean and spread of one metric in one order, and the difference to the global one."""
    values = [score[metric] for score in scores[order]]
    distances = [v - g[metric] for v, g in zip(values, scores["global"], strict=True)]
    return {
        "metric": metric,
        "order": order,
        "values": values,
        "mean": statistics.mean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else None,
        "mean_minus_global": statistics.mean(distances),
    }


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Formats the table, in percent."""
    lines = [f"{'metric':20s} {'order':14s} mean +- standard deviation (minus global)"]
    for row in rows:
        spread = "" if row["stdev"] is None else f" +- {100 * row['stdev']:.2f}"
        lines.append(
            f"{row['metric']:20s} {row['order']:14s} {100 * row['mean']:.2f}{spread} "
            f"({100 * row['mean_minus_global']:+.2f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
