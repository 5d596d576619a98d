"""Checkpoints: state, data iterator and config together, written by Orbax in the background.

Each holds checksums of the state and of the place in the data, and what the data set looked like.
Used by the training loop (save, resume) and by `diht_jax.loading` (parameters only).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from diht_jax.config import default_config, validate_config
from diht_jax.data.atomic_file import write_atomically
from diht_jax.data.pipeline import TrainIterator
from diht_jax.models.parameters import model_definition
from diht_jax.models.zoo import Architecture, get_architecture
from diht_jax.training.multihost import first_text, wait_for_all
from diht_jax.training.objective import HEADS, LOGIT_BIAS, with_objective_parameters
from diht_jax.training.state import TrainState, abstract_parameters
from diht_jax.training.workdir.checksums import tree_checksums
from diht_jax.training.workdir.saved_run import (
    CHECKS_ITEM,
    DATA_ITEM,
    STATE_ITEM,
    explain_error,
    find_difference,
    find_difference_in,
    json_checksum,
    read_checkpoint,
)

CONFIG_FILE = "config.json"
CHECKPOINT_DIRECTORY = "checkpoints"
CORRUPT_DIRECTORY = "corrupt_checkpoints"


class CheckpointError(ValueError):
    """A checkpoint could not be written, or none can be read."""


class Checkpointer:
    """Saves and restores a run in `workdir/checkpoints/STEP`.

    A checkpoint counts once it is complete; what a killed process left of one is removed when the
    run goes on.

    Attributes:
        restored_dataset: what `save` kept as `dataset` in the restored checkpoint, or None.
    """

    def __init__(
        self,
        workdir: str | epath.Path,
        *,
        keep_last: int,
        best_metric: str | None,
        dataset: dict[str, Any] | None = None,
    ):
        """Opens or creates the directory.

        Args:
            workdir: of the run.
            keep_last: how many of the latest checkpoints stay.
            best_metric: name of an evaluation result; the checkpoint with the highest value stays
                as well. None keeps the latest ones only.
            dataset: what the data look like, JSON-able; kept in every checkpoint.
        """
        self._workdir = absolute_path(workdir)
        self._root = checkpoint_root(workdir)
        self._keep_last = keep_last
        self._best_metric = best_metric
        self._dataset = dataset
        self._saving: int | None = None
        self._failure: CheckpointError | None = None
        self.restored_dataset: dict[str, Any] | None = None
        # With checkpoints there, the manager waits until it is known which of them are whole.
        self._manager = None if self._steps() else self._open()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, or None."""
        if self._manager is not None:
            return self._manager.latest_step()
        return max(self._steps(), default=None)

    def save(
        self,
        state: TrainState,
        iterator: TrainIterator,
        measured: dict[str, float] | None = None,
    ) -> None:
        """Starts saving, unless this step is saved; returns before the files are finished.

        Where a checkpoint cannot be written (a full disk, say), the run is told so by an error in
        the log and goes on with the earlier ones; the next call tries again. In a job of several
        processes it ends instead.

        Args:
            state: the state after a step.
            iterator: has given just the batches that went into the state.
            measured: results of an evaluation of this very state, for the choice of the best.

        Raises:
            CheckpointError: in a job of several processes, one could not be written.
        """
        self._finish_saving()
        step = int(state.step)
        if step == self.latest_step:
            return
        metrics = self._best_metrics(measured)
        place = iterator.get_state()
        checks = {
            "state": tree_checksums(state),
            "place": json_checksum(place),
            "dataset": self._dataset,
        }
        self._saving = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        STATE_ITEM: ocp.args.StandardSave(state),
                        DATA_ITEM: ocp.args.JsonSave(place),
                        CHECKS_ITEM: ocp.args.JsonSave(checks),
                    }
                ),
                metrics=metrics,
            )
        except Exception as error:  # what it is depends on where the storage fails
            self._report_failure(error)

    def restore(self, target: TrainState, iterator: TrainIterator) -> TrainState:
        """The latest state that is whole, in the placement of `target`.

        Damaged checkpoints after it are moved to `corrupt_checkpoints/`, so that their steps can
        be saved again.

        Args:
            target: shapes, dtypes and shardings.
            iterator: moved to the place that belongs to the state.

        Raises:
            CheckpointError: no checkpoint can be read; says why for each.
        """
        problems: dict[int, str] = {}
        for step in sorted(self._steps(), reverse=True):
            found, problem = read_checkpoint(self._root / str(step), target)
            problem = first_text(problem)
            if problem is None:
                # A computation of all processes: only once each of them has read its part.
                problem = first_text(find_difference(found))
            if problem is None:
                break
            problems[step] = problem
        else:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise CheckpointError(
                f"{self._root}: no checkpoint can be read ({listed}). Put a copy of one back, or "
                "take another --workdir to start anew"
            )
        for damaged, problem in problems.items():
            self._set_aside(damaged, problem, instead=step)
        self._manager = self._open()
        iterator.set_state(found.place)
        self.restored_dataset = found.checks.get("dataset")
        logging.info("resumed at step %d", step)
        return found.state

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        if self._manager is not None:
            self._finish_saving()
            self._manager.close()
        if self._failure is not None:
            raise self._failure

    def _steps(self) -> list[int]:
        return list(ocp.utils.checkpoint_steps(self._root)) if self._root.exists() else []

    def _open(self) -> ocp.CheckpointManager:
        policies = [checkpoint_managers.LatestN(self._keep_last)]
        if self._best_metric is not None:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[self._best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                # The loop decides when to save.
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
            ),
            item_names=(STATE_ITEM, DATA_ITEM, CHECKS_ITEM),
        )

    def _best_metrics(self, measured: dict[str, float] | None) -> dict[str, float] | None:
        if self._best_metric is None or not measured:
            return None
        if self._best_metric not in measured:
            raise ValueError(
                f"config.checkpoint.best_metric='{self._best_metric}' is not among the "
                f"evaluation results: {', '.join(sorted(measured))}"
            )
        return {self._best_metric: measured[self._best_metric]}

    def _finish_saving(self) -> None:
        """Waits for the save that is under way; says so where it failed."""
        if self._manager is None:
            self._manager = self._open()
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in `save`
            self._report_failure(error)
        else:
            self._failure = None if self._saving is not None else self._failure
        self._saving = None

    def _report_failure(self, error: Exception) -> None:
        latest = max((s for s in self._steps() if s != self._saving), default=None)
        kept = "there is no earlier one" if latest is None else f"that of step {latest} is intact"
        self._failure = CheckpointError(
            f"{self._root}: the checkpoint of step {self._saving} could not be written, {kept}: "
            f"{explain_error(error)}. Make room, or look at the permissions"
        )
        self._saving = None
        if jax.process_count() > 1:
            raise self._failure from error
        logging.error("%s; the run goes on and tries again at its next checkpoint", self._failure)
        with contextlib.suppress(Exception):  # the same error once more
            self._manager.close()
        self._manager = self._open()  # removes what was written of it

    def _set_aside(self, step: int, problem: str, instead: int) -> None:
        folder = self._workdir / CORRUPT_DIRECTORY
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            number = len(list(folder.glob(f"{step}-*")))
            (self._root / str(step)).rename(folder / f"{step}-{number}")
        wait_for_all(f"set aside {step}")
        logging.warning(
            "%s: the checkpoint of step %d is damaged (%s); it was moved to %s, and the run goes "
            "on from step %d",
            self._root,
            step,
            problem,
            folder,
            instead,
        )


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What a work directory says of its model.

    Attributes:
        config: the training config.
        arch: sizes.
        params: nested dict of arrays, placed by the partition rules; their moving average where
            that was asked for.
        heads: concept heads of the training objective, `{name: {kernel, bias}}`; maybe none.
        step: optimiser step of the checkpoint.
    """

    config: ml_collections.ConfigDict
    arch: Architecture
    params: dict[str, Any]
    heads: dict[str, Any]
    step: int


def restore_model(
    workdir: str | epath.Path, mesh: Mesh, *, step: int | None = None, ema: bool = False
) -> TrainedModel:
    """Reads config and parameters, and nothing else, of a run.

    Args:
        workdir: of the run.
        mesh: the devices to place the parameters on.
        step: which checkpoint; the latest by default.
        ema: read the parameters' moving average instead of the parameters.

    Raises:
        ValueError: `workdir` is no work directory, or has no such checkpoint or no average.
    """
    config = read_config(workdir)
    validate_config(config, default_config())
    if ema and config.ema.decay is None:
        raise ValueError(
            f"{workdir}: this run kept no moving average of its parameters; train with "
            "config.ema.decay, or load the parameters themselves"
        )
    root = checkpoint_root(workdir)
    steps = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.exists() else []
    if not steps or (step is not None and step not in steps):
        wanted = "no finished checkpoint" if step is None else f"no checkpoint of step {step}"
        raise ValueError(f"{root}: {wanted}; steps found: {steps or 'none'}")
    step = steps[-1] if step is None else step
    name = "ema_params" if ema else "params"
    try:
        arch = get_architecture(config.model.name, config.model.overrides.to_dict())
        _, init_params = model_definition(arch, config.model.dtype, config.model.param_dtype)
        init_params = with_objective_parameters(init_params, config, arch)
        target = {name: abstract_parameters(init_params, mesh, ema=ema)}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{epath.Path(workdir) / CONFIG_FILE}: config.model describes no model that can be "
            f"built: {explain_error(error)}"
        ) from error
    directory = root / str(step) / STATE_ITEM
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                directory,
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
        problem = find_difference_in(root / str(step), {name: restored[name]})
    except Exception as error:  # whatever a damaged file leads to
        problem = explain_error(error)
    if problem is not None:
        raise ValueError(f"{directory} cannot be read: {problem}; steps found: {steps}")
    params = restored[name]
    heads = params.pop(HEADS, {})
    params.pop(LOGIT_BIAS, None)
    return TrainedModel(config=config, arch=arch, params=params, heads=heads, step=step)


def checkpoint_root(workdir: str | epath.Path) -> epath.Path:
    """Where a run's checkpoints lie; absolute, as Orbax wants it."""
    return absolute_path(workdir) / CHECKPOINT_DIRECTORY


def absolute_path(workdir: str | epath.Path) -> epath.Path:
    """The path from the root of its file system; URLs are so already."""
    path = epath.Path(workdir)
    return path if "://" in os.fspath(path) else path.absolute()


def write_config(workdir: str | epath.Path, config: ml_collections.ConfigDict) -> None:
    """Keeps the config beside the checkpoints, as JSON."""
    if jax.process_index() != 0:
        return
    path = epath.Path(workdir) / CONFIG_FILE
    text = config.to_json_best_effort(indent=2) + "\n"
    if "://" in os.fspath(path):
        path.write_text(text)
    else:
        # A kill in the middle of it must not leave a run that cannot be resumed.
        write_atomically(pathlib.Path(path), text.encode())


def read_config(workdir: str | epath.Path) -> ml_collections.ConfigDict:
    """The config that `write_config` left, with the defaults of keys that it lacks.

    Keys are missing where an older version of the code wrote the file; their defaults are what
    that version did.

    Raises:
        ValueError: the file is missing or is no JSON.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{path} is missing: {workdir} is no work directory of diht_jax.train")
    try:
        written = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error!s:.200}") from error
    if not isinstance(written, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(written).__name__}")
    defaults = json.loads(default_config().to_json_best_effort())
    try:
        return ml_collections.ConfigDict(_completed(written, defaults))
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: names that no config can have ({error!s:.200})") from error


def _completed(written: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **written}
    for key, value in filled.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            filled[key] = _completed(value, defaults[key])
    return filled
