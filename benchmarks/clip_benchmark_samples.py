"""CLIP_benchmark's side of `benchmarks.clip_benchmark_tasks`: its results for every sample.

    python -m benchmarks.clip_benchmark_samples MODEL OUTPUT FOLDER...

Runs the functions of CLIP_benchmark's command on each folder, and writes OUTPUT/FOLDER.npz and the
metrics. It needs torch, CLIP_benchmark and, for the worst group and F1, WILDS, but not JAX. Results
per sample are recorded between CLIP_benchmark's own functions.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from clip_benchmark.models.open_clip import load_open_clip

_BATCH = 64


def main() -> None:
    """Evaluates every folder."""
    model_folder, output, *folders = sys.argv[1:]
    model, transform, tokenizer = load_open_clip(f"local-dir:{model_folder}", pretrained=None)
    model.eval()
    torch.set_num_threads(1)  # the models and batches are small
    for folder in map(pathlib.Path, folders):
        kind_file = folder / "dataset_type.txt"
        is_retrieval = kind_file.exists() and kind_file.read_text().strip() == "retrieval"
        task = "zeroshot_retrieval" if is_retrieval else "zeroshot_classification"
        dataset = build_dataset(
            f"wds/{folder.name}", root=str(folder), transform=transform, task=task
        )
        # Loads the folder like CLIP_benchmark's command.
        loader = torch.utils.data.DataLoader(dataset.batched(_BATCH), batch_size=None)
        measure = measure_retrieval if is_retrieval else measure_classification
        arrays, metrics = measure(model, loader, tokenizer, dataset)
        if (numbers := _numbers(folder)) is not None:
            metrics |= _wilds_metrics(arrays, numbers)
        np.savez(pathlib.Path(output) / f"{folder.name}.npz", **arrays)
        (pathlib.Path(output) / f"{folder.name}.json").write_text(json.dumps(metrics))


def measure_classification(
    model: Any, loader: Any, tokenizer: Any, dataset: Any
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Returns `logits` [n, C] and `targets`, with one or several labels; and the metrics."""
    loader.dataset.classes = dataset.classes
    found = {}

    def record(*args, **kwargs):
        found["logits"], found["targets"] = run(*args, **kwargs)
        return found["logits"], found["targets"]

    run = zeroshot_classification.run_classification
    with mock.patch.object(zeroshot_classification, "run_classification", record):
        metrics = zeroshot_classification.evaluate(
            model, loader, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
        )
    return {name: array.numpy() for name, array in found.items()}, metrics


def measure_retrieval(
    model: Any, loader: Any, tokenizer: Any, dataset: Any
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Returns whether each query is answered within k, by our metric names; and the metrics."""
    hits: list[np.ndarray] = []

    def record(*args, **kwargs):
        recalls = batchify(*args, **kwargs)
        hits.append((recalls > 0).numpy())
        return recalls

    ks = (1, 5, 10)
    batchify = zeroshot_retrieval.batchify
    with mock.patch.object(zeroshot_retrieval, "batchify", record):
        metrics = zeroshot_retrieval.evaluate(
            model, loader, tokenizer, "cpu", amp=False, recall_k_list=list(ks)
        )
    names = [f"{way}_r{k}" for k in ks for way in ("t2i", "i2t")]
    return dict(zip(names, hits, strict=True)), metrics


def _numbers(folder: pathlib.Path) -> torch.Tensor | None:
    """Reads the numbers of every KEY.npy like DataComp; None for other kinds of folders."""
    import webdataset

    if (folder / "dataset_type.txt").exists():
        return None
    shards = webdataset.WebDataset(str(folder / "test" / "0.tar"), shardshuffle=False).decode()
    rows = [sample["npy"] for sample in shards if "npy" in sample]
    return torch.from_numpy(np.stack(rows)) if rows else None


def _wilds_metrics(arrays: dict[str, np.ndarray], numbers: torch.Tensor) -> dict[str, float]:
    """Computes the worst group, by the first number, and macro F1 with the functions of WILDS."""
    from wilds.common import utils
    from wilds.common.metrics import metric as wilds_metric
    from wilds.common.metrics.all_metrics import F1, Accuracy

    def average(values: torch.Tensor, groups: torch.Tensor, num_groups: int) -> tuple[Any, Any]:
        """Averages each group like DataComp, which thereby replaces torch_scatter for WILDS."""
        counts = utils.get_counts(groups, num_groups)
        sums = torch.zeros(num_groups).scatter_(0, index=groups, src=values, reduce="add")
        return sums / counts, counts

    logits, labels = (torch.from_numpy(arrays[name]) for name in ("logits", "targets"))
    groups = numbers[:, 0].long()
    num_groups = int(groups.max()) + 1
    top5 = torch.topk(logits, 5, dim=1)[1]
    right = {"worst_group": logits.argmax(dim=1) == labels}
    right["worst_group_top5"] = (top5 == labels[:, None]).any(dim=1)
    found = {}
    with mock.patch.object(wilds_metric, "avg_over_groups", average):
        for name, hits in right.items():
            result = Accuracy(prediction_fn=None).compute_group_wise(
                hits.long(), torch.ones_like(labels), groups, num_groups
            )
            found[name] = float(result["acc_wg"])
    f1 = F1(prediction_fn=None, average="macro").compute(logits.argmax(dim=1), labels)
    return {**found, "f1_macro": float(f1["F1-macro_all"])}


if __name__ == "__main__":
    main()
