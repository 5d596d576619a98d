"""Checkpoints: training state and position in the data, written by Orbax in the background.

Each checkpoint also holds checksums of both and a fingerprint of the data set, which reveal a
damaged checkpoint and a changed data set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from diht_jax.training.multihost import TemporaryError, first_text, gather_texts
from diht_jax.training.step import TrainState
from diht_jax.training.workdir.saved_run import (
    CHECKS_ITEM,
    CHECKSUMS,
    CORRUPT_DIRECTORY,
    DATA_ITEM,
    STATE_ITEM,
    checkpoint_root,
    describe_difference,
    explain_error,
    finished_steps,
    json_checksum,
    read_position,
    read_state,
    shared_steps,
    tree_checksums,
)


class SaveError(TemporaryError):
    """A checkpoint could not be written; it may succeed the next time."""


@dataclasses.dataclass
class BestStep:
    """Orbax preservation policy that keeps the checkpoint with the best value."""

    lower_is_better: bool = False  # whether the lowest value is the best
    # Values by step; among ties the latest step counts.
    values: dict[int, float] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Marks the best checkpoint."""
        best = self.step([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]

    def step(self, steps: Sequence[int]) -> int | None:
        """Returns the best of the steps; None if none was measured."""
        sign = -1 if self.lower_is_better else 1
        measured = [
            (sign * self.values[step], step)
            for step in steps
            if math.isfinite(self.values.get(step, math.nan))
        ]
        return max(measured, default=(0, None))[1]


@dataclasses.dataclass(eq=False)
class Checkpointer:
    """Saves and restores a run in `workdir/checkpoints/STEP`.

    A checkpoint counts once it is complete. When the run resumes, it removes incomplete ones, which
    a killed process leaves. All processes of a job must create it, which creates the directory.
    """

    workdir: str | epath.Path
    keep_last: int = dataclasses.field(kw_only=True)  # number of latest checkpoints to keep
    keep_step: int | None = None  # step of a checkpoint to keep in addition
    best: BestStep | None = None  # for the best step, which is kept too; values may be added later
    dataset: dict[str, Any] | None = None  # JSON-able, stored in every checkpoint

    def __post_init__(self):
        self._root = checkpoint_root(self.workdir)
        self._keep_steps = [] if self.keep_step is None else [self.keep_step]
        self._saving: int | None = None
        self._failure: SaveError | None = None
        self._found = shared_steps(self._root)
        # If there are checkpoints, `restore` opens it once it knows which ones are intact.
        self._manager: Any = None if self._found else self._open()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, or None."""
        if self._manager is not None:
            return self._manager.latest_step()
        return max(self._found, default=None)

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, including one being saved; needs an open manager."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, position: dict[str, int]) -> None:
        """Starts saving, unless this step is already saved; returns before the files are finished.

        `position` is that in the data, from `TrainIterator.get_state`.

        If a checkpoint cannot be written (such as on a full disk), an error is logged and the run
        continues with the earlier ones; the next call tries again. A job of several processes ends
        instead.

        Raises:
            SaveError: a checkpoint could not be written, in a job of several processes.
        """
        self._finish_saving()
        step = int(state.step)
        if step == self.latest_step:
            return
        checks = {
            CHECKSUMS: tree_checksums(state),
            "place": json_checksum(position),
            "dataset": self.dataset,
        }
        self._saving = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        STATE_ITEM: ocp.args.StandardSave(state),
                        DATA_ITEM: ocp.args.JsonSave(position),
                        CHECKS_ITEM: ocp.args.JsonSave(checks),
                    }
                ),
            )
        except Exception as error:  # the type depends on where the storage fails
            self._report_failure(error)

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, int], dict[str, Any]]:
        """Restores the latest intact state, sharded like `target`.

        Moves damaged checkpoints after it to `corrupt_checkpoints/`, so that their steps can
        be saved again.

        Returns:
            The state, the position in the data, and the `dataset` of the checkpoint.

        Raises:
            ValueError: no checkpoint can be read; has the reason for each.
            TemporaryError: a process does not see a checkpoint yet.
        """
        problems: dict[int, str] = {}
        for step in reversed(self._found):
            self._check_seen(step)
            problem = None
            try:
                position, checks = read_position(self._root / str(step))
                state = read_state(self._root / str(step), target)
            except ValueError as error:
                problem = str(error)
            problem = first_text(problem)
            if problem is None:
                # A collective computation, so only after each process has read its part.
                problem = first_text(describe_difference(checks, state))
            if problem is None:
                break
            problems[step] = problem
        else:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise ValueError(
                f"{self._root}: no checkpoint can be read ({listed}). Put a copy of one back, or "
                "take another --workdir to start anew"
            )
        for damaged, problem in problems.items():
            self._set_aside(damaged, problem, instead=step)
        self._manager = self._open()
        logging.info("resumed at step %d", step)
        return state, position, checks["dataset"]

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
            SaveError: the last checkpoint could not be written.
        """
        if self._manager is not None:
            self._finish_saving()
            if self.best is not None:
                self._remove_surpassed(self.best)
            self._manager.close()
        if self._failure is not None:
            raise self._failure

    def _open(self) -> ocp.CheckpointManager:
        policies = [
            checkpoint_managers.LatestN(self.keep_last),
            checkpoint_managers.CustomSteps(self._keep_steps),
            *([] if self.best is None else [self.best]),
        ]
        return ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                # The loop decides when to save.
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
                # Listed by the first process, so that all save and remove the same steps.
                single_host_load_and_broadcast=True,
            ),
            item_names=(STATE_ITEM, DATA_ITEM, CHECKS_ITEM),
        )

    def _remove_surpassed(self, best: BestStep) -> None:
        """Removes the checkpoint that was best until the last evaluation; `save` removes others."""
        if not best.values or self._failure is not None:
            return
        steps = self.steps
        kept = {*steps[-self.keep_last :], *self._keep_steps, best.step(steps)}
        for step in (step for step in steps if step not in kept):
            self._manager.delete(step)

    def _finish_saving(self) -> None:
        """Waits for a save in progress, and reports its failure."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in `save`
            self._report_failure(error)
        else:
            self._failure = None if self._saving is not None else self._failure
        self._saving = None

    def _report_failure(self, error: Exception) -> None:
        latest = max((s for s in finished_steps(self._root) if s != self._saving), default=None)
        kept = "there is no earlier one" if latest is None else f"that of step {latest} is intact"
        self._failure = SaveError(
            f"{self._root}: the checkpoint of step {self._saving} could not be written, {kept}: "
            f"{explain_error(error)}"
        )
        self._saving = None
        if jax.process_count() > 1:
            raise self._failure from error
        logging.error("%s; the run goes on and tries again at its next checkpoint", self._failure)
        with contextlib.suppress(Exception):  # repeats the same error
            self._manager.close()
        self._manager = self._open()  # removes the incomplete checkpoint

    def _check_seen(self, step: int) -> None:
        """Raises if a process does not see a checkpoint that the first process has found.

        It is not damaged: on a network file system, folders may become visible later to some hosts.
        """
        seen = gather_texts("seen" if (self._root / str(step)).exists() else "")
        if not all(seen):
            raise TemporaryError(
                f"{self._root / str(step)}: process {seen.index('')} does not see this checkpoint, "
                "which process 0 has found. Start the job again when the host of that process sees "
                "it; all hosts must share the work directory"
            )

    def _set_aside(self, step: int, problem: str, instead: int) -> None:
        folder = self._root.parent / CORRUPT_DIRECTORY
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if "://" in os.fspath(folder):
                # In a bucket, a folder exists only if there is an object in it.
                (folder / "README.txt").write_text("Damaged checkpoints, by step.\n")
            number = len(list(folder.glob(f"{step}-*")))
            (self._root / str(step)).rename(folder / f"{step}-{number}")
        multihost_utils.sync_global_devices(f"set aside {step}")
        logging.warning(
            "%s: the checkpoint of step %d is damaged (%s); it was moved to %s, and the run goes "
            "on from step %d",
            self._root,
            step,
            problem,
            folder,
            instead,
        )
