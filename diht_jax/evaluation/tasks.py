"""Evaluating a model on a task.

Called by the command (`diht_jax.evaluate`) and, with live parameters, by the training loop. A
task is a data source with a protocol; how a source is read is known to `diht_jax.data.readers`.
"""

from __future__ import annotations

import itertools
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from PIL import Image
from tqdm import tqdm

from diht_jax.data.images.decode import decode_rgb
from diht_jax.data.readers.base import Skipped
from diht_jax.data.records.schema import Pair
from diht_jax.evaluation import prompts
from diht_jax.evaluation.bootstrap import bootstrap_intervals, describe_bootstrap
from diht_jax.evaluation.embedding.encoding import EmbeddingModel
from diht_jax.evaluation.pages.classification import draw_classification_page
from diht_jax.evaluation.pages.page import ImageLoader
from diht_jax.evaluation.pages.retrieval import draw_retrieval_page
from diht_jax.evaluation.protocols import classification, retrieval
from diht_jax.evaluation.protocols.others import OTHER_KINDS, Measured
from diht_jax.evaluation.sources.registry import count_source, read_source
from diht_jax.evaluation.suite import CLASSIFICATION, RETRIEVAL, SUITE
from diht_jax.evaluation.task_parsing import Task, parse_tasks

__all__ = ["Task", "evaluate_task", "parse_tasks"]

# A confusion matrix of more classes is left out of the results: they should stay readable.
_MOST_CONFUSION_CLASSES = 50


def evaluate_task(
    model: EmbeddingModel,
    task: Task,
    *,
    batch_size: int = 256,
    num_threads: int | None = None,
    limit: int | None = None,
    page: str | pathlib.Path | None = None,
    num_resamples: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates a model on a task.

    Args:
        model: a `LoadedModel`, or anything with the same methods.
        task: what on.
        batch_size: images, and texts, a batch over all devices.
        num_threads: decoding threads; None is one per core.
        limit: only the first so many entries of the source; None is all.
        page: PNG to write with examples of a classification or retrieval; None writes nothing.
        num_resamples: for bootstrap intervals; 0 leaves them out.
        progress: show bars on stderr.

    Returns:
        JSON-able: `task`, `kind`, `source`, `protocol` (prompts, ties), `metrics` (fractions of
        1), `intervals` (metric -> [low, high], with `num_resamples`), `counts` (images, texts,
        dropped pairs by reason), `reported` (of a task by name: which of the metrics DiHT
        reports), `seconds` (wall time of all, compilation included),
        `images_per_sec` (reading, decoding and encoding of the images), `page`; for a
        classification also `per_class` and, up to 50 classes, `confusion`.

    Raises:
        ValueError: the source cannot be read, or does not hold what the task needs.
    """
    start = time.perf_counter()
    evaluate = _EVALUATORS[task.kind]
    try:
        with tqdm(
            itertools.islice(read_entries(task), limit),
            desc=task.name,
            unit=" images",
            disable=not progress,
            total=_count_entries(task, limit) if progress else None,
        ) as entries:
            result, measured, draw = evaluate(
                model,
                task,
                entries,
                batch_size=batch_size,
                num_threads=num_threads,
                progress=progress,
            )
    except ValueError as error:
        raise ValueError(f"task '{task.name}' ({task.source}): {error}") from error
    encoded = result.encoded
    if num_resamples:
        measured["protocol"]["intervals"] = describe_bootstrap(num_resamples)
        measured["intervals"] = bootstrap_intervals(
            result.resampled_metrics,
            result.num_items,
            num_resamples=num_resamples,
            progress=progress,
        )
    if encoded.dropped:
        logging.warning(
            "task '%s': %d of %d entries left out, by reason %s; first keys: %s",
            task.name,
            sum(encoded.dropped.values()),
            sum(encoded.dropped.values()) + len(encoded.positions),
            encoded.dropped,
            ", ".join(encoded.dropped_keys),
        )
    if page is not None and draw is not None:
        draw(pathlib.Path(page))
    measured["counts"]["limit"] = limit
    measured["counts"]["dropped"] = encoded.dropped
    return {
        "task": task.name,
        "kind": task.kind,
        "source": task.source,
        **measured,
        **_reported(task, measured["metrics"]),
        "seconds": time.perf_counter() - start,
        "images_per_sec": len(encoded.positions) / encoded.seconds,
        "page": None if page is None or draw is None else str(page),
    }


def _evaluate_retrieval(
    model: EmbeddingModel,
    task: Task,
    entries: Iterable[Pair | Skipped],
    **batching: Any,
) -> Measured:
    result = retrieval.retrieve(model, entries, task.caption_template, **batching)
    num_images, num_texts = len(result.i2t_ranks), len(result.t2i_ranks)
    measured = {
        "protocol": {
            "caption_template": task.caption_template,
            "text_to_image": "every caption is a query, its own image the only right answer",
            "image_to_text": "right when any caption of the image comes first",
            "ties": retrieval.TIES,
        },
        "metrics": result.metrics,
        "counts": {
            "images": num_images,
            "texts": num_texts,
            "different_texts": result.num_unique_texts,
        },
    }

    def draw(path: pathlib.Path) -> None:
        plain = task.caption_template == prompts.CAPTION_SLOT
        prompt = "no prompt" if plain else f"prompt “{task.caption_template}”"
        note = (
            f"{num_images:,} images and {num_texts:,} captions of {_short(task.source)}, {prompt}. "
            "Green is right, red is wrong."
        )
        title = f"Retrieval: {task.name}"
        draw_retrieval_page(result, _image_loader(task), path, title=title, note=note)

    return result, measured, draw


def _evaluate_classification(
    model: EmbeddingModel,
    task: Task,
    entries: Iterable[Pair | Skipped],
    **batching: Any,
) -> Measured:
    result = classification.classify(
        model,
        entries,
        task.class_names,
        task.templates,
        label_field=task.label_field,
        **batching,
    )
    names, per_class = result.classes.names, result.per_class()
    measured = {
        "protocol": {
            "class_names_from": result.classes.origin,
            "label_field": task.label_field or "label",
            "templates": list(result.templates),
            "text_embedding": "normalised, averaged over the templates, normalised",
            "ties": classification.TIES,
        },
        "metrics": result.metrics,
        "counts": {
            "images": len(result.predictions),
            "classes": len(names),
            "classes_without_images": sum(not entry["images"] for entry in per_class),
            "texts": len(names) * len(result.templates),
        },
        "per_class": per_class,
    }
    if len(names) <= _MOST_CONFUSION_CLASSES:
        measured["confusion"] = result.confusion().tolist()

    def draw(path: pathlib.Path) -> None:
        number = len(result.templates)
        prompt = f"{number} prompts" if number > 1 else f"prompt “{result.templates[0]}”"
        draw_classification_page(
            result,
            _image_loader(task),
            path,
            logit_scale=model.logit_scale,
            title=f"Classification: {task.name}",
            note=(
                f"{len(result.predictions):,} images of {_short(task.source)}, {len(names):,} "
                f"classes, {prompt}. Green is right, red is wrong."
            ),
        )

    return result, measured, draw


def read_entries(task: Task) -> Iterator[Pair | Skipped]:
    """The pairs of a task's source, and in their place what is none, with its reason."""
    return read_source(task.source, task.source_options)


def _count_entries(task: Task, limit: int | None) -> int | None:
    """What the bar goes to."""
    known = [n for n in (count_source(task.source, task.source_options), limit) if n is not None]
    return min(known, default=None)


def _reported(task: Task, metrics: Mapping[str, float]) -> dict[str, list[str]]:
    """Which metrics of a task by name are the ones to report."""
    if task.name not in SUITE or task.kind != SUITE[task.name].kind:
        return {}
    return {"reported": [name for name in SUITE[task.name].metrics if name in metrics]}


def _image_loader(task: Task) -> ImageLoader:
    """Reads the source once more, instead of keeping all pictures of a first reading."""

    def load_images(positions: Sequence[int]) -> dict[int, Image.Image]:
        wanted = set(positions)
        entries = itertools.islice(read_entries(task), max(wanted) + 1)
        return {i: decode_rgb(entry.image) for i, entry in enumerate(entries) if i in wanted}

    return load_images


def _short(source: str) -> str:
    return source if source.startswith("tfds:") else pathlib.PurePath(source).name


_EVALUATORS = {
    CLASSIFICATION: _evaluate_classification,
    RETRIEVAL: _evaluate_retrieval,
    **OTHER_KINDS,
}
