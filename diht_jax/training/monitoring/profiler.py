"""Profiles the steps that `config.profile` names.

The trace is the JAX profiler's: TensorBoard's profile plug-in, XProf and
Perfetto read it.
"""

from __future__ import annotations

import contextlib

import jax
import ml_collections
from absl import logging
from etils import epath

PROFILE_DIRECTORY = "profile"


class StepProfiler:
    """Traces the steps from `start_step` to `stop_step`, both included, into `workdir/profile`."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: epath.Path):
        """Takes the section `profile`; nothing is traced where both steps are None.

        Raises:
            ValueError: one of the two is missing, or they are no range of steps.
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
        """Surrounds step number `step` (from 1); starts the trace where that is due.

        A run that is resumed within the range traces what is left of it.
        """
        if step in self._steps and not self._is_tracing:
            jax.profiler.start_trace(str(self._directory))
            self._is_tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def ends_at(self, step: int) -> bool:
        """Returns whether `step` is the last one of a trace under way."""
        return self._is_tracing and step == self._steps[-1]

    def close(self) -> None:
        """Ends the trace, if one is under way, and writes it."""
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
            logging.info("profile of steps up to %d in %s", self._steps[-1], self._directory)
