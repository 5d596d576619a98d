"""Compares CLIP_benchmark with our evaluation on sixteen tasks, sample by sample.

    pip install --no-deps --target runs/numpy "numpy<2.4" wilds
    python -m benchmarks.clip_benchmark_tasks --model runs/emoji --packages runs/numpy

Writes small stand-ins of data sets in the folder layouts of CLIP_benchmark and DataComp
(`clip_benchmark_standins`), exports the model for open_clip, and runs the functions of
CLIP_benchmark (`clip_benchmark_samples`) and `diht_jax.evaluate` on the same folders. Compares the
predicted class of every image, image-class similarities of multi-label tasks (to 1e-5), whether
each retrieval query is answered within 1, 5 and 10, and all metrics. The worst group and macro F1
are computed with WILDS, as in DataComp. Exits with 1 if a prediction, query or metric differs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
from absl import flags

from benchmarks.clip_benchmark import METRIC_NAMES
from benchmarks.clip_benchmark_standins import STANDINS, write_standin
from benchmarks.record import write_result
from diht_jax import command_line, load_model
from diht_jax.evaluation.embedding.encoding import Encoder
from diht_jax.evaluation.protocols.base import Measured
from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.suite import CLASSIFICATION, MULTILABEL, RETRIEVAL
from diht_jax.evaluation.task_parsing import open_source, parse_tasks
from diht_jax.export import export_model
from diht_jax.terminal import format_table

_NAMES = {
    **METRIC_NAMES,
    "mean_average_precision": "mean_average_precision",
    **{name: name for name in ("worst_group", "worst_group_top5", "f1_macro")},
}
# CLIP_benchmark averages in float32 over some hundreds of images; similarities are dot products.
_ROUNDING, _SCORE_ROUNDING = 1e-6, 1e-5
_OPTIONS = {MULTILABEL: "?interpolation=all", RETRIEVAL: "?caption_template={caption}"}


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    flags.DEFINE_string("model", None, "Work directory, weight file or released name.")
    flags.DEFINE_string("data", "runs/data", "Folder of the tars of pictures.")
    flags.DEFINE_string(
        "output", "runs/clip_benchmark_tasks", "Directory to make: folders, model and results."
    )
    flags.DEFINE_string("packages", None, "Folder of packages that CLIP_benchmark takes first.")


def main() -> None:
    """Runs the comparison, and writes `benchmarks/results/clip_benchmark_tasks.json`."""
    given = flags.FLAGS
    command_line.require_flags("model")
    output = pathlib.Path(given.output)
    for name in STANDINS:
        write_standin(name, output / name, pathlib.Path(given.data))
    export_model(given.model, "open_clip", str(output / "open_clip"))
    _run_theirs(output, given.packages)
    model = load_model(given.model)
    tasks = {name: compare_task(model, name, output) for name in STANDINS}
    print(_table(tasks))
    payload = {
        "packages": {
            name: importlib.metadata.version(name) for name in ("clip-benchmark", "open_clip_torch")
        },
        "model": given.model,
        "tasks": tasks,
    }
    print(write_result("clip_benchmark_tasks", payload))
    differing = [name for name, task in tasks.items() if not task["equal"]]
    if differing:
        print(f"error: not the same: {', '.join(differing)}", file=sys.stderr)
        sys.exit(1)


def _run_theirs(output: pathlib.Path, packages: str | None) -> None:
    """Runs CLIP_benchmark in a separate process without JAX."""
    root = str(pathlib.Path(__file__).parents[1])
    paths = [os.path.abspath(packages), root] if packages else [root]
    module = ["benchmarks.clip_benchmark_samples", str(output / "open_clip"), str(output)]
    done = subprocess.run(
        [sys.executable, "-m", *module, *(str(output / name) for name in STANDINS)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"python -m {module[0]} failed:\n{done.stderr[-2000:]}")


def compare_task(model: Any, name: str, output: pathlib.Path) -> dict[str, Any]:
    """Evaluates a folder, and compares the result with that of CLIP_benchmark.

    Args:
        model: a `LoadedModel`.
        name: a key of `STANDINS`.
        output: folder that contains the data folder, its npz and its json.

    Returns:
        `task`, `samples` (images, or queries and depths), the number of `different` ones,
        `largest_difference` of similarities, both sides' metrics, and whether all is `equal`.
    """
    standin = STANDINS[name]
    (task,) = parse_tasks(
        [f"{standin.task}=clip_benchmark:{output / name}{_OPTIONS.get(standin.kind, '')}"]
    )
    with np.load(output / f"{name}.npz") as file:
        theirs = dict(file)
    measured = PROTOCOLS[task.kind].run(task, Encoder(model, open_source(task)))
    samples, different, largest = _COMPARISONS[standin.kind](measured, theirs)
    metrics = measured.metrics
    written = json.loads((output / f"{name}.json").read_text())
    # Top-5 in CLIP_benchmark is NaN below five classes and 1 for five classes; we omit it.
    their_metrics = {_NAMES[key]: value for key, value in written.items() if _NAMES[key] in metrics}
    both = {key: metrics[key] for key in their_metrics}
    return {
        "task": task.name,
        "kind": task.kind,
        "samples": samples,
        "different": different,
        **({} if largest is None else {"largest_difference": largest}),
        "equal": not different
        and all(abs(both[key] - value) < _ROUNDING for key, value in their_metrics.items()),
        "ours": both,
        "clip_benchmark": their_metrics,
    }


# Number of samples, number that differ, and the largest difference of similarities.
_Found = tuple[int, int, float | None]


def _classification(measured: Measured, theirs: dict[str, np.ndarray]) -> _Found:
    result = measured.result
    np.testing.assert_array_equal(result.classes.labels, theirs["targets"])
    different = result.predictions != theirs["logits"].argmax(axis=1)
    return len(different), int(different.sum()), None


def _several_labels(measured: Measured, theirs: dict[str, np.ndarray]) -> _Found:
    ours, targets = measured.result
    np.testing.assert_array_equal(targets, theirs["targets"] == 1)
    other = theirs["logits"] / 100  # CLIP_benchmark's logit scale
    differences = np.abs(ours - other).max(axis=1)
    different = int((differences > _SCORE_ROUNDING).sum())
    return len(ours), different, float(differences.max())


def _retrieval(measured: Measured, theirs: dict[str, np.ndarray]) -> _Found:
    result = measured.result
    samples = different = 0
    for key, hits in theirs.items():
        way, _, k = key.partition("_r")
        ranks = result.t2i_ranks if way == "t2i" else result.i2t_ranks
        samples += len(hits)
        different += int(((ranks < int(k)) != hits).sum())
    return samples, different, None


_COMPARISONS = {
    CLASSIFICATION: _classification,
    MULTILABEL: _several_labels,
    RETRIEVAL: _retrieval,
}


def _table(tasks: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            folder,
            task["task"],
            f"{task['samples']:,}",
            str(task["different"]),
            ", ".join(f"{name} {100 * value:.2f}%" for name, value in task["ours"].items()),
            "equal" if task["equal"] else "NOT EQUAL",
        )
        for folder, task in tasks.items()
    ]
    return format_table(("folder", "task", "samples", "differ", "metrics", ""), rows, "llrrll")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
