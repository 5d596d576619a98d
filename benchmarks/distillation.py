"""Effect of concept distillation on a small student: CIFAR-10, an ImageNet teacher, several seeds.

    python -m benchmarks.distillation --data runs/data --workdir runs/distillation

There are three sets of captions for the same 4,000 photos: `given` ("a photo of a dog."), `noisy`,
where half of the photos have the caption of another one, and `described`, with the colours of the
photo ("a dark brown dog on a green background"). `data_prep.label` labels each set with
EfficientNet-Lite0. The student of `configs/demo.py` is trained on it for the same number of
samples, with and without the two concept losses, for every seed. The metric is zero-shot top-1 on
the 1,000 test photos. Prints mean and spread, writes `benchmarks/results/distillation.json`, and
resumes when started again.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import pathlib
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags, logging

from benchmarks.record import write_result
from diht_jax import command_line
from diht_jax.input import transforms
from diht_jax.readers.registry import open_source
from diht_jax.records.schema import Pair

CAPTIONS = ("given", "noisy", "described")
ARMS = ("contrastive", "distilled")  # without and with the concept losses

LABELLED = "labelled"

# Packages that do the work in separate processes.
_PACKAGES = ("jax", "flax", "optax", "torch", "efficientnet_lite_pytorch")

# Colour names and their RGB values; a colour gets the nearest name.
_COLORS = {
    "red": (170, 50, 40),
    "orange": (200, 120, 50),
    "brown": (110, 80, 55),
    "yellow": (205, 185, 80),
    "green": (85, 115, 60),
    "blue": (80, 120, 175),
    "white": (225, 225, 225),
    "gray": (130, 130, 130),
    "black": (35, 35, 35),
}


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("data", None, "Folder with cifar10_train.tar and cifar10_test.tar.")
    flags.DEFINE_string("workdir", None, "Where data, runs and results of the trial lie.")
    flags.DEFINE_list("captions", list(CAPTIONS), "Sets of captions to try.")
    flags.DEFINE_integer("seeds", 3, "Runs of each kind.")
    flags.DEFINE_integer("examples", 61_440, "Samples that a run sees.")
    flags.DEFINE_float("weight", 1.0, "Of both concept losses, in the distilled runs.")


def main() -> None:
    """Prepares, labels, trains and evaluates, and prints the results."""
    values = flags.FLAGS
    if not values.data or not values.workdir:
        raise ValueError("--data and --workdir are required")
    data, workdir = pathlib.Path(values.data), pathlib.Path(values.workdir)
    rows = []
    for captions in values.captions:
        folder = workdir / captions
        runs = {arm: [folder / f"{arm}_{seed}" for seed in range(values.seeds)] for arm in ARMS}
        if not all(results_of(run).exists() for run in (*runs[ARMS[0]], *runs[ARMS[1]])):
            prepare(captions, data / "cifar10_train.tar", folder)
        for arm in ARMS:
            weight = values.weight if arm == "distilled" else 0.0
            scores = []
            for seed, run in enumerate(runs[arm]):
                if not results_of(run).exists():
                    train_and_evaluate(
                        run,
                        folder / LABELLED,
                        data / "cifar10_test.tar",
                        seed,
                        weight,
                        values.examples,
                    )
                scores.append(read_top1(run))
                logging.info("%s, %s, seed %d: top-1 %.3f", captions, arm, seed, scores[-1])
            rows.append(as_row(captions, arm, scores))
    differences = compare_seeds(rows)
    print(format_rows(rows, differences))
    payload = {
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "examples": values.examples,
        "weight": values.weight,
        "rows": rows,
        "distilled_minus_contrastive": differences,
    }
    logging.info("written to %s", write_result("distillation", payload))


def prepare(captions: str, source: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the labelled shards of one set of captions."""
    folder.mkdir(parents=True, exist_ok=True)
    tar = folder / "pairs.tar"
    if not tar.exists():
        write_pairs(tar, relabel(list(open_source(str(source))), captions))
    run_command(
        "data_prep.filter",
        "--config=configs/prep/convert.py",
        "--config.concepts=True",
        f"--config.input={tar}",
        f"--config.output={folder / 'records'}",
    )
    run_command(
        "data_prep.label",
        "--config=configs/prep/concepts_efficientnet.py",
        f"--config.input={folder / 'records'}",
        f"--config.output={folder / LABELLED}",
    )


def relabel(pairs: list[Pair], captions: str) -> Iterator[tuple[Pair, str]]:
    """Yields the pairs with their captions in a set of captions."""
    others = list(range(len(pairs)))
    if captions == "noisy":
        rng = np.random.default_rng(0)
        exchanged = rng.permutation(len(pairs))[: len(pairs) // 2]
        for index, other in zip(exchanged, np.roll(exchanged, 1), strict=True):
            others[index] = other
    for pair, other in zip(pairs, others, strict=True):
        yield pair, describe(pair) if captions == "described" else pairs[other].caption


def describe(pair: Pair) -> str:
    """Makes a caption of the class, and the colours of the photo's centre and border."""
    pixels = np.asarray(transforms.decode_rgb(pair.image), np.float64)
    margin = pixels.shape[0] // 8
    middle = pixels[2 * margin : -2 * margin, 2 * margin : -2 * margin].reshape(-1, 3)
    border = np.concatenate([pixels[:margin].reshape(-1, 3), pixels[-margin:].reshape(-1, 3)])
    shade = "dark" if middle.mean() < 90 else "bright" if middle.mean() > 160 else ""
    thing = " ".join(word for word in (shade, name_color(middle), pair.metadata["label"]) if word)
    return f"a {thing} on a {name_color(border)} background"


def name_color(pixels: np.ndarray) -> str:
    """Returns the name of the median colour of pixels [n, 3]."""
    median = np.median(pixels, axis=0)
    return min(_COLORS, key=lambda name: float(np.sum((median - _COLORS[name]) ** 2)))


def write_pairs(path: pathlib.Path, pairs: Any) -> None:
    """Writes (pair, caption) tuples as a webdataset tar."""
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for pair, caption in pairs:
            for ending, content in (("jpg", pair.image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{pair.key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    part.rename(path)


def train_and_evaluate(
    run: pathlib.Path,
    labelled: pathlib.Path,
    test: pathlib.Path,
    seed: int,
    weight: float,
    examples: int,
) -> None:
    """Trains and evaluates one run."""
    run_command(
        "diht_jax.train",
        "--config=configs/demo.py",
        f"--config.seed={seed}",
        f"--config.data.train={labelled}",
        f"--config.total_examples={examples}",
        "--config.data.batch_size=128",
        "--config.data.crop_scale=(0.5, 1.0)",
        f"--config.concepts.object_weight={weight}",
        f"--config.concepts.attribute_weight={weight}",
        "--config.concepts.num_objects=64",
        "--config.concepts.num_attributes=64",
        f"--workdir={run}",
    )
    run_command(
        "diht_jax.evaluate",
        f"--model={run}",
        f"--tasks=cifar10=classification:{test}?templates=a photo of a {{}}.",
        f"--output={results_of(run)}",
        "--nopages",
    )


def results_of(run: pathlib.Path) -> pathlib.Path:
    """Returns the path of a run's results."""
    return run.with_suffix(".json")


def read_top1(run: pathlib.Path) -> float:
    """Reads zero-shot top-1 of a run."""
    return json.loads(results_of(run).read_text())["results"][0]["metrics"]["top1"]


def run_command(module: str, *arguments: str) -> None:
    """Runs one of the project's commands; prints its output only if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}:\n{done.stdout}\n{done.stderr}")


def as_row(captions: str, arm: str, scores: list[float]) -> dict[str, Any]:
    """Computes mean and spread of one kind of run."""
    return {
        "captions": captions,
        "arm": arm,
        "top1": scores,
        "mean": statistics.mean(scores),
        "stdev": statistics.stdev(scores) if len(scores) > 1 else None,
    }


def compare_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compares the arms seed by seed: equal seeds share the initialisation and the data order."""
    top1 = {(row["captions"], row["arm"]): row["top1"] for row in rows}
    differences = []
    for captions in dict.fromkeys(row["captions"] for row in rows):
        pairs = zip(*(top1[captions, arm] for arm in ARMS), strict=True)
        scores = [distilled - contrastive for contrastive, distilled in pairs]
        differences.append(as_row(captions, "difference", scores))
    return differences


def format_rows(rows: list[dict[str, Any]], differences: list[dict[str, Any]]) -> str:
    """Formats a table of all rows and of the differences."""
    lines = [f"{'captions':10s}  {'student':12s}  top-1, mean and standard deviation"]
    for row in [*rows, *differences]:
        spread = "" if row["stdev"] is None else f" +- {100 * row['stdev']:.1f}"
        lines.append(
            f"{row['captions']:10s}  {row['arm']:12s}  {100 * row['mean']:.1f}{spread} "
            f"({', '.join(f'{100 * score:.1f}' for score in row['top1'])})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
