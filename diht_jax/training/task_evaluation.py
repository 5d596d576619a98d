"""Evaluation during a run: checks tasks at the start, and measures them on the current state.

A failing evaluation does not end the run: it is logged as an error and as `evaluation_failed` in
the metrics. Only errors that are known at the start (a source that cannot be opened, an unknown
`checkpoint.best_metric`) end the run, before its first step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL import Image

from diht_jax import sharding
from diht_jax.data.tokenizer import FileTokenizer
from diht_jax.evaluation.charts import draw_retrievals
from diht_jax.evaluation.embedding.entries import Unit
from diht_jax.evaluation.page import read_pictures, retrieval_examples
from diht_jax.evaluation.protocols.base import Measured
from diht_jax.evaluation.results import describe_metrics, named_metrics
from diht_jax.evaluation.task_parsing import check_task, open_source
from diht_jax.evaluation.tasks import (
    Task,
    evaluate_task,
    parse_config_tasks,
    validation_tasks,
)
from diht_jax.training.monitoring.metrics import MetricWriter, read_metrics
from diht_jax.training.multihost import check_same, check_together, gather_texts, share_from_first
from diht_jax.training.program import TrainProgram
from diht_jax.training.recipe import pictures_of
from diht_jax.training.step import TrainState
from diht_jax.training.workdir.checkpoint import BestStep
from diht_jax.weights.inference import LoadedModel
from diht_jax.weights.source import ModelFiles

FAILED = "evaluation_failed"
_PREFIX = "evaluation/"
_PICTURE_SIDE = 160  # pixels


def open_tasks(config: ml_collections.ConfigDict) -> list[Task]:
    """Returns the tasks of `config.evaluation.tasks`, and retrieval on the run's held-out data.

    Reads the first entry of each source, on all hosts.

    Raises:
        ValueError: on all hosts, if a task is wrong or its source cannot be read on one of them
            (names the task), or if no task reports `config.checkpoint.best_metric`.
    """

    def read() -> list[Task]:
        tasks: list[Task] = []
        if config.evaluation.tasks:
            tasks += parse_config_tasks(config.evaluation.tasks)
        for task in validation_tasks(config) if config.data.validation_share else ():
            if any(task.name == other.name for other in tasks):
                raise ValueError(
                    f"config.evaluation.tasks: '{task.name}' is what config.data.validation_share "
                    "holds out; give the other task another name"
                )
            tasks.append(task)
        best_metric = config.checkpoint.best_metric
        if best_metric is not None:
            known = [f"{task.name}/{name}" for task in tasks for name in check_task(task).metrics]
            if best_metric not in known:
                raise ValueError(
                    f"config.checkpoint.best_metric='{best_metric}' is not among the results of "
                    f"config.evaluation.tasks: {', '.join(known) or 'there are no tasks'}; set it "
                    "to one of these or to None, or config.data.validation_share for "
                    "'validation/t2i_r10'"
                )
        for task in tasks:
            check_source_opens(task)
        return tasks

    tasks = check_together(read)
    check_same(
        ", ".join(f"{task.name} ({task.kind})" for task in tasks),
        lambda kinds, _: (
            "config.evaluation.tasks: the processes have different tasks; give every host the "
            f"same command: {'; '.join(sorted(set(kinds)))}"
        ),
    )
    return tasks


def read_best(best_metric: str, tasks: list[Task], workdir: epath.Path) -> BestStep:
    """Reads the results of `config.checkpoint.best_metric` from a run's metrics.

    The first process reads them and shares them: on a network file system, files may become visible
    to the other processes later.
    """
    task_name, _, name = best_metric.rpartition("/")
    task = next(task for task in tasks if task.name == task_name)
    column = _PREFIX + best_metric
    rows = share_from_first(lambda: [row for row in read_metrics(workdir) if column in row])
    values = {int(row["step"]): row[column] for row in rows}
    return BestStep(check_task(task).metrics[name].lower_is_better, values)


def note_result(
    config: ml_collections.ConfigDict, best: BestStep, step: int, measured: dict[str, float]
) -> None:
    """Records a step's result; warns if it was not measured, such as top-5 of four classes."""
    name = config.checkpoint.best_metric
    if name in measured:
        best.values[step] = measured[name]
    else:
        logging.warning(
            "step %d cannot be the best: config.checkpoint.best_metric='%s' is none of what was "
            "measured: %s",
            step,
            name,
            ", ".join(measured) or "nothing",
        )


def log_best(config: ml_collections.ConfigDict, best: BestStep, steps: Sequence[int]) -> None:
    """Logs, at the end of a run, which saved step is the best and how to use it."""
    step = best.step(steps)
    if step is not None:
        value = best.values[step]
        flags = f"--step={step}" + (" --ema" if config.evaluation.use_ema else "")
        name = config.checkpoint.best_metric
        logging.info("best %s: %.4g after step %d (%s)", name, value, step, flags)


def check_source_opens(task: Task) -> None:
    """Checks that the first entry of a task's source can be read."""
    try:
        with contextlib.closing(open_source(task).entries()) as entries:
            if next(entries, None) is None:
                raise ValueError("it has no entries")
    except Exception as error:  # the type depends on the reader and the storage
        raise ValueError(
            f"task '{task.name}' of config.evaluation.tasks cannot be evaluated: its source "
            f"{task.source} cannot be read: {error}. Other tasks are set by "
            "config.evaluation.tasks, none by '', which takes config.checkpoint.best_metric=None"
        ) from error


@dataclasses.dataclass
class RunEvaluation:
    """Evaluates the states of a run on its tasks."""

    config: ml_collections.ConfigDict
    tasks: list[Task]
    program: TrainProgram
    writer: MetricWriter
    total_steps: int
    tokenizer: FileTokenizer | None = None
    _model: LoadedModel | None = None

    def is_due(self, step: int) -> bool:
        """Returns whether to evaluate the state after this step."""
        every = self.config.evaluation.every_steps
        at_end = step == self.total_steps
        return bool(self.tasks) and (at_end or bool(every and step % every == 0))

    def run(self, state: TrainState) -> dict[str, float]:
        """Runs the tasks and writes their results.

        A failing task is skipped. In a job of several processes, an error after the source was
        opened may leave them at different points, so it ends them. By then it is in the metrics,
        and the resumed run does not evaluate this step again.

        Args:
            state: state after a step; already saved.

        Returns:
            The results, keyed by "TASK/METRIC".
        """
        step = int(state.step)
        model = self._updated_model(state, step)
        show = functools.partial(_track_examples, self.writer, step)
        results, num_failed = [], 0
        for task in self.tasks:
            try:
                check_together(check_source_opens, task)
            except ValueError as error:
                num_failed += 1
                _log_failure(step, task, error)
                continue
            try:
                result = evaluate_task(
                    model,
                    task,
                    batch_size=self.config.evaluation.batch_size,
                    show=show if self.writer.takes_pictures else None,
                )
                results.append(result)
            except Exception as error:
                num_failed += 1
                if jax.process_count() > 1:
                    self._write(step, {}, num_failed)
                    raise
                _log_failure(step, task, error)
        measured = named_metrics(results)
        if results:
            logging.info("step %d: %s", step, "; ".join(map(describe_metrics, results)))
        self._write(step, measured, num_failed)
        return measured

    def is_missing(self, step: int, workdir: epath.Path) -> bool:
        """Returns whether the metrics lack a due evaluation; all processes must call it."""
        if not self.is_due(step):
            return False
        rows = [row for row in read_metrics(workdir) if row["step"] == step]
        found = any(name == FAILED or name.startswith(_PREFIX) for row in rows for name in row)
        return not gather_texts("found" if found else "")[0]

    def _updated_model(self, state: TrainState, step: int) -> LoadedModel:
        """Returns the model with the parameters to evaluate; compiled once per run."""
        params = state.ema_params if self.config.evaluation.use_ema else state.params
        mesh = self.program.mesh
        if mesh.is_multi_process:  # each process embeds its share on its local devices
            mesh = sharding.create_mesh(data=1, fsdp=-1, devices=jax.local_devices())
            params = _copy_to(mesh, params)
        if self._model is None:
            model = ModelFiles(
                self.program.arch,
                params,
                "the run",
                preprocessing=pictures_of(self.config),
                config=self.config,
                tokenizer=self.tokenizer,
            )
            batch_size = self.config.evaluation.batch_size
            self._model = LoadedModel(self.program.definition, model, mesh, batch_size=batch_size)
        self._model.update(params, step)
        return self._model

    def _write(self, step: int, measured: dict[str, float], num_failed: int) -> None:
        row = {f"{_PREFIX}{name}": value for name, value in measured.items()}
        self.writer.write(step, {**row, **({FAILED: num_failed} if num_failed else {})})
        self.writer.sync()


def _track_examples(
    writer: MetricWriter,
    step: int,
    task: Task,
    units: Sequence[Unit],
    measured: Measured,
    result: dict[str, Any],
    logit_scale: float,
) -> None:
    """Draws examples of a retrieval task, with the same queries in each evaluation.

    Logs a warning if the pictures cannot be read again.
    """
    if task.kind != "retrieval":
        return

    def load(rows: Sequence[int]) -> dict[int, Image.Image]:
        return read_pictures(units, measured.encoded, rows, _small)

    try:
        picture = draw_retrievals(retrieval_examples(task, measured, load, logit_scale))
    except Exception as error:  # from the source's reader or storage
        logging.warning("no picture of task '%s': %s", task.name, error)
        return
    writer.write_picture(step, f"retrievals/{task.name}", picture)


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    return small


def _copy_to(mesh: Mesh, params: Any) -> Any:
    """Copies parameters that are sharded over all processes to the devices of this one."""
    shardings = sharding.tree_shardings(params, mesh)
    return jax.tree.map(
        lambda leaf, to: jax.device_put(multihost_utils.process_allgather(leaf, tiled=True), to),
        params,
        shardings,
    )


def _log_failure(step: int, task: Task, error: Exception) -> None:
    logging.error(
        "step %d: the evaluation of task '%s' failed, and the run goes on: %s",
        step,
        task.name,
        str(error) or type(error).__name__,
    )
