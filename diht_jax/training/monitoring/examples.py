"""Pictures of what a model finds while it is trained, for the trackers of its run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import logging
from PIL import Image

from diht_jax.evaluation.charts import draw_retrievals
from diht_jax.evaluation.embedding.entries import Unit
from diht_jax.evaluation.page import read_pictures, retrieval_examples
from diht_jax.evaluation.protocols.base import Measured, Task
from diht_jax.training.monitoring.metrics import MetricWriter

_SIDE = 160  # pixels


class TrackedExamples:
    """Draws the examples of retrieval tasks: the same queries after each evaluation."""

    path = None

    def __init__(self, writer: MetricWriter, step: int):
        """Takes the writer that gets the pictures, and the step that is evaluated."""
        self._writer = writer
        self._step = step

    def add(
        self,
        task: Task,
        units: Sequence[Unit],
        measured: Measured,
        result: dict[str, Any],
        logit_scale: float,
    ) -> bool:
        """Draws those of one task; a warning where its pictures cannot be read once more."""
        if task.kind != "retrieval":
            return False

        def load(rows: Sequence[int]) -> dict[int, Image.Image]:
            return read_pictures(units, measured.encoded, rows, _small)

        try:
            picture = draw_retrievals(retrieval_examples(task, measured, load, logit_scale))
        except Exception as error:  # of the source's reader, or of its storage
            logging.warning("no picture of task '%s': %s", task.name, error)
            return False
        self._writer.write_picture(self._step, f"retrievals/{task.name}", picture)
        return False


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    return small
