"""Accuracy gained on new photos by settings of fine-tuning, and lost on the original data.

    python -m data_prep.examples cifar10 emoji --output runs/data
    python -m benchmarks.finetuning --data runs/data

`clipart_tiny`, trained on emoji, is fine-tuned on 4,000 photos of CIFAR-10 by
`configs/cifar10_finetune.py`, once for each of `SETTINGS` and seed. The metrics are top-1 with
prompts on 1,000 other photos, and R@10 of text to image among one artist's 3,786 emoji. Writes
`benchmarks/results/finetuning.json`; resumes when started again.
"""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

from absl import flags, logging

from benchmarks.distillation import results_of, run_command
from benchmarks.orders import read_metrics
from benchmarks.record import write_result
from diht_jax import command_line

START = "clipart_tiny"
# Name -> the recipe's argument, and other keys.
SETTINGS = {
    "all": ("all", ()),
    "all, a third of the rate": ("all", ("optimizer.learning_rate=1e-4",)),
    "all, a tenth of the rate": ("all", ("optimizer.learning_rate=3e-5",)),
    "all, rates by layer": ("all", ("optimizer.layer_decay=0.65",)),
    "text tower frozen": ("all", ("optimizer.frozen=('^text/',)",)),
    "image tower frozen": ("all", ("optimizer.frozen=('^vision/',)",)),
    "adapters of rank 8": ("lora", ()),
    "image projection alone": ("probe", ()),
}
# Name -> the setting whose model is averaged with the initial model, with equal weights.
MEANS = {
    "mean of `all` and the start": "all",
    "mean of the adapters and the start": "adapters of rank 8",
}
_KNOWN, _NEW = "emoji/t2i_r10", "cifar10/top1"


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("data", "runs/data", "Folder with the tars of emoji and CIFAR-10.")
    flags.DEFINE_string("workdir", "runs/finetuning", "Where runs and their results lie.")
    flags.DEFINE_integer("examples", 7680, "Samples seen by a run: config.total_examples.")
    flags.DEFINE_integer("seeds", 1, "Runs of each setting.")


def main() -> None:
    """Trains and evaluates, and prints the results."""
    given = flags.FLAGS
    folder, data = pathlib.Path(given.workdir), pathlib.Path(given.data)
    records, seeds = folder / "records", range(given.seeds)
    if not records.exists():
        run_command(
            "data_prep.filter",
            "--config=prep/convert",
            f"--config.input={data / 'cifar10_train.tar'}",
            f"--config.output={records}",
        )
    rows = [("the start", [evaluate(START, folder / "start", data)])]
    for name in SETTINGS:
        runs = [train(name, run_of(folder, name, seed), records, seed) for seed in seeds]
        rows.append((name, [evaluate(run, run, data) for run in runs]))
    for name, tuned in MEANS.items():
        means = [average(run_of(folder, tuned, seed)) for seed in seeds]
        rows.append((name, [evaluate(mean, mean, data) for mean in means]))
    table = [as_row(name, found) for name, found in rows]
    print(format_rows(table))
    settings = {"examples": given.examples, "seeds": given.seeds, "start": START}
    print("written:", write_result("finetuning", {"settings": settings, "rows": table}))


def run_of(folder: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """Returns the work directory of a run."""
    return folder / f"setting_{list(SETTINGS).index(name)}_seed{seed}"


def train(name: str, run: pathlib.Path, records: pathlib.Path, seed: int) -> pathlib.Path:
    """Trains a setting, or resumes its run; returns the work directory."""
    argument, keys = SETTINGS[name]
    run_command(
        "diht_jax.train",
        f"--config=cifar10_finetune:train={argument}",
        f"--config.model.init_from={START}",
        f"--config.data.train={records}",
        f"--config.total_examples={flags.FLAGS.examples}",
        f"--config.seed={seed}",
        *(f"--config.{key}" for key in keys),
        f"--workdir={run}",
    )
    return run


def average(run: pathlib.Path) -> pathlib.Path:
    """Averages a run with the initial model, with equal weights; returns the directory."""
    mean = run.with_name(f"{run.name}_mean")
    if not mean.exists():
        models = f"--models={START},{run}"
        run_command("diht_jax.average", models, "--method=wise_ft", f"--output={mean}")
    return mean


def evaluate(model: pathlib.Path | str, run: pathlib.Path, data: pathlib.Path) -> dict[str, float]:
    """Returns the two metrics of a model; its results file is next to `run`."""
    if not results_of(run).exists():
        known = f"emoji=retrieval:{data / 'emoji_twitter.tar'}?caption_template={{caption}}"
        run_command(
            "diht_jax.evaluate",
            f"--model={model}",
            f"--tasks=cifar10={data / 'cifar10_test.tar'},{known}",
            f"--output={results_of(run)}",
            "--nopages",
        )
    found = read_metrics(run)
    logging.info("%s: %s", run.name, found)
    return {metric: found[metric] for metric in (_NEW, _KNOWN)}


def as_row(name: str, found: list[dict[str, float]]) -> dict[str, Any]:
    """Computes the means over the seeds, with the values of each seed."""
    row: dict[str, Any] = {"setting": name}
    for metric in (_NEW, _KNOWN):
        values = [each[metric] for each in found]
        row[metric] = {"mean": statistics.fmean(values), "values": values}
    return row


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Formats a Markdown table; values in percent."""
    lines = ["| trained | photos, top-1 | emoji, R@10 |", "|---|--:|--:|"]
    for row in rows:
        means = [f"{100 * row[metric]['mean']:.1f}%" for metric in (_NEW, _KNOWN)]
        lines.append(f"| {row['setting']} | {means[0]} | {means[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
