"""The training loop: evaluate, save, then take the next batch, so that the saved place in the
data always matches the saved state.

Called by `diht_jax.train`, by the benchmarks and by the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from diht_jax import sharding
from diht_jax.config import default_config, duration_in_steps, validate_config
from diht_jax.data.pipeline import DecodeExample, TrainIterator, open_records
from diht_jax.evaluation.tasks import evaluate_task, parse_tasks
from diht_jax.inference import LoadedModel
from diht_jax.models.parameters import model_definition, parameter_shapes
from diht_jax.models.positions import fit_positions
from diht_jax.models.zoo import get_architecture
from diht_jax.training import checkpoint
from diht_jax.training.metrics import MetricWriter, flatten_results, mean_scalars, plot_curves
from diht_jax.training.optimizer import create_optimizer, learning_rate_schedule
from diht_jax.training.state import TrainState, abstract_state, create_state
from diht_jax.training.step import TrainStep

# A run that goes on under other values of these is no continuation of the same run.
_FIXED_IN_A_RUN = ("model", "loss", "optimizer", "data", "seed", "total_")
_FREE_IN_A_RUN = ("data.train", "data.num_workers", "data.prefetch_batches")


def train(
    config: ml_collections.ConfigDict,
    workdir: str | epath.Path,
    *,
    stop_after_steps: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainState:
    """Trains, or goes on training, the run in `workdir`.

    Args:
        config: a full training config (`diht_jax.config.default_config`).
        workdir: receives checkpoints, config, metrics and curves.
        stop_after_steps: ends early, saved, as if interrupted there; the schedule is still that
            of the whole run.
        devices: to train on; all of the job by default.

    Returns:
        The last state.

    Raises:
        ValueError: the config is wrong, or is not that of the run in `workdir`.
    """
    validate_config(config, default_config())
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    check_same_run(config, workdir)
    checkpoint.write_config(workdir, config)
    run = Run(config, workdir, devices)
    try:
        return run.loop(stop_after_steps)
    finally:
        run.close()


def check_same_run(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Refuses to mix two runs in one directory; names the keys that differ."""
    if not (workdir / checkpoint.CONFIG_FILE).exists():
        return
    changed = checkpoint.changed_keys(
        checkpoint.read_config(workdir),
        config,
        lambda name: name.startswith(_FIXED_IN_A_RUN) and name not in _FREE_IN_A_RUN,
    )
    if changed and (workdir / checkpoint.CHECKPOINT_DIRECTORY).exists():
        raise ValueError(
            f"{workdir} holds a run with another config; changed: {', '.join(changed)}. "
            "Take the same values to resume it, or another --workdir to start anew"
        )


class Run:
    """One process's part of a run: what the loop needs, built from the config."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: epath.Path,
        devices: Sequence[jax.Device] | None = None,
    ):
        self.config = config
        self.workdir = workdir
        self.mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp, devices)
        if config.data.batch_size % self.mesh.size:
            raise ValueError(
                f"config.data.batch_size={config.data.batch_size} is no multiple of the "
                f"{self.mesh.size} devices"
            )
        self.arch = get_architecture(config.model.name, config.model.overrides.to_dict())
        source = open_records(config.data.train)
        self.total_steps = duration_in_steps(
            config, "total", batch_size=config.data.batch_size, num_examples=len(source)
        )
        schedule = learning_rate_schedule(config.optimizer, self.total_steps)
        optimizer = create_optimizer(config.optimizer, schedule)
        self.graphdef, init_params = model_definition(
            self.arch, config.model.dtype, config.model.param_dtype
        )
        self.iterator = TrainIterator(
            source,
            DecodeExample(
                self.arch.image_size,
                self.arch.context_length,
                config.data.crop_scale,
                config.data.text_template,
            ),
            batch_size=config.data.batch_size,
            seed=config.seed,
            num_workers=config.data.num_workers,
            prefetch_batches=config.data.prefetch_batches,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.tasks = parse_tasks(config.evaluation.tasks.split(","))
        self.checkpointer = checkpoint.Checkpointer(
            workdir,
            keep_last=config.checkpoint.keep_last,
            best_metric=config.checkpoint.best_metric,
        )
        if self.checkpointer.latest_step is None:
            self.state = create_state(init_params, optimizer, self.mesh, config.seed)
            if config.model.init_from:
                self.state = self.state.replace(params=self.initial_parameters())
        else:
            target = abstract_state(init_params, optimizer, self.mesh)
            self.state = self.checkpointer.restore(target, self.iterator)
        self.start_step = int(self.state.step)
        self.step = TrainStep(self.graphdef, optimizer, schedule, self.mesh, config, self.state)
        self.writer = MetricWriter(workdir, self.start_step)
        self._model: LoadedModel | None = None
        self._log_start(len(source))

    def initial_parameters(self) -> dict[str, Any]:
        """Those of `config.model.init_from`, with image positions resized to this run's size."""
        trained = checkpoint.restore_model(self.config.model.init_from, self.mesh)
        num_patches = (self.arch.image_size // self.arch.patch_size) ** 2
        params = fit_positions(trained.params, num_patches)
        found, expected = parameter_shapes(params), parameter_shapes(self.state.params)
        names = found.keys() | expected.keys()
        wrong = sorted(name for name in names if found.get(name) != expected.get(name))
        if wrong:
            raise ValueError(
                f"config.model.init_from={self.config.model.init_from}: shapes differ from those "
                f"of '{self.config.model.name}' in {', '.join(wrong[:5])}"
            )
        logging.info("starts from step %d of %s", trained.step, self.config.model.init_from)
        return jax.device_put(params, sharding.tree_shardings(params, self.mesh))

    def loop(self, stop_after_steps: int | None) -> TrainState:
        """Trains up to the end of the run, or up to `stop_after_steps`."""
        config = self.config
        last_step = min(self.total_steps, stop_after_steps or self.total_steps)
        window = Window(config.data.batch_size)
        progress = tqdm(
            total=self.total_steps,
            initial=self.start_step,
            unit="step",
            disable=jax.process_index() != 0,
            dynamic_ncols=True,
        )
        in_flight = None
        for step in range(self.start_step + 1, last_step + 1):
            batch = window.timed(self.next_batch)
            self.state, metrics = self.step(self.state, batch)
            window.add(metrics)
            # Two steps in flight keep the device busy; more would only make the bar lie.
            jax.block_until_ready(in_flight)
            in_flight = metrics
            progress.update()
            at_end = step == last_step
            if step % config.log_every_steps == 0 or at_end:
                scalars = window.summary()
                progress.set_postfix_str(_progress_text(scalars))
                self.writer.write(step, scalars)
            every = config.evaluation.every_steps
            measured = None
            if self.tasks and ((every and step % every == 0) or step == self.total_steps):
                measured = window.excluded(lambda step=step: self.evaluate(step))
            if step % config.checkpoint.every_steps == 0 or at_end:
                self.checkpointer.save(self.state, self.iterator, measured)
        progress.close()
        if self.step.trace_count > 1:
            raise AssertionError(f"the step was traced {self.step.trace_count} times, not once")
        plot_curves(self.workdir)
        return self.state

    def next_batch(self) -> dict[str, jax.Array]:
        """The next global batch, on the devices."""
        return sharding.put_batch(next(self.iterator), sharding.batch_sharding(self.mesh))

    def evaluate(self, step: int) -> dict[str, float]:
        """Runs the config's tasks on the current parameters and writes their results."""
        if self._model is None:
            self._model = LoadedModel(
                self.graphdef,
                self.state.params,
                mesh=self.mesh,
                config=self.config,
                image_size=self.arch.image_size,
                context_length=self.arch.context_length,
                batch_size=self.config.evaluation.batch_size,
            )
        self._model.update(self.state.params, step)
        measured = flatten_results(
            {
                task.name: evaluate_task(
                    self._model, task, batch_size=self.config.evaluation.batch_size
                )["metrics"]
                for task in self.tasks
            }
        )
        logging.info("step %d: %s", step, _results_text(measured))
        self.writer.write(step, {f"evaluation/{name}": v for name, v in measured.items()})
        return measured

    def close(self) -> None:
        """Finishes the checkpoints and ends the workers."""
        self.iterator.close()
        self.checkpointer.close()
        self.writer.close()

    def _log_start(self, num_examples: int) -> None:
        num_params = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(self.state.params))
        logging.info(
            "%s: %.1fM parameters, %d records, %d steps of %d examples on %d x %s (mesh %s)",
            self.config.model.name,
            num_params / 1e6,
            num_examples,
            self.total_steps,
            self.config.data.batch_size,
            self.mesh.size,
            jax.devices()[0].device_kind,
            dict(self.mesh.shape),
        )
        sharding.log_placement(self.state.params, self.mesh)


class Window:
    """Measurements since the last line of the log: means, speed, waiting time."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._reset()

    def timed(self, get_batch: Callable[[], Any]) -> Any:
        """Calls `get_batch` and counts its time as waiting for data."""
        start = time.perf_counter()
        batch = get_batch()
        self._data_wait_secs += time.perf_counter() - start
        return batch

    def excluded(self, work: Callable[[], Any]) -> Any:
        """Calls `work` without counting its time against the training speed."""
        # Steps still running on the device belong to training, not to the excluded work.
        jax.block_until_ready(self._measured)
        start = time.perf_counter()
        result = work()
        self._start += time.perf_counter() - start
        return result

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Keeps one step's metrics, without waiting for them."""
        self._measured.append(metrics)

    def summary(self) -> dict[str, float]:
        """Means over the window, `images_per_sec`, `data_wait_secs`; starts the next window."""
        scalars = mean_scalars(self._measured)
        elapsed_secs = time.perf_counter() - self._start
        scalars["images_per_sec"] = len(self._measured) * self._batch_size / elapsed_secs
        scalars["data_wait_secs"] = self._data_wait_secs
        self._reset()
        return scalars

    def _reset(self) -> None:
        self._measured: list[dict[str, jax.Array]] = []
        self._data_wait_secs = 0.0
        self._start = time.perf_counter()


def _results_text(measured: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measured.items())


def _progress_text(scalars: dict[str, float]) -> str:
    return (
        f"loss {scalars['loss']:.3f}, acc {100 * scalars['t2i_accuracy']:.1f}%, "
        f"scale {scalars['logit_scale']:.1f}, {scalars['images_per_sec']:.0f} img/s"
    )
