"""The training loop: save, evaluate, then take the next batch.

This order ensures that the saved position in the data matches the saved state.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Sequence

import jax
import ml_collections
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from diht_jax import sharding
from diht_jax.input.pipeline import StoppedWaiting
from diht_jax.records.train_data import parse_train
from diht_jax.terminal import ProgressBar
from diht_jax.training import recipe, task_evaluation
from diht_jax.training.initial_parameters import (
    bind_architecture,
    check_stage,
    end_of_stage,
    initial_parameters,
)
from diht_jax.training.monitoring import anomalies, throughput
from diht_jax.training.monitoring.metrics import MetricWriter, WallTime, plot_curves
from diht_jax.training.monitoring.trackers import check_trackers
from diht_jax.training.multihost import (
    Stopped,
    StopRequest,
    check_together,
    without_memory_is_lasting,
)
from diht_jax.training.objective import bind_data
from diht_jax.training.program import (
    TrainStep,
    log_start,
    trusted_program,
    without_patch_dropout,
)
from diht_jax.training.step import TrainState, initial_average
from diht_jax.training.workdir import opening
from diht_jax.training.workdir.checkpoint import Checkpointer
from diht_jax.training.workdir.opening import bind_records, open_data, open_iterator
from diht_jax.training.workdir.saved_run import (
    keep_tokenizer,
    open_tokenizer,
    steps_of_run,
    write_config,
)


def train(
    config: ml_collections.ConfigDict,
    workdir: str | epath.Path,
    *,
    stop_after_steps: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    set_keys: Collection[str] | None = None,
    began: float | None = None,
) -> TrainState:
    """Starts or resumes the training run in `workdir`.

    Args:
        config: a full training config (`diht_jax.config.default_config`).
        workdir: path or store URL for checkpoints, config, metrics and curves.
        stop_after_steps: saves and stops early, as if interrupted there; the schedule remains that
            of the whole run.
        devices: devices to train on; by default all devices of the job.
        set_keys: keys that `config.model.init_from` must not override with its architecture; see
            `initial_parameters.bind_architecture`.
        began: `time.monotonic()` at the start of the process, for the accounting of wall time;
            now by default.

    Returns:
        The final state.

    Raises:
        ValueError: the config is wrong or differs from that of the run in `workdir`; another run
            uses `workdir`, or it is not writable; the data have changed; a checkpoint cannot be
            read, or the last one not written; the first step does not fit into memory.
        DivergedError: too many updates in a row were not finite.
        Stopped: a signal arrived, and the state is saved.
    """
    recipe.check_config(config)
    parse_train(config.data.train, config.data.labels)
    opening.check_hosts_share_config(config)
    with contextlib.ExitStack() as stack:
        # Entered first and thus exited last: a second SIGTERM must not end the process
        # while the last checkpoint is still being written or copied.
        stop_request = stack.enter_context(StopRequest())
        opened = opening.open_workdir(workdir, config.checkpoint.staging)
        workdir = stack.enter_context(opened)
        # All hosts take part, even one without `init_from`: configs are compared below.
        is_from_model = config.model.init_from is not None
        bind = bind_architecture if is_from_model else lambda config, *_: config
        config = check_together(bind, config, workdir, set_keys)
        config = check_together(bind_data, config)
        config = check_together(opening.bind_order, config, workdir)
        opening.check_hosts_share_config(config)
        check_together(opening.check_same_run, config, workdir)
        if config.stage.number or config.stage.count:
            check_together(check_stage, config, workdir)
        with without_memory_is_lasting(lambda: False):
            run = Run(config, workdir, devices, began)
        stack.push(run.close)
        stop_request.listen()
        with without_memory_is_lasting(lambda: run.has_finished_step):
            state = run.loop(stop_after_steps, stop_request)
        if run.has_next_stage and stop_request.is_waiting():
            raise Stopped(f"stopped after stage {config.stage.number} of {config.stage.count}")
        return state


class Run:
    """One process's part of a run, built from the config.

    Attributes:
        has_finished_step: whether the devices have finished a step in this process.
        first_example: data position of the run's first example; not 0 in a later stage.
    """

    has_finished_step = False

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: epath.Path,
        devices: Sequence[jax.Device] | None = None,
        began: float | None = None,
    ):
        self.workdir = workdir
        self.profiler = throughput.StepProfiler(config.profile, workdir)
        check_together(check_trackers, config.trackers)
        tasks = task_evaluation.open_tasks(config)
        begins = not check_together(steps_of_run, workdir)
        tokenizer = check_together(open_tokenizer, config, None if begins else workdir)
        self.mixture = open_data(config, tokenizer)
        self.config = config = check_together(bind_records, config, self.mixture, workdir)
        num_examples = self.mixture.num_records
        self.total_steps = recipe.duration_in_steps(config, "total", num_examples=num_examples)
        self.patch_dropout_steps = recipe.patch_dropout_steps(
            config, self.total_steps, num_examples=num_examples
        )
        check_together(opening.check_same_start, config, workdir, num_examples=num_examples)
        self.kept_step = recipe.steps_before_end(config, num_examples=num_examples)
        if tokenizer is not None:
            keep_tokenizer(tokenizer, workdir, replace=begins)
        self.program = trusted_program(config, self.total_steps, devices)
        for line in self.mixture.describe_orders():
            logging.info("order: %s", line)
        logging.info("form of the loss: %s (%s)", *self.program.loss_form())
        self.mesh = self.program.mesh
        self.iterator = open_iterator(config, self.mixture)
        self.fingerprint = self.mixture.fingerprint()
        metric = config.checkpoint.best_metric
        self.best = task_evaluation.read_best(metric, tasks, workdir) if metric else None
        self.checkpointer = Checkpointer(
            workdir,
            keep_last=config.checkpoint.keep_last,
            keep_step=self.kept_step,
            best=self.best,
            dataset=self.fingerprint.pack(),
        )
        opening.check_hosts_agree(config.data.train, self.fingerprint)
        self.state = self.first_state()
        # Written after all checks of the start (such as for changed data); else the old one stays.
        write_config(workdir, config)
        self.start_step = int(self.state.step)
        next_example = self.iterator.get_state()["next_example"]
        self.first_example = next_example - self.start_step * config.data.batch_size
        self.wall_time = WallTime(workdir, self.start_step, began=began)
        self.writer = MetricWriter(workdir, self.start_step, config)
        self.evaluation = task_evaluation.RunEvaluation(
            config, tasks, self.program, self.writer, self.total_steps, tokenizer
        )
        self._skipped_records = 0
        log_start(self.program, self.state.params, num_examples, self.total_steps)

    def first_state(self) -> TrainState:
        """Returns the state of the latest checkpoint, or the initial state of a new run."""
        config = self.config
        if self.checkpointer.latest_step is not None:
            state, position, dataset = self.checkpointer.restore(self.program.abstract_state())
            opening.check_same_data(config.data, dataset, self.fingerprint)
            self.iterator.set_state(position)
            return state
        state, arch = self.program.create_state(), self.program.arch
        if config.stage.previous:
            params, position, dataset = end_of_stage(
                config, arch, self.mesh, state.params, mixture=self.mixture
            )
            opening.check_same_data(config.data, dataset, self.fingerprint)
            self.iterator.set_state(position)
        elif config.model.init_from:
            params = initial_parameters(config, arch, self.mesh, state.params)
        else:
            return state
        average = initial_average(params) if self.program.keeps_ema else None
        return dataclasses.replace(state, params=params, ema_params=average)

    def loop(
        self, stop_after_steps: int | None, stop_request: StopRequest | None = None
    ) -> TrainState:
        """Trains to the end of the run, or until `stop_after_steps`."""
        stop_request = stop_request or StopRequest()
        last_step = min(self.total_steps, stop_after_steps or self.total_steps)
        progress = ProgressBar(
            total=self.total_steps,
            initial=self.start_step,
            unit="step",
            disable=jax.process_index() != 0,
            dynamic_ncols=True,
        )
        # For a stop or kill between a save and its evaluation.
        if self.start_step and self.evaluation.is_missing(self.start_step, self.workdir):
            self.evaluate()
        in_flight = None
        self.supply = throughput.InputSupply(self.config.data)
        self.monitor = anomalies.AnomalyMonitor(self.config, self.keys_of_step)
        if self.start_step:
            self.monitor.lowest_loss = anomalies.lowest_loss(self.workdir, self.start_step)
        for step in range(self.start_step + 1, last_step + 1):
            if step in (self.start_step + 1, self.patch_dropout_steps + 1):
                with self.wall_time.during("compile"):
                    train_step, self.window = self.start_phase(step)
                self.wall_time.switch("step")
            try:
                batch = self.window.timed(self.next_batch, stop_request)
            except StoppedWaiting as stopped:
                progress.close()
                self._stop_before(step, stopped.position)
            metrics = self.run_step(step, train_step, batch)
            self.window.add(metrics)
            # Two steps in flight keep the device busy; more would only advance the progress bar.
            if in_flight is not None:
                self.monitor.check_step(step - 1, in_flight)
                self.has_finished_step = True
            in_flight = metrics
            if step == self.config.profile.stop_step:
                self.window.excluded(self.profiler.close)
            progress.update()
            at_end, stop_requested = step == last_step, stop_request.is_due()
            saves = at_end or stop_requested or self.evaluation.is_due(step)
            saves |= step == self.kept_step or step % self.config.checkpoint.every_steps == 0
            # A line at each checkpoint, so that a resumed run has the same lines.
            if saves or step % self.config.log_every_steps == 0 or step == self.patch_dropout_steps:
                progress.set_postfix_str(self._write_line(step))
            if saves:
                self._save(self.iterator.get_state())
            if stop_requested and (not at_end or self.has_next_stage):
                progress.close()
                raise Stopped(f"stopped after step {step} of {self.total_steps}")
            # After the save: a failure or timeout here costs no step.
            if self.evaluation.is_due(step):
                self.window.excluded(self.evaluate)
        if in_flight is not None:
            self.monitor.check_step(last_step, in_flight)
        progress.close()
        self._draw_curves(last_step)
        return self.state

    def run_step(
        self, step: int, train_step: TrainStep, batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Updates the state; returns the metrics, which may still be computing.

        Raises:
            NonFiniteError: the update was not finite, with `config.debug_nans`.
        """
        with self.profiler.step(step):
            self.state, metrics = train_step(self.state, batch)
        if self.config.debug_nans and float(metrics["skipped"]):
            where = anomalies.explain_nonfinite(self.program, self.phase_config, self.state, batch)
            raise anomalies.NonFiniteError(
                f"step {step}: loss or gradients are not finite; {where}. The batch's records: "
                f"{self.keys_of_step(step)}. Parameters and the last checkpoint are as "
                "before this step (config.debug_nans)"
            )
        return metrics

    def keys_of_step(self, step: int) -> str:
        """Names this process's records in the batch of a step, for messages."""
        batch_size = self.config.data.batch_size
        first = self.first_example + (step - 1) * batch_size
        keys = self.iterator.keys(first_example=first, most=anomalies.SHOWN_KEYS)
        num_more = batch_size // jax.process_count() - len(keys)
        return ", ".join(keys) + (f" and {num_more} more" if num_more > 0 else "")

    @property
    def has_next_stage(self) -> bool:
        """Whether another stage of the recipe follows, to which a stop request also applies."""
        return (self.config.stage.number or 0) < (self.config.stage.count or 0)

    def start_phase(self, first_step: int) -> tuple[TrainStep, throughput.ThroughputWindow]:
        """Returns the jitted step and measurements for the part of the run that begins here."""
        self.phase_config, drops_patches = self.config, first_step <= self.patch_dropout_steps
        if not drops_patches:
            self.phase_config = without_patch_dropout(self.config)
            logging.info("no patches are dropped from step %d on", self.patch_dropout_steps + 1)
        step = self.program.step(self.state, patch_dropout=drops_patches)
        traced = step.trace(self.state, self.program.abstract_batch())
        devices = self.mesh.devices.flatten().tolist()
        flops = throughput.model_flops(self.phase_config, devices, traced)
        throughput.log_flops(flops, self.config.data.batch_size, self.mesh)
        # Compiled ahead of the first call. Some processes compile for longer than a group's first
        # collective waits for the others (30 s on CPUs).
        traced.lower().compile()
        multihost_utils.sync_global_devices(f"compiled for step {first_step}")
        return step, throughput.ThroughputWindow(self.config.data.batch_size, flops, self.mesh)

    def next_batch(self, stop_request: StopRequest) -> dict[str, jax.Array]:
        """Returns the next global batch, on the devices.

        Raises:
            StoppedWaiting: the batch does not come, and the run is to stop.
        """
        with self.wall_time.during("input"):
            batch = self.iterator.take(stop_request.is_waiting)
        return jax.make_array_from_process_local_data(sharding.batch_sharding(self.mesh), batch)

    def evaluate(self) -> None:
        """Evaluates the current state, and gives the checkpointer its score."""
        with self.wall_time.during("evaluation"):
            measured = self.evaluation.run(self.state)
        if self.best is not None:
            task_evaluation.note_result(self.config, self.best, int(self.state.step), measured)

    def close(self, error_type: type[BaseException] | None = None, *_: object) -> None:
        """Finishes the checkpoints and stops the workers, when used as a context.

        After an error in a job of several processes it does not wait: another process may be gone,
        and waiting for it would take minutes.
        """
        self.writer.has_failed = error_type not in (None, Stopped)
        if jax.process_count() > 1 and self.writer.has_failed:
            return
        with contextlib.ExitStack() as stack:  # closes the others even if one fails
            stack.callback(self.wall_time.close)
            stack.enter_context(self.wall_time.during("checkpoint"))
            for part in (self.writer, self.checkpointer, self.iterator, self.profiler):
                stack.callback(part.close)

    def _write_line(self, step: int) -> str:
        """Writes the metrics since the last line, and returns them for the progress bar."""
        scalars = self._measure(step)
        self.supply.check(self.window.input_rate)
        self.monitor.check_window(step, scalars)
        self.writer.write(step, scalars)
        return (
            f"loss {scalars['loss']:.3f}, acc {100 * scalars['t2i_accuracy']:.1f}%, "
            f"scale {scalars['logit_scale']:.1f}, {scalars['images_per_sec']:.0f} img/s"
        )

    def _measure(self, step: int) -> dict[str, float]:
        """Returns the metrics since the last line, up to `step`; starts the next window."""
        scalars = self.window.summary()
        if self.mixture.weights:
            position = self.first_example + step * self.config.data.batch_size
            scalars |= self.mixture.metrics(position)
        if self.config.data.on_bad_record == "skip":
            before, self._skipped_records = self._skipped_records, self.iterator.skipped_records
            scalars["skipped_records"] = float(self._skipped_records - before)
        self.wall_time.count_hidden(self.window.input_rate.hidden_secs)
        self.wall_time.save()
        return scalars | self.wall_time.scalars()

    def _draw_curves(self, last_step: int) -> None:
        """Draws the metrics of the whole run, and reports the best step."""
        if self.best is not None:
            task_evaluation.log_best(self.config, self.best, self.checkpointer.steps)
        with self.wall_time.during("evaluation"):
            curves = plot_curves(self.workdir)
        if curves is not None:
            self.writer.write_picture(last_step, "curves", curves)

    def _save(self, position: dict[str, int]) -> None:
        """Saves the metrics and the state; the files of the state may be finished later."""
        with self.wall_time.during("checkpoint"):
            self.writer.sync()
            self.checkpointer.save(self.state, position)

    def _stop_before(self, step: int, position: dict[str, int]) -> None:
        """Saves the state before a step whose batch does not come, if it is not saved yet.

        Raises:
            Stopped: always.
        """
        if step > self.start_step + 1:
            if self.window.num_steps:
                self.writer.write(step - 1, self._measure(step - 1))
            self._save(position)
        raise Stopped(
            f"stopped after step {step - 1} of {self.total_steps}, while its input stalls",
            input_stalls=True,
        )
