"""Measures a student: its metrics, and which test items it gets right.

    python -m benchmarks.lab.measure --measured scenes --model runs/lab/runs/cat_seed0 \\
        --tests '{"web": "runs/lab/data/web"}' --output measured.json

The runner calls it after every training. The results of single items, packed as one bit each, allow
a bootstrap over items and paired comparisons of two runs.
"""

from __future__ import annotations

import base64
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from absl import flags

from diht_jax import command_line
from diht_jax.readers.registry import open_source
from diht_jax.storage.files import write_bytes

RECALL_AT = 10
_PHOTO_TEMPLATES = ("a photo of a {}.",)

# Metrics in shares of 1, and the results of the test items for some of them. A metric with items is
# the mean over all of its lists.
Measured = tuple[dict[str, float], dict[str, list[Any]]]


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "Work directory of the student.")
    flags.DEFINE_string(
        "measured",
        None,
        "What is measured: scenes, sizes, composition, long, emoji, clipart, cifar10, averaged, "
        "unseen, unseen_k, amount, concepts or given.",
    )
    flags.DEFINE_string("tests", "{}", "JSON: folders of test data by their names.")
    flags.DEFINE_list("tasks", None, "As of diht_jax.evaluate; what is measured of 'given'.")
    flags.DEFINE_string("output", None, "JSON file to write.")


def main() -> None:
    """Loads a student, measures it, and writes the results."""
    from diht_jax.loading import load_model

    given = flags.FLAGS
    command_line.require_flags("model", "measured", "output")
    if given.measured not in MEASURES:
        raise ValueError(f"--measured={given.measured}: expected one of {', '.join(MEASURES)}")
    tests = {name: pathlib.Path(path) for name, path in json.loads(given.tests).items()}
    metrics, items = MEASURES[given.measured](load_model(given.model), tests)
    text = json.dumps({"metrics": metrics, "items": items})
    write_bytes(pathlib.Path(given.output), text.encode())


def measure_scenes(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures retrieval of held-out scenes, and shapes and colours of single objects."""
    web = tests["web"]
    metrics, items = _retrieve(model, web / "val_retrieval.tar", "scenes")
    for name in ("shape", "color"):
        templates = (web / f"val_{name}.templates.txt").read_text().splitlines()
        found = _classify(model, web / f"val_{name}.tar", name, templates)
        metrics, items = metrics | found[0], items | found[1]
    return metrics, items


def measure_composition(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures choices between right and wrong captions of held-out scenes; items are questions."""
    from benchmarks.lab.composition import REPLACEMENTS, SWAPS, ask
    from diht_jax.evaluation.embedding.encoding import Encoder
    from diht_jax.evaluation.protocols import caption_choice
    from diht_jax.evaluation.protocols.base import Task

    source = str(tests["web"] / "val_retrieval.tar")
    task = Task("composition", "caption_choice", source, caption_template="{caption}")
    found = caption_choice.run(task, Encoder(model, ask(open_source(source)))).result
    kinds = np.array([question.group for question in found.questions])
    metrics = {f"composition/{group['group']}": group["accuracy"] for group in found.per_group()}
    items = {}
    for name, chosen in (("swaps", SWAPS), ("replacements", REPLACEMENTS)):
        hits = found.is_right[np.isin(kinds, chosen)]
        metrics[f"composition/{name}"] = float(hits.mean())
        items[f"composition/{name}"] = [pack_bits(hits)]
    return metrics, items


def measure_sizes(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures retrieval of held-out scenes, with full and with truncated embeddings."""
    from benchmarks.lab.experiments import CUT_SIZES
    from diht_jax.loading import load_model

    source = tests["web"] / "val_retrieval.tar"
    metrics, items = _retrieve(model, source, "scenes")
    for size in CUT_SIZES:
        part = load_model(flags.FLAGS.model, dim=size)
        found = _retrieve(part, source, f"scenes_{size}")
        metrics, items = metrics | found[0], items | found[1]
    return metrics, items


def measure_long(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures retrieval of held-out scenes with short and with long texts."""
    metrics, items = _retrieve(model, tests["web"] / "val_retrieval.tar", "scenes")
    found = _retrieve(model, tests["long_scenes"] / "val_retrieval.tar", "long")
    return metrics | found[0], items | found[1]


def measure_emoji(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures retrieval of another artist's drawings."""
    return _retrieve(model, tests["shared"] / "emoji_twitter.tar", "emoji")


def measure_clipart(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures retrieval of held-out drawings with titles that name them."""
    return _retrieve(model, tests["clipart"] / "test.tar", "clipart")


def measure_concepts(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures retrieval of unseen concepts, on the test artist and on the validation artist."""
    metrics, items = _retrieve(model, tests["concepts"] / "test.tar", "concepts")
    found = _retrieve(model, tests["concepts"] / "validation.tar", "validation")
    return metrics | found[0], items | found[1]


def measure_amount(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures retrieval of held-out scenes, at the end of training and after fewer samples."""
    from benchmarks.lab.experiments import CURVE_SAMPLES
    from diht_jax.loading import load_model

    source = tests["web"] / "val_retrieval.tar"
    metrics, items = _retrieve(model, source, "scenes")
    for samples in CURVE_SAMPLES:
        step = samples // model.config.data.batch_size
        found = _retrieve(load_model(flags.FLAGS.model, step=step), source, f"scenes_{samples}")
        metrics, items = metrics | found[0], items | found[1]
    return metrics, items


def measure_photos(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures zero-shot top-1 accuracy on the test photos of CIFAR-10."""
    return _classify(model, tests["shared"] / "cifar10_test.tar", "cifar10", _PHOTO_TEMPLATES)


def measure_averaged(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures scenes and photos, for the student and for its mean with its initial model."""
    from diht_jax.average import average_models
    from diht_jax.loading import load_model

    metrics, items = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        models = (str(tests["start"]), flags.FLAGS.model)
        average_models(models, "wise_ft", f"{folder}/mean", alpha=0.5)
        for prefix, each in (("", model), ("averaged_", load_model(f"{folder}/mean"))):
            scenes = _retrieve(each, tests["web"] / "val_retrieval.tar", f"{prefix}scenes")
            photos = _classify(
                each, tests["shared"] / "cifar10_test.tar", f"{prefix}cifar10", _PHOTO_TEMPLATES
            )
            metrics |= scenes[0] | photos[0]
            items |= scenes[1] | photos[1]
    return metrics, items


def measure_few_shot(
    model: Any, tests: Mapping[str, pathlib.Path], *, is_chosen_on_k: bool = False
) -> Measured:
    """Measures few-shot accuracy on unseen combinations, by method and shots; items are draws.

    If `is_chosen_on_k`, the settings for k shots are chosen on k pictures per class, for at most 16
    shots.
    """
    from benchmarks.lab.experiments import FEW_SHOTS, SHOTS
    from data_prep.synthetic.captions import SHAPE_TEMPLATES
    from diht_jax.evaluation.few_shot import (
        PENALTY,
        PROMPT_INIT,
        SCRATCH,
        FewShotOptions,
        evaluate_few_shot,
    )
    from diht_jax.evaluation.task_parsing import parse_tasks

    folder = tests["unseen_shots"]
    train, test = (
        parse_tasks(f"classification:{folder / split}.tar", templates=SHAPE_TEMPLATES)[0]
        for split in ("train", "test")
    )
    options = [FewShotOptions(shots=SHOTS)]
    if is_chosen_on_k:
        options = [FewShotOptions(shots=(k,), validation_per_class=k) for k in FEW_SHOTS]
    results = [evaluate_few_shot(model, train, test, options=each) for each in options]
    metrics, items = {"zero_shot": results[0]["zero_shot"]["test"]}, {}
    for row in (row for result in results for row in result["results"]):
        for name, method in (("prompts", PROMPT_INIT), ("scratch", SCRATCH), ("penalty", PENALTY)):
            metrics[f"{name}_{row['shots']}"] = row[method]["test_mean"]
            items[f"{name}_{row['shots']}"] = [row[method]["test"]]
    items["zero_shot"] = [[metrics["zero_shot"]] * len(row[method]["test"])]
    return metrics, items


def measure_tasks(model: Any, tests: Mapping[str, pathlib.Path]) -> Measured:
    """Measures all metrics of the tasks in `--tasks`; does not keep their items."""
    from diht_jax.evaluation.task_parsing import parse_tasks
    from diht_jax.evaluation.tasks import evaluate_task

    results = [
        evaluate_task(model, task, num_resamples=0) for task in parse_tasks(flags.FLAGS.tasks)
    ]
    metrics = {f"{r['task']}/{name}": v for r in results for name, v in r["metrics"].items()}
    return metrics, {}


def _retrieve(model: Any, source: pathlib.Path, name: str) -> Measured:
    from diht_jax.evaluation.embedding.encoding import Encoder
    from diht_jax.evaluation.protocols import retrieval
    from diht_jax.evaluation.protocols.base import Task

    task = Task(name, "retrieval", str(source), caption_template="{caption}")
    measured = retrieval.run(task, Encoder(model, open_source(task.source)))
    found = measured.result
    hits = [found.t2i_ranks < RECALL_AT, found.i2t_ranks < RECALL_AT]
    metrics = {f"{name}/{metric}": value for metric, value in measured.metrics.items()}
    metrics[f"{name}/r{RECALL_AT}"] = float(np.mean([np.mean(each) for each in hits]))
    return metrics, {f"{name}/r{RECALL_AT}": [pack_bits(each) for each in hits]}


def _classify(model: Any, source: pathlib.Path, name: str, templates: Iterable[str]) -> Measured:
    from diht_jax.evaluation.embedding.encoding import Encoder
    from diht_jax.evaluation.protocols import classification
    from diht_jax.evaluation.protocols.base import Task

    task = Task(name, "classification", str(source), templates=tuple(templates))
    measured = classification.run(task, Encoder(model, open_source(task.source)))
    hits = pack_bits(measured.result.ranks == 0)
    return {f"{name}/top1": measured.metrics["top1"]}, {f"{name}/top1": [hits]}


def pack_bits(hits: np.ndarray) -> dict[str, Any]:
    """Packs booleans into their count and the base64 of their bits."""
    bits = np.packbits(np.asarray(hits, bool))
    return {"count": len(hits), "bits": base64.b64encode(bits.tobytes()).decode()}


def unpack_items(packed: Any) -> np.ndarray:
    """Unpacks the output of `pack_bits`, or a list of numbers, into float64 [n]."""
    if isinstance(packed, list):
        return np.asarray(packed, np.float64)
    bits = np.frombuffer(base64.b64decode(packed["bits"]), np.uint8)
    return np.unpackbits(bits, count=packed["count"]).astype(np.float64)


MEASURES: dict[str, Callable[[Any, Mapping[str, pathlib.Path]], Measured]] = {
    "scenes": measure_scenes,
    "composition": measure_composition,
    "emoji": measure_emoji,
    "clipart": measure_clipart,
    "cifar10": measure_photos,
    "averaged": measure_averaged,
    "unseen": measure_few_shot,
    "unseen_k": functools.partial(measure_few_shot, is_chosen_on_k=True),
    "amount": measure_amount,
    "concepts": measure_concepts,
    "sizes": measure_sizes,
    "long": measure_long,
    "given": measure_tasks,
}


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
