"""Speed of a run: images and FLOPs per second, MFU, supply of input, and profiles."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from diht_jax.hardware.chips import count_jaxpr_flops, find_chip
from diht_jax.input import workers
from diht_jax.models.zoo import get_architecture
from diht_jax.training.objective import label_sizes
from diht_jax.training.program import TrainProgram
from diht_jax.training.step import OPTIMIZER_SCOPE

PROFILE_DIRECTORY = "profile"
# Training time before the first check: a run starts with empty buffers.
_FIRST_LOOK_SECS = 60.0
# Time between two warnings.
_WARNING_SECS = 600.0
# Workers that are busy for less than this share of their time are waiting for storage.
_BUSY_SHARE = 0.6
# Waiting times below this share of a window are not reported.
_LEAST_LOSS = 0.1


def model_flops(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    traced: jax.stages.Traced | None = None,
) -> int:
    """Computes the matrix-product FLOPs that one step of the recipe needs, over all devices.

    Model FLOPs as defined by PaLM (arXiv 2204.02311, appendix B); a multiply-add counts as two.
    Excludes the operations named in docs/guides/train/metrics.md and the optimiser's products.

    Args:
        traced: the traced step, if available. One that recomputes nothing is counted as it
            is, which saves tracing another one.
    """
    plain = config.copy_and_resolve_references()
    plain.micro_batch = None
    plain.model.update(remat="none", scan_layers=False)
    if label_sizes(config)[0]:
        plain.concepts.chunk_rows = max(plain.concepts.chunk_rows, plain.data.batch_size)
    if config.captioning.weight:
        arch = get_architecture(plain.model.name, plain.model.overrides.to_dict())
        tokens = plain.data.batch_size * arch.context_length
        plain.captioning.chunk_tokens = max(plain.captioning.chunk_tokens, tokens)
        plain.captioning.remat = "none"
    computes_once = plain == config
    # A step does not depend on the length of the run.
    plain.optimizer.update(schedule="cosine", decay_steps=None)
    program = TrainProgram(plain, plain.optimizer.warmup_steps + 1, devices)
    kernels = {tower.kernel for tower in program.attention().values()}
    if traced is None or not computes_once or kernels != {"xla"}:
        plain.model.attention = "xla"
        program = TrainProgram(plain, plain.optimizer.warmup_steps + 1, devices)
        state = program.abstract_state()
        traced = program.step(state).trace(state, program.abstract_batch())
    return count_jaxpr_flops(traced.jaxpr.jaxpr, leave_out=OPTIMIZER_SCOPE)


def mesh_peak_flops(mesh: Mesh) -> float | None:
    """Returns the peak bfloat16 FLOP/s of all devices together; None if unknown."""
    chip = find_chip(mesh.devices.flat[0].device_kind)
    return chip.peak_flops * mesh.size if chip else None


def log_flops(flops_per_step: int, batch_size: int, mesh: Mesh) -> None:
    """Logs the cost of a step, and the peak that MFU refers to."""
    peak, kind = mesh_peak_flops(mesh), mesh.devices.flat[0].device_kind
    logging.info(
        "%.3f TFLOP a step, %.2f GFLOP an image; %s",
        flops_per_step / 1e12,
        flops_per_step / batch_size / 1e9,
        f"peak of {mesh.size} devices {peak / 1e12:.0f} TFLOP/s"
        if peak
        else f"peak of '{kind}' is not known, so no MFU is given",
    )


@dataclasses.dataclass(frozen=True)
class InputRate:
    """Speed of the input, and of a step that never waits for it, in one window."""

    supplied: float  # images per second in the window
    # Images per second of a step whose batch is ready. None if no step was measured for which the
    # devices had been waiting.
    possible: float | None
    # Whether the devices were idle at most steps when their batch came, and waiting for batches is
    # most of the time that the window lost.
    is_short: bool
    hidden_secs: float  # part of the waits for batches in which the devices ran a step


@dataclasses.dataclass(eq=False)
class ThroughputWindow:
    """Measurements since the last line of the metrics: means, speed, and waiting time."""

    batch_size: int
    flops_per_step: int
    mesh: Mesh
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self):
        """Starts the first window."""
        self._peak_flops = mesh_peak_flops(self.mesh)
        self._last: dict[str, jax.Array] | None = None  # metrics of the previous step
        self._arrived_secs = 0.0
        self._was_idle = False  # whether the devices were, when the last batch came
        self.input_rate = InputRate(0.0, None, False, 0.0)  # of the last window closed by `summary`
        self._reset()

    @property
    def num_steps(self) -> int:
        """Number of steps since the last line."""
        return len(self._measured)

    def timed(self, get_batch: Callable[..., Any], *arguments: Any) -> Any:
        """Calls `get_batch(*arguments)` and counts its time as waiting for data."""
        if self._was_idle and self._step_secs is None:
            # Nothing ran before this step, so its time is that of a step. Measured once per window,
            # since the host cannot run ahead meanwhile.
            jax.block_until_ready(self._last)
            self._step_secs = self.clock() - self._arrived_secs
        start = self.clock()
        batch = get_batch(*arguments)
        self._arrived_secs = self.clock()
        self._data_wait_secs += self._arrived_secs - start
        if self._last is None:  # the devices run nothing meanwhile
            self._idle_wait_secs += self._arrived_secs - start
        last: Any = self._last  # the type of arrays lacks `is_ready`
        self._was_idle = last is not None and last["loss"].is_ready()
        self._num_idle += self._was_idle
        return batch

    def excluded(self, function: Callable[[], Any]) -> Any:
        """Calls `function` without counting its time against the training speed."""
        # Steps still running on the device belong to training, not to what is excluded.
        jax.block_until_ready(self._measured)
        start = self.clock()
        result = function()
        self._last, self._was_idle = None, False  # idle, but not because of the input
        self._start += self.clock() - start
        return result

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Stores one step's metrics without waiting for them."""
        self._measured.append(metrics)
        self._last = metrics

    def summary(self) -> dict[str, float]:
        """Returns means of the metrics, and speeds; starts the next window.

        In addition to the means: `images_per_sec`; `data_wait_secs`, and its share of the time,
        `data_wait_share`; `model_flops_per_sec`; and `mfu`, if the devices' peak is known.
        """
        measured = jax.device_get(self._measured)  # waits for the devices
        scalars: dict[str, float] = jax.tree.map(lambda *x: float(np.mean(x)), *measured)
        elapsed_secs = self.clock() - self._start
        steps_per_sec = len(self._measured) / elapsed_secs
        scalars["images_per_sec"] = steps_per_sec * self.batch_size
        scalars["data_wait_secs"] = self._data_wait_secs
        scalars["data_wait_share"] = self._data_wait_secs / elapsed_secs
        scalars["model_flops_per_sec"] = steps_per_sec * self.flops_per_step
        if self._peak_flops is not None:
            scalars["mfu"] = scalars["model_flops_per_sec"] / self._peak_flops
        self.input_rate = self._rate_of_input(elapsed_secs)
        self._reset()
        return scalars

    def _rate_of_input(self, elapsed_secs: float) -> InputRate:
        num_steps = len(self._measured)
        supplied = num_steps * self.batch_size / elapsed_secs
        overlapping_secs = self._data_wait_secs - self._idle_wait_secs
        if not self._step_secs:
            return InputRate(supplied, None, False, overlapping_secs)
        lost_secs = elapsed_secs - num_steps * self._step_secs
        is_short = (
            self._num_idle > num_steps / 2
            and lost_secs > _LEAST_LOSS * elapsed_secs
            and self._data_wait_secs > lost_secs / 2
        )
        idle_secs = max(0.0, lost_secs - self._idle_wait_secs)
        hidden_secs = max(0.0, overlapping_secs - idle_secs)
        return InputRate(supplied, self.batch_size / self._step_secs, is_short, hidden_secs)

    def _reset(self) -> None:
        self._measured: list[dict[str, jax.Array]] = []
        self._data_wait_secs = 0.0
        self._idle_wait_secs = 0.0
        self._num_idle = 0
        self._step_secs: float | None = None
        self._start = self.clock()


class InputSupply:
    """Warns, once in a while, where the input gives less than the step could take."""

    def __init__(self, data: ml_collections.ConfigDict):
        """Takes the section `data`, and starts the time."""
        self._data = data
        self._look_at = time.monotonic() + _FIRST_LOOK_SECS
        self._before = (time.monotonic(), workers.processor_secs())
        self._is_short: bool | None = None

    def check(self, rate: InputRate) -> None:
        """Checks the window that has just ended."""
        now, worker_secs = time.monotonic(), workers.processor_secs()
        (before, secs_before), self._before = self._before, (now, worker_secs)
        if now < self._look_at:
            return
        if rate.is_short:
            busy_cores = max(0.0, worker_secs - secs_before) / max(now - before, 1e-9)
            logging.warning(
                "the input gives %.0f images/s, and the step could take %.0f; %s",
                rate.supplied,
                rate.possible,
                self._advise(workers.usable_cores(), busy_cores),
            )
            self._look_at = now + _WARNING_SECS
        elif self._is_short is not False:
            logging.info("the input keeps up with the step: %.0f images/s", rate.supplied)
        self._is_short = rate.is_short

    def _advise(self, cores: int, busy_cores: float) -> str:
        """Names the setting to change."""
        data, num_workers = self._data, self._data.num_workers
        if num_workers is None:
            num_workers = workers.default_num_workers()
        if num_workers and busy_cores < _BUSY_SHARE * min(num_workers, cores):
            return (
                f"its {num_workers} workers keep {busy_cores:.1f} of {cores} cores busy and wait "
                "for storage for the rest: a local or faster disk, config.data.order='blocks' "
                "(reads many records at once), and of data in an object store "
                f"config.data.read_threads={data.read_threads} and config.data.cache_dir"
            )
        exact = "" if data.fast_decode else "set config.data.fast_decode=True, or "
        if num_workers < cores:
            kind = "workers" if num_workers else "workers (it decodes in threads)"
            return (
                f"{exact}raise config.data.num_workers: {num_workers} {kind}, and this process may "
                f"use {cores} cores"
            )
        return (
            f"{exact}give this process more cores (Slurm: srun --cpus-per-task; Kubernetes: "
            f"limits.cpu) and leave config.data.num_workers unset: {num_workers} workers keep all "
            f"{cores} busy"
        )


class StepProfiler:
    """Traces the steps from `start_step` to `stop_step`, inclusive, into `workdir/profile`.

    JAX's profiler writes the trace for TensorBoard's profile plug-in, XProf and Perfetto.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: epath.Path):
        """Takes the section `profile`; traces nothing if both steps are None.

        Raises:
            ValueError: only one of them is set, or they are no range of steps.
        """
        first, last = config.start_step, config.stop_step
        if (first is None) != (last is None) or (first is not None and not 1 <= first <= last):
            raise ValueError(
                "config.profile: expected 1 <= start_step <= stop_step, or neither; got "
                f"start_step={first}, stop_step={last}"
            )
        self._steps = range(0) if first is None else range(first, last + 1)
        self._directory = workdir / PROFILE_DIRECTORY
        self._is_tracing = False

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """Returns a context for step number `step` (from 1); starts the trace when due.

        A run that resumes within the range traces the rest of it.
        """
        if step in self._steps and not self._is_tracing:
            jax.profiler.start_trace(str(self._directory))
            self._is_tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def close(self) -> None:
        """Stops a running trace and writes it."""
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
            logging.info("profile of steps up to %d in %s", self._steps[-1], self._directory)
