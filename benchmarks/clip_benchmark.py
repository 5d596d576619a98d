"""Compares the metrics of CLIP_benchmark and of our command for the same models and data.

    pip install --no-deps --target runs/numpy "numpy<2.4"
    python -m benchmarks.clip_benchmark --models runs/emoji,runs/cifar_half --packages runs/numpy

The data of each task are written in CLIP_benchmark's layout, and each model is exported for
open_clip. Then `clip_benchmark eval --model_type open_clip` and `diht_jax.evaluate` run on the
folders. Prints both, and exits with 1 if any number differs by a single image.

CLIP_benchmark's command (1.6.2) fails on classifications with NumPy 2.4 and later; packages in the
folder `--packages` take precedence. Times are not compared, because the two programs batch the
computation differently.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks.clip_benchmark_folder import write_folder
from benchmarks.record import write_result
from diht_jax import command_line
from diht_jax.evaluation.comparison import format_comparison
from diht_jax.evaluation.protocols.base import Task
from diht_jax.evaluation.results import read_results
from diht_jax.evaluation.suite import CLASSIFICATION
from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.export import export_model

_TASKS = (
    "cifar10=runs/data/cifar10_test.tar",
    "emoji=retrieval:runs/data/emoji_twitter.tar?caption_template={caption}",
)
# CLIP_benchmark's metric -> ours.
METRIC_NAMES = {
    "acc1": "top1",
    "acc5": "top5",
    "mean_per_class_recall": "mean_per_class",
    **{
        f"{theirs}_retrieval_recall@{k}": f"{ours}_r{k}"
        for theirs, ours in (("image", "t2i"), ("text", "i2t"))
        for k in (1, 5, 10)
    },
}
# CLIP_benchmark averages in float32, over at most some thousands of images.
_ROUNDING = 1e-6


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    flags.DEFINE_list("models", None, "Work directories, weight files or released names.")
    flags.DEFINE_list(
        "tasks", list(_TASKS), "Classifications with class names, and retrievals, as of evaluate."
    )
    flags.DEFINE_integer("limit", 1000, "Pictures a task, at most.")
    flags.DEFINE_string(
        "output", "runs/clip_benchmark", "Directory to make: folders, models and result files."
    )
    flags.DEFINE_string("packages", None, "Folder of packages that CLIP_benchmark takes first.")


def main() -> None:
    """Runs the comparison, and writes `benchmarks/results/clip_benchmark.json`."""
    given = flags.FLAGS
    if not given.models:
        raise ValueError("--models is required, such as --models runs/emoji")
    tasks = parse_tasks(given.tasks)
    output = pathlib.Path(given.output)
    folders = {task.name: output / task.name for task in tasks}
    data = {
        task.name: {
            "source": task.source,
            **write_folder(task, folders[task.name], limit=given.limit),
        }
        for task in tasks
    }
    compared = []
    for number, model in enumerate(given.models):
        work = output / f"model_{number}"
        export_model(model, "open_clip", str(work / "open_clip"))
        ours = _run_ours(model, tasks, folders, work)
        theirs = {
            task.name: _run_theirs(task, folders[task.name], work, given.packages) for task in tasks
        }
        compared.append(compare_numbers(ours, theirs))
    payload = {
        "packages": {
            name: importlib.metadata.version(name) for name in ("clip-benchmark", "open_clip_torch")
        },
        "tasks": data,
        "models": compared,
    }
    print(write_result("clip_benchmark", payload))
    differing = [m["model"] for m in compared for task in m["tasks"].values() if not task["equal"]]
    if differing:
        print(f"error: not the same numbers: {', '.join(differing)}", file=sys.stderr)
        sys.exit(1)


def _run_ours(
    model: str, tasks: Sequence[Task], folders: dict[str, pathlib.Path], work: pathlib.Path
) -> dict[str, Any]:
    """Runs our command; returns its results file."""
    # The captions in the folder already include their prompts.
    texts = [
        f"{task.name}=clip_benchmark:{folders[task.name]}"
        + ("" if task.kind == CLASSIFICATION else "?caption_template={caption}")
        for task in tasks
    ]
    file = work / "ours.json"
    command = ["diht_jax.evaluate", "--model", model, "--tasks", ",".join(texts)]
    _run([*command, "--output", str(file), "--nopages"])
    return read_results(file)


def _run_theirs(
    task: Task, folder: pathlib.Path, work: pathlib.Path, packages: str | None
) -> dict[str, float]:
    """Runs CLIP_benchmark's command; returns its metrics under our names."""
    is_classification = task.kind == CLASSIFICATION
    file = work / f"theirs.{task.name}.json"
    command = ["clip_benchmark.cli", "eval", "--model_type", "open_clip"]
    command += ["--model", f"local-dir:{work / 'open_clip'}", "--pretrained", "", "--no_amp"]
    command += ["--dataset", f"wds/{task.name}", "--dataset_root", str(folder)]
    command += ["--task", "zeroshot_classification" if is_classification else "zeroshot_retrieval"]
    command += ["--recall_k", "1", "5", "10", "--num_workers", "0", "--quiet"]
    _run([*command, "--output", str(file)], packages=packages)
    metrics = json.loads(file.read_text())["metrics"]
    return {METRIC_NAMES[name]: value for name, value in metrics.items()}


def _run(module: list[str], packages: str | None = None) -> None:
    print(f"$ {shlex.join(['python', '-m', *module])}", flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if packages:
        environment["PYTHONPATH"] = os.path.abspath(packages)
    done = subprocess.run(
        [sys.executable, "-m", *module], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        hint = ""
        if "only 0-dimensional arrays can be converted" in done.stderr:
            hint = '; it needs NumPy 2.3: pip install --no-deps --target DIR "numpy<2.4", and '
            hint += "--packages DIR"
        raise ValueError(f"python -m {module[0]} failed{hint}:\n{done.stderr[-2000:]}")


def compare_numbers(ours: dict[str, Any], theirs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Prints the metrics of both programs, and compares them by task.

    Args:
        ours: a results file of `diht_jax.evaluate`.
        theirs: task -> metric -> value.

    Returns:
        `model`, `step` and `fingerprint` of ours, and `tasks`: name -> `equal` (whether all metrics
        agree to the sample), `ours` and `clip_benchmark`.
    """
    common = [
        {**result, "metrics": {name: result["metrics"][name] for name in theirs[result["task"]]}}
        for result in ours["results"]
    ]
    other = [{**result, "metrics": theirs[result["task"]]} for result in common]
    print(
        format_comparison(
            {**ours, "results": common},
            {"model": "CLIP_benchmark, the same exported", "results": other},
        ),
        flush=True,
    )
    tasks = {
        result["task"]: {
            "equal": all(
                abs(value - theirs[result["task"]][name]) < _ROUNDING
                for name, value in result["metrics"].items()
            ),
            "ours": result["metrics"],
            "clip_benchmark": theirs[result["task"]],
        }
        for result in common
    }
    return {key: ours[key] for key in ("model", "step", "fingerprint")} | {"tasks": tasks}


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
