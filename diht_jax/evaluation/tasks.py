"""Evaluating a model on a task.

A task is a data source with a protocol: `sources` reads the one, `protocols` measures by the other.
The model may be a loaded one or the live parameters of a training run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator
from typing import Any

from absl import logging

from diht_jax.evaluation.bootstrap import (
    describe_bootstrap,
    describe_samples,
    percentile_interval,
    resample,
)
from diht_jax.evaluation.embedding.encoding import Batching, EmbeddingModel, Encoder
from diht_jax.evaluation.embedding.entries import Entries, Processes, Units
from diht_jax.evaluation.prompts import CAPTION_SLOT
from diht_jax.evaluation.protocols.base import Measured, Task
from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.suite import TASKS_BY_NAME
from diht_jax.evaluation.task_parsing import check_task, parse_config_tasks, parse_tasks
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

# Shows the examples of a task, from the task, its source, what was measured, its entry in the
# results file, and the logit scale; returns the file that they are in, if they are in any.
ShowExamples = Callable[[Task, Units, Measured, dict[str, Any], float], str | None]

__all__ = ["Task", "evaluate_task", "parse_config_tasks", "parse_tasks"]


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
        task: what on.
        units: the task's source, where it was opened before (`task_parsing.check_source`).
        batch_size: images, and texts, a batch over all devices.
        num_threads: decoding threads; None is one per core.
        limit: number of entries of the source, from the first on; None is all.
        show: shows the examples of the task, such as `page.ResultsPage.add`; None for none.
        num_resamples: for bootstrap intervals; 0 leaves them out.
        progress: show bars on stderr.

    Returns:
        JSON-able: the task's entry in the results file, as docs/guides/evaluate/evaluate.md
        describes it; a share is a fraction of 1.

    Raises:
        ValueError: an unknown kind, a source that cannot be read or does not hold what the task
            needs.
    """
    start = time.perf_counter()
    protocol = check_task(task)
    if task.caption_template is None:
        task = dataclasses.replace(task, caption_template=training_template(model))
    try:
        if units is None:
            units = task.open_units()
        entries = Entries(units, limit=limit, name=task.name)
        batching = Batching(batch_size, num_threads, progress, Processes.of_job())
        measured = protocol.run(task, Encoder(model, entries, batching))
    except ValueError as error:
        raise ValueError(f"task '{task.name}' ({task.source}): {error}") from error
    encoded = measured.encoded
    result = _describe(task, measured, limit)
    if num_resamples:
        result |= _resampled(measured, num_resamples, progress)
    page = show(task, units, measured, result, model.logit_scale) if show is not None else None
    return {
        **result,
        "seconds": time.perf_counter() - start,
        "images_per_sec": len(encoded.notes) / encoded.seconds,
        "page": page,
    }


def _describe(task: Task, measured: Measured, limit: int | None) -> dict[str, Any]:
    """The task's entry in the results file, so far; entries that were left out are logged."""
    dropped, metrics = measured.encoded.dropped, measured.metrics
    left_out = sum(dropped.values())
    if left_out:
        logging.warning(
            "task '%s': %d of %d entries left out, by reason %s; first keys: %s",
            task.name,
            left_out,
            left_out + len(measured.encoded.notes),
            dropped,
            ", ".join(measured.encoded.dropped_keys),
        )
    known, entry = PROTOCOLS[task.kind].metrics, TASKS_BY_NAME.get(task.name)
    result = {
        "task": task.name,
        "kind": task.kind,
        "source": task.source,
        "protocol": measured.protocol,
        "metrics": metrics,
        "units": {name: known[name].unit for name in metrics},
        "counts": {**measured.counts, "limit": limit, "dropped": dropped},
        **measured.details,
    }
    if entry is not None and entry.kind == task.kind:
        result["reported"] = [name for name in entry.metrics if name in metrics]
    return result


def _resampled(measured: Measured, num_resamples: int, progress: bool) -> dict[str, Any]:
    """Intervals and resamples of a task's result, with the protocol that names them."""
    size, digest = measured.num_items, measured.encoded.digest
    samples = resample(measured.measure, size, num_resamples=num_resamples, progress=progress)
    return {
        "protocol": {**measured.protocol, "intervals": describe_bootstrap(num_resamples)},
        "intervals": {name: percentile_interval(values) for name, values in samples.items()},
        "resamples": describe_samples(samples, digest, size),
    }


def training_template(model: EmbeddingModel) -> str:
    """The text that a model was trained with for a caption, such as "a photo of {caption}.".

    `data.text_template` of its run, or what all sources of a mixture have in its place. "{caption}"
    for a model that comes without a run.
    """
    data = getattr(getattr(model, "config", None), "data", None)
    if data is None:
        return CAPTION_SLOT
    sources = data.train.values() if hasattr(data.train, "values") else ()
    templates = {source.get("text_template") or data.text_template for source in sources}
    return templates.pop() if len(templates) == 1 else data.text_template


def read_entries(task: Task) -> Generator[Pair | Skipped]:
    """The pairs of a task's source, with a `Skipped` and its reason for each that is unusable."""
    for unit in task.open_units():
        yield from unit()
