"""Evaluates a model on a task, and defines the task of a run's held-out data.

A task combines a data source (`sources`) with a protocol that measures it (`protocols`). The model
may be a loaded one or the live parameters of a training run.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections
from absl import logging

from diht_jax.evaluation.embedding.encoding import Batching, EmbeddingModel, Encoder
from diht_jax.evaluation.embedding.entries import Processes, Units, divide
from diht_jax.evaluation.protocols.base import CAPTION_SLOT, Measured, Task
from diht_jax.evaluation.results import LEVEL, describe_samples, percentile_interval, resample
from diht_jax.evaluation.suite import TASKS_BY_NAME
from diht_jax.evaluation.task_parsing import (
    check_task,
    open_source,
    parse_config_tasks,
    parse_tasks,
)
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair
from diht_jax.records.shard_files import is_of_one_record
from diht_jax.records.train_data import (
    TrainSource,
    held_out_records,
    open_records,
    parse_train,
    resolve_source,
)
from diht_jax.storage.files import map_many

# Shows examples, given the task, its source, the measurement, its entry in the results file, and
# the logit scale. Returns the file that holds them, or None.
ShowExamples = Callable[[Task, Units, Measured, dict[str, Any], float], str | None]

__all__ = ["Task", "evaluate_task", "parse_config_tasks", "parse_tasks"]

# Name of the task on a run's held-out data.
VALIDATION = "validation"


def evaluate_task(
    model: EmbeddingModel,
    task: Task,
    *,
    units: Units | None = None,
    batch_size: int = 256,
    num_threads: int | None = None,
    limit: int | None = None,
    show: ShowExamples | None = None,
    num_resamples: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates a model on a task.

    Args:
        model: a `LoadedModel`, or anything with the same methods.
        task: the task to measure.
        units: source of the task, if already open (see `task_parsing.open_source`).
        batch_size: images, and texts, per batch over all devices.
        num_threads: decoding threads; None is one per core, at most 16.
        limit: use only the first `limit` entries of the source; None is all.
        show: shows the examples of the task, such as `page.ResultsPage.add`; None for none.
        num_resamples: bootstrap resamples for the intervals; 0 for no intervals.
        progress: show bars on stderr.

    Returns:
        JSON-able: the task's entry in the results file, described in
        docs/guides/evaluate/evaluate.md; shares are fractions of 1.

    Raises:
        ValueError: a source that cannot be read or lacks what the task needs.
    """
    start = time.perf_counter()
    protocol = check_task(task)
    if task.caption_template is None:
        task = dataclasses.replace(task, caption_template=training_template(model))
    units = open_source(task) if units is None else units
    try:
        batching = Batching(batch_size, num_threads, progress, Processes.of_job())
        encoder = Encoder(model, units, batching, limit=limit, name=task.name)
        measured = protocol.run(task, encoder)
    except ValueError as error:
        raise ValueError(f"task '{task.name}' ({task.source}): {error}") from error
    encoded = measured.encoded
    metrics = measured.metrics
    result = {
        "task": task.name,
        "kind": task.kind,
        "source": task.source,
        "protocol": measured.protocol,
        "metrics": metrics,
        "units": {name: protocol.metrics[name].unit for name in metrics},
        "counts": {**measured.counts, "limit": limit, "dropped": encoded.dropped},
        **measured.details,
    }
    entry = TASKS_BY_NAME.get(task.name)
    if entry is not None and entry.kind == task.kind:
        result["reported"] = [name for name in entry.metrics if name in metrics]
    if left_out := sum(encoded.dropped.values()):
        logging.warning(
            "task '%s': %d of %d entries left out, by reason %s; first keys: %s",
            task.name,
            left_out,
            left_out + len(encoded.notes),
            encoded.dropped,
            ", ".join(encoded.dropped_keys),
        )
    if num_resamples:
        result |= _intervals(measured, num_resamples, progress)
    page = None if show is None else show(task, units, measured, result, model.logit_scale)
    return {
        **result,
        "seconds": time.perf_counter() - start,
        "images_per_sec": len(encoded.notes) / encoded.seconds,
        "page": page,
    }


def _intervals(measured: Measured, num_resamples: int, progress: bool) -> dict[str, Any]:
    """Returns the entries of a task's result about confidence intervals."""
    size = measured.num_items
    samples = resample(measured.measure, size, num_resamples=num_resamples, progress=progress)
    intervals = (
        f"{LEVEL:.0%}, percentiles of {num_resamples:,} bootstrap resamples of the images with "
        "all that belongs to them; the classes and the gallery stay as they are"
    )
    ends = map(percentile_interval, samples.values())
    return {
        "protocol": {**measured.protocol, "intervals": intervals},
        "intervals": dict(zip(samples, ends, strict=True)),
        "resamples": describe_samples(samples, measured.encoded.digest, size),
    }


def training_template(model: EmbeddingModel) -> str:
    """Returns the text template that a model was trained with, such as "a photo of {caption}.".

    This is `data.text_template` of its run, or the template that all sources of a mixture share.
    For a model without a run it is "{caption}".
    """
    data = getattr(getattr(model, "config", None), "data", None)
    if data is None:
        return CAPTION_SLOT
    sources = data.train.values() if hasattr(data.train, "values") else ()
    templates = {source.get("text_template") or data.text_template for source in sources}
    return templates.pop() if len(templates) == 1 else data.text_template


def validation_tasks(config: ml_collections.ConfigDict) -> list[Task]:
    """Returns retrieval tasks on a run's held-out data, with captions as in training.

    Returns:
        One task per source: "validation" for a single source, "validation_NAME" for several. Empty
        if nothing is held out.
    """
    data = config.data
    if not data.get("validation_share"):
        return []
    return [
        Task(
            name=f"{VALIDATION}_{source.name}" if source.name else VALIDATION,
            kind="retrieval",
            source=f"{data.validation_share:.3g} of {source.path}",
            caption_template=source.text_template or data.text_template,
            open=functools.partial(_open_held_out, config, source),
        )
        for source in map(resolve_source, parse_train(data.train, data.get("labels")))
    ]


def _open_held_out(config: ml_collections.ConfigDict, source: TrainSource) -> Units:
    """Opens the held-out records of a source of `config.data.train`, in units of a few records."""
    records = open_records(source.path)
    held_out = held_out_records(records, config.data, config.seed)

    def read_one(number: int) -> Pair | Skipped:
        try:
            return records.decode(records[int(number)])
        except ValueError as error:
            if config.data.on_bad_record != "skip" or not is_of_one_record(error):
                raise
            path, place = records.locate(int(number))
            return Skipped(f"{path}: record {place}", "bad_row", str(error))

    def read(numbers: Iterable[int]) -> Iterator[Pair | Skipped]:
        return map_many(read_one, numbers)

    return Units(divide(held_out, read), lambda: len(held_out))
