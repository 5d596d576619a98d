"""Evaluating a model on a task.

A task is a data source with a protocol: `sources` reads the one, `protocols` measures by the other.
The model may be a loaded one or the live parameters of a training run.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
import typing
from collections.abc import Generator
from typing import Any

from absl import logging

from diht_jax.evaluation.bootstrap import (
    describe_bootstrap,
    describe_samples,
    percentile_interval,
    resample,
)
from diht_jax.evaluation.embedding.encoding import Batching, EmbeddingModel
from diht_jax.evaluation.embedding.entries import Entries, Processes, Units
from diht_jax.evaluation.prompts import CAPTION_SLOT
from diht_jax.evaluation.protocols.base import Measured, Task
from diht_jax.evaluation.suite import TASKS_BY_NAME
from diht_jax.evaluation.task_parsing import check_task, parse_config_tasks, parse_tasks
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair


class ExamplesPage(typing.Protocol):
    """A page that gets the examples of tasks, such as a `ResultsPage`."""

    @property
    def path(self) -> pathlib.Path | None:
        """Its file, if it is one."""

    def add(
        self,
        task: Task,
        units: Units,
        measured: Measured,
        result: dict[str, Any],
        logit_scale: float,
    ) -> bool:
        """Adds those of one task; returns whether `path` shows them."""
        ...


__all__ = ["Task", "evaluate_task", "parse_config_tasks", "parse_tasks"]


def evaluate_task(
    model: EmbeddingModel,
    task: Task,
    *,
    units: Units | None = None,
    batch_size: int = 256,
    num_threads: int | None = None,
    limit: int | None = None,
    page: ExamplesPage | None = None,
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
        page: gets the examples of a classification, retrieval or choice of captions; None for none.
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
        entries = Entries(units, limit=limit, bar=task.name if progress else None)
        batching = Batching(batch_size, num_threads, progress, Processes.of_job())
        measured = protocol.run(model, task, entries, batching)
    except ValueError as error:
        raise ValueError(f"task '{task.name}' ({task.source}): {error}") from error
    encoded, metrics = measured.encoded, measured.metrics
    if encoded.dropped:
        logging.warning(
            "task '%s': %d of %d entries left out, by reason %s; first keys: %s",
            task.name,
            sum(encoded.dropped.values()),
            sum(encoded.dropped.values()) + len(encoded.positions),
            encoded.dropped,
            ", ".join(encoded.dropped_keys),
        )
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
    if num_resamples:
        samples = resample(
            measured.measure, measured.num_items, num_resamples=num_resamples, progress=progress
        )
        result |= {
            "protocol": {**measured.protocol, "intervals": describe_bootstrap(num_resamples)},
            "intervals": {name: percentile_interval(values) for name, values in samples.items()},
            "resamples": describe_samples(samples, encoded.digest, measured.num_items),
        }
    entry = TASKS_BY_NAME.get(task.name)
    if entry is not None and entry.kind == task.kind:
        result["reported"] = [name for name in entry.metrics if name in metrics]
    is_drawn = page is not None and page.add(task, units, measured, result, model.logit_scale)
    return {
        **result,
        "seconds": time.perf_counter() - start,
        "images_per_sec": len(encoded.positions) / encoded.seconds,
        "page": str(page.path) if is_drawn else None,
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
