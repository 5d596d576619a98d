"""How fast a run is: images and FLOPs per second, MFU, and time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging
from jax.sharding import Mesh

from diht_jax.cost_model.chips import peak_flops
from diht_jax.cost_model.flops import count_flops
from diht_jax.training.monitoring.metrics import mean_scalars
from diht_jax.training.program import TrainProgram


def model_flops(config: ml_collections.ConfigDict, devices: Sequence[jax.Device]) -> int:
    """FLOPs of the matrix products that one step of the recipe needs, over all devices.

    Model FLOPs in the sense of PaLM (arXiv 2204.02311, appendix B), a multiply-add being two:
    what settings that save memory compute a second time (rematerialisation, the first pass over
    micro-batches) is left out, so that they cannot raise the MFU. What a recipe spares itself
    (patch dropout, a locked tower) is left out as well.

    Args:
        config: the whole training config.
        devices: that it runs on.
    """
    plain = config.copy_and_resolve_references()
    plain.micro_batch = None
    plain.model.remat = "none"
    plain.model.attention = "xla"
    plain.concepts.chunk_rows = plain.data.batch_size
    program = TrainProgram(plain, plain.optimizer.warmup_steps + 1, devices)
    state = program.abstract_state()
    return count_flops(program.step(state), state, program.abstract_batch()).matmul_flops


def mesh_peak_flops(mesh: Mesh) -> float | None:
    """Peak of all devices together in bfloat16 operations per second; None where not known."""
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * mesh.size


def log_flops(flops_per_step: int, batch_size: int, mesh: Mesh) -> None:
    """Logs what a step costs, and what MFU will be measured against."""
    peak = mesh_peak_flops(mesh)
    logging.info(
        "%.3f TFLOP a step, %.2f GFLOP an image; %s",
        flops_per_step / 1e12,
        flops_per_step / batch_size / 1e9,
        f"peak of {mesh.size} devices {peak / 1e12:.0f} TFLOP/s"
        if peak
        else f"peak of '{mesh.devices.flat[0].device_kind}' is not known, so no MFU is given",
    )


class ThroughputWindow:
    """Measurements since the last line of the metrics: means, speed, waiting time."""

    def __init__(
        self,
        batch_size: int,
        flops_per_step: int,
        mesh: Mesh,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts the first window.

        Args:
            batch_size: global, in examples.
            flops_per_step: of `model_flops`.
            mesh: the devices that train.
            clock: seconds, never running backwards.
        """
        self._batch_size = batch_size
        self._flops_per_step = flops_per_step
        self._peak_flops = mesh_peak_flops(mesh)
        self._clock = clock
        self._reset()

    @property
    def num_steps(self) -> int:
        """Steps since the last line."""
        return len(self._measured)

    def timed(self, get_batch: Callable[[], Any]) -> Any:
        """Calls `get_batch` and counts its time as waiting for data."""
        start = self._clock()
        batch = get_batch()
        self._data_wait_secs += self._clock() - start
        return batch

    def excluded(self, function: Callable[[], Any]) -> Any:
        """Calls `function` without counting its time against the training speed."""
        # Steps still running on the device belong to training, not to what is excluded.
        jax.block_until_ready(self._measured)
        start = self._clock()
        result = function()
        self._start += self._clock() - start
        return result

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Keeps one step's metrics, without waiting for them."""
        self._measured.append(metrics)

    def summary(self) -> dict[str, float]:
        """Means of the step's metrics, and speed; starts the next window.

        Beside the means: `images_per_sec`; `data_wait_secs`, and `data_wait_share` of the time;
        `model_flops_per_sec`; `mfu`, where the devices' peak is known.
        """
        scalars = mean_scalars(self._measured)
        elapsed_secs = self._clock() - self._start
        steps_per_sec = len(self._measured) / elapsed_secs
        scalars["images_per_sec"] = steps_per_sec * self._batch_size
        scalars["data_wait_secs"] = self._data_wait_secs
        scalars["data_wait_share"] = self._data_wait_secs / elapsed_secs
        scalars["model_flops_per_sec"] = steps_per_sec * self._flops_per_step
        if self._peak_flops is not None:
            scalars["mfu"] = scalars["model_flops_per_sec"] / self._peak_flops
        self._reset()
        return scalars

    def _reset(self) -> None:
        self._measured: list[dict[str, jax.Array]] = []
        self._data_wait_secs = 0.0
        self._start = self._clock()
