"""Few-shot linear probing from the zero-shot classifier, and two other probes.

The first probe, and its baseline from scratch, are those of DiHT (arXiv 2301.02280, section
"Few-shot linear probing"). The third has a penalty on its distance from the prompts; the paper
remarks that such a probe ignores the supervision. Images are embedded once; `linear_probe` fits the
probes.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from diht_jax.evaluation.embedding.encoding import Batching, EmbeddingModel, Encoder
from diht_jax.evaluation.embedding.entries import Units
from diht_jax.evaluation.linear_probe import (
    FittedProbes,
    LabelledEmbeddings,
    ProbeSettings,
    fit_probes,
    probe_accuracy,
)
from diht_jax.evaluation.protocols import classification
from diht_jax.evaluation.protocols.base import Measured, Task
from diht_jax.evaluation.sources.registry import open_units
from diht_jax.terminal import ProgressBar

ALL = "all"
# Describes the protocol in the results file.
_IN_WORDS = {
    "prompt_init": "starts at logit scale x zero-shot classifier, moves inside the radii",
    "prompt_penalty": "starts there too; weight decay / 2 x squared distance from it",
    "radii_are": "fractions of the norm of the zero-shot classifier",
    "chosen_by": "accuracy on the validation split; among equals the more cautious",
    "spread": "standard deviation over the draws",
}
PROMPT_INIT, SCRATCH, PENALTY = "prompt_init", "scratch", "prompt_penalty"


@dataclasses.dataclass(frozen=True)
class FewShotOptions:
    """Settings of few-shot linear probing."""

    # Training images per class. "all" uses every image, in a single draw.
    shots: tuple[int | str, ...] = (1, 2, 4, 8, 16, ALL)
    num_draws: int = 5  # random draws; the k shots of a draw are contained in its 2k shots
    seed: int = 0  # of the draws and of the split
    # Share of each class's training images held out for validation if there is no validation
    # source; and the upper limit per class, None for no limit.
    validation_fraction: float = 0.2
    validation_per_class: int | None = None
    # The grid for ||W||_2, as fractions of the norm of the zero-shot classifier; and the grid for
    # ||b||_2, in logits.
    radii: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
    bias_radii: tuple[float, ...] = (0.0, 0.3, 1.0, 3.0)
    # The grid for the probe from scratch and for the penalty towards the prompts.
    weight_decays: tuple[float, ...] = tuple(10.0 ** (x / 2) for x in range(2, -15, -1))
    num_steps: int = 500  # gradient steps per fit
    # WiSE-FT of the classifier (arXiv 2109.01903): weights of the fitted classifier in its average
    # with the zero-shot classifier. Each average is evaluated.
    alphas: tuple[float, ...] = ()


class FewShotData(NamedTuple):
    """Embedded splits of a classification data set with its zero-shot classifier (C classes)."""

    train: LabelledEmbeddings  # shots are drawn from these
    validation: LabelledEmbeddings  # settings are chosen on these
    test: LabelledEmbeddings  # accuracy is reported on these
    zero_shot: np.ndarray  # float32 [d, C], embeddings of the prompts times the logit scale


def evaluate_few_shot(
    model: EmbeddingModel,
    train: Task,
    test: Task,
    validation: Task | None = None,
    options: FewShotOptions | None = None,
    batching: Batching | None = None,
) -> dict[str, Any]:
    """Measures few-shot accuracy of a model.

    Args:
        model: a `LoadedModel`, or anything with the same methods.
        train: classification task that shots are drawn from.
        test: task to report on; its class names, templates and label field are used.
        validation: task for choosing settings; by default a part of `train` is held out.

    Returns:
        JSON-able: `protocol`, `counts`, `zero_shot` and, for each number of shots, `results`; see
        `measure_few_shot`.

    Raises:
        ValueError: a source that cannot be read, has other classes or another label field than the
            test task, or has too few images.
    """
    options, batching = options or FewShotOptions(), batching or Batching()
    _check_label_fields((train, validation or train), test)
    start = time.perf_counter()
    tasks = [train, *([validation] if validation else []), test]
    splits, zero_shot = _embed(model, tasks, batching)
    found = zero_shot.result
    weights = found.classifier.T * np.float32(model.logit_scale)
    if validation is None:
        shots_from, held_out = split_by_class(splits[0], options)
        origin = f"{options.validation_fraction:g} of the training images of every class"
    else:
        shots_from, held_out = splits[0], splits[1]
        origin = validation.source
    data = FewShotData(shots_from, held_out, splits[-1], weights)
    embedded = time.perf_counter()
    measured = measure_few_shot(data, options, progress=batching.progress)
    return {
        "train": train.source,
        "test": test.source,
        "protocol": {
            **dataclasses.asdict(options),
            "validation": origin,
            "templates": list(found.templates),
            "class_names_from": found.classes.origin,
            **_IN_WORDS,
        },
        "counts": {
            "classes": len(found.classes.names),
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "dropped": zero_shot.encoded.dropped,
        },
        **measured,
        "seconds_embedding": embedded - start,
        "seconds_fitting": time.perf_counter() - embedded,
    }


def _check_label_fields(others: Sequence[Task], test: Task) -> None:
    for task in others:
        if task.label not in (None, test.label):
            raise ValueError(
                f"{task.source}: label={task.label}, and the test has its labels in "
                f"'{test.label or 'label'}'; all splits need them in one field"
            )


def measure_few_shot(
    data: FewShotData, options: FewShotOptions, *, progress: bool = False
) -> dict[str, Any]:
    """Runs the few-shot protocol on embeddings.

    Returns:
        `zero_shot`: {"test", "validation"}, fractions of 1; `results`: one entry for each number
        of shots with `shots`, `examples` (per draw), `draws` and, for "prompt_init", "scratch" and
        "prompt_penalty", `test` and `validation` (one value per draw), `test_mean`, `test_std`
        (None for one draw), `chosen` (one setting per draw). With alphas, the two probes that
        start from the prompts also have `wise_ft`: `alpha` and `test_mean` of each.
    """
    no_bias = np.zeros(data.zero_shot.shape[1], np.float32)
    zero_shot = {
        name: probe_accuracy(examples, data.zero_shot, no_bias)
        for name, examples in (("test", data.test), ("validation", data.validation))
    }
    norm = float(np.linalg.norm(data.zero_shot))
    decays = [ProbeSettings(weight_decay=x) for x in sorted(set(options.weight_decays))[::-1]]
    # The first setting, which allows no move, is the zero-shot classifier. With it in the grid the
    # choice cannot be worse on the validation split.
    radii, bias_radii = sorted({0.0, *options.radii}), sorted({0.0, *options.bias_radii})
    balls = [ProbeSettings(r * norm, b, 0.0) for r, b in itertools.product(radii, bias_radii)]
    methods = {
        PROMPT_INIT: (data.zero_shot, balls),
        SCRATCH: (np.zeros_like(data.zero_shot), decays),
        PENALTY: (data.zero_shot, decays),
    }
    results: list[dict[str, Any]] = []
    total = len(options.shots) * len(methods)
    with ProgressBar(desc="few-shot", unit=" fits", total=total, disable=not progress) as bar:
        for shots in options.shots:
            draws = draw_shots(data.train, shots, options)
            row: dict[str, Any] = {"shots": shots, "examples": len(draws[0]), "draws": len(draws)}
            for method, (start, settings) in methods.items():
                fitted = fit_probes(
                    draws, data.validation, start, settings, num_steps=options.num_steps
                )
                row[method] = _describe_fit(data, fitted)
                chosen = [settings[i] for i in fitted.chosen]
                row[method]["chosen"] = [
                    {
                        "radius": setting.radius,
                        "radius_fraction": setting.radius / norm,
                        "bias_radius": setting.bias_radius,
                    }
                    if method == PROMPT_INIT
                    else {"weight_decay": setting.weight_decay}
                    for setting in chosen
                ]
                if options.alphas and method != SCRATCH:
                    row[method]["wise_ft"] = _interpolate(data, fitted, options.alphas)
                bar.update()
            results.append(row)
    return {"zero_shot": zero_shot, "results": results}


def _describe_fit(data: FewShotData, fitted: FittedProbes) -> dict[str, Any]:
    """Returns the accuracies of the probes of all draws."""
    probes = zip(fitted.weights, fitted.bias, strict=True)
    test = [probe_accuracy(data.test, weights, bias) for weights, bias in probes]
    return {
        "test": test,
        "test_mean": statistics.fmean(test),
        "test_std": statistics.stdev(test) if len(test) > 1 else None,
        "validation": fitted.accuracy.max(axis=1).tolist(),
    }


def _interpolate(
    data: FewShotData, fitted: FittedProbes, alphas: Sequence[float]
) -> list[dict[str, float]]:
    """Returns test accuracies of the zero-shot classifier averaged with each draw's classifier."""
    rows, start = [], data.zero_shot
    for alpha in alphas:
        test = [
            probe_accuracy(data.test, start + alpha * (weights - start), alpha * bias)
            for weights, bias in zip(fitted.weights, fitted.bias, strict=True)
        ]
        rows.append({"alpha": alpha, "test_mean": statistics.fmean(test)})
    return rows


def split_by_class(
    examples: LabelledEmbeddings, options: FewShotOptions
) -> tuple[LabelledEmbeddings, LabelledEmbeddings]:
    """Splits examples into those that shots are drawn from and the validation split.

    Both have at least one example of every class; a class with a single example is a ValueError.
    """
    rng = np.random.default_rng(options.seed)
    kept, held_out = [], []
    for label, indices in _indices_by_class(examples.labels):
        if len(indices) < 2:
            raise ValueError(
                f"class {label} has a single training image; a validation split needs a second "
                "one, or a source of its own (--validation)"
            )
        order = rng.permutation(indices)
        count = min(max(1, round(options.validation_fraction * len(order))), len(order) - 1)
        most = options.validation_per_class
        held_out.append(order[: count if most is None else min(count, most)])
        kept.append(order[count:])
    train, validation = (examples.take(np.sort(np.concatenate(part))) for part in (kept, held_out))
    return train, validation


def draw_shots(
    examples: LabelledEmbeddings, shots: int | str, options: FewShotOptions
) -> list[LabelledEmbeddings]:
    """Draws `shots` examples of every class, `options.num_draws` times.

    Draw i with k shots is contained in draw i with more shots. A class with fewer examples
    contributes all of them. With "all" there is one draw, which has every example.
    """
    if isinstance(shots, str):
        return [examples]
    classes = _indices_by_class(examples.labels)
    short = [label for label, indices in classes if len(indices) < shots]
    if short:
        logging.warning(
            "%d of %d classes have fewer than %d training images and give all of theirs",
            len(short),
            len(classes),
            shots,
        )
    draws = []
    for draw in range(options.num_draws):
        rng = np.random.default_rng([options.seed, draw])
        picked = [rng.permutation(indices)[:shots] for _, indices in classes]
        draws.append(examples.take(np.concatenate(picked)))
    return draws


def format_few_shot(result: dict[str, Any]) -> str:
    """Formats a table of the test accuracies, in percent."""
    zero_shot = result["zero_shot"]["test"]
    lines = [
        f"zero-shot: {100 * zero_shot:.2f}%",
        f"{'shots':>6}  {'from the prompts':>18}  {'from scratch':>18}  {'L2 to the prompts':>18}",
    ]
    for row in result["results"]:
        line = f"{row['shots']:>6}"
        for method in (PROMPT_INIT, SCRATCH, PENALTY):
            mean, std = row[method]["test_mean"], row[method]["test_std"]
            cell = f"{100 * mean:.2f}%" + ("" if std is None else f" ± {100 * std:.2f}")
            line += f"  {cell:>18}"
        lines.append(line)
    for row in result["results"]:
        means = row[PROMPT_INIT].get("wise_ft", [])
        cells = [f"{mean['alpha']:g}: {100 * mean['test_mean']:.2f}%" for mean in means]
        lines += [f"{row['shots']:>6}  mean with zero-shot  {', '.join(cells)}"] if cells else []
    return "\n".join(lines)


def _embed(
    model: EmbeddingModel, tasks: Sequence[Task], batching: Batching
) -> tuple[list[LabelledEmbeddings], Measured]:
    """Embeds all sources in one pass, with shared classes and the prompts of the last task."""
    prompts = dataclasses.replace(tasks[-1], options={})  # all classes compete
    try:
        parts = [open_units(task.source, task.source_options) for task in tasks]

        def count() -> int | None:
            counts = [part.count_entries() for part in parts]
            known = [number for number in counts if number is not None]
            return sum(known) if len(known) == len(counts) else None

        units = Units(itertools.chain(*parts), count)
        measured = classification.run(prompts, Encoder(model, units, batching, name="images"))
    except ValueError as error:
        raise ValueError(f"{', '.join(task.source for task in tasks)}: {error}") from error
    encoded, found = measured.encoded, measured.result
    unit_of = np.array([unit for unit, _ in encoded.orders])
    stops = list(itertools.accumulate(map(len, parts)))
    splits = []
    for task, start, stop in zip(tasks, [0, *stops], stops, strict=False):
        chosen = np.flatnonzero((unit_of >= start) & (unit_of < stop))
        if not len(chosen):
            raise ValueError(f"{task.source}: no usable image")
        splits.append(LabelledEmbeddings(encoded.image_emb[chosen], found.classes.labels[chosen]))
    return splits, measured


def _indices_by_class(labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    return [(int(label), np.flatnonzero(labels == label)) for label in np.unique(labels)]
