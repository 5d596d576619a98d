"""Checkpoints: state, data iterator and config together, written by Orbax in the background.

Used by the training loop (save, resume) and by `diht_jax.loading` (parameters only).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from diht_jax.config import default_config, validate_config
from diht_jax.data.pipeline import TrainIterator
from diht_jax.models.parameters import model_definition
from diht_jax.models.zoo import Architecture, get_architecture
from diht_jax.training.state import TrainState, abstract_parameters

CONFIG_FILE = "config.json"
CHECKPOINT_DIRECTORY = "checkpoints"
_STATE, _DATA = "state", "data"


class Checkpointer:
    """Saves and restores a run in `workdir/checkpoints/STEP`."""

    def __init__(self, workdir: str | epath.Path, *, keep_last: int, best_metric: str | None):
        """Opens or creates the directory.

        Args:
            workdir: of the run.
            keep_last: how many of the latest checkpoints stay.
            best_metric: name of an evaluation result; the checkpoint with the highest value stays
                as well. None keeps the latest ones only.
        """
        self._best_metric = best_metric
        policies = [checkpoint_managers.LatestN(keep_last)]
        if best_metric is not None:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            checkpoint_root(workdir),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                # The loop decides when to save.
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
            ),
            item_names=(_STATE, _DATA),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        iterator: TrainIterator,
        measured: dict[str, float] | None = None,
    ) -> None:
        """Starts saving, unless this step is saved; returns before the files are finished.

        Args:
            state: the state after a step.
            iterator: has given just the batches that went into the state.
            measured: results of an evaluation of this very state, for the choice of the best.
        """
        if int(state.step) == self.latest_step:
            return
        metrics = None
        if self._best_metric is not None and measured:
            if self._best_metric not in measured:
                raise ValueError(
                    f"config.checkpoint.best_metric='{self._best_metric}' is not among the "
                    f"evaluation results: {', '.join(sorted(measured))}"
                )
            metrics = {self._best_metric: measured[self._best_metric]}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardSave(state),
                    _DATA: ocp.args.JsonSave(iterator.get_state()),
                }
            ),
            metrics=metrics,
        )

    def restore(self, target: TrainState, iterator: TrainIterator) -> TrainState:
        """The latest state, in the placement of `target`; moves `iterator` to its place."""
        step = self.latest_step
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{_STATE: ocp.args.StandardRestore(target), _DATA: ocp.args.JsonRestore()}
            ),
        )
        iterator.set_state(restored[_DATA])
        logging.info("resumed at step %d", step)
        return restored[_STATE]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What a work directory says of its model.

    Attributes:
        config: the training config.
        arch: sizes.
        params: nested dict of arrays, placed by the partition rules; their moving average where
            that was asked for.
        step: optimiser step of the checkpoint.
    """

    config: ml_collections.ConfigDict
    arch: Architecture
    params: dict[str, Any]
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
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    _, init_params = model_definition(arch, config.model.dtype, config.model.param_dtype)
    root = checkpoint_root(workdir)
    steps = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.exists() else []
    if not steps or (step is not None and step not in steps):
        wanted = "no finished checkpoint" if step is None else f"no checkpoint of step {step}"
        raise ValueError(f"{root}: {wanted}; steps found: {steps or 'none'}")
    step = steps[-1] if step is None else step
    name = "ema_params" if ema else "params"
    target = {name: abstract_parameters(init_params, mesh, ema=ema)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            root / str(step) / _STATE,
            args=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
    return TrainedModel(config=config, arch=arch, params=restored[name], step=step)


def checkpoint_root(workdir: str | epath.Path) -> epath.Path:
    """Where a run's checkpoints lie; absolute, as Orbax wants it."""
    return epath.Path(workdir).absolute() / CHECKPOINT_DIRECTORY


def write_config(workdir: str | epath.Path, config: ml_collections.ConfigDict) -> None:
    """Keeps the config beside the checkpoints, as JSON."""
    path = epath.Path(workdir) / CONFIG_FILE
    if jax.process_index() == 0:
        path.write_text(config.to_json_best_effort(indent=2) + "\n")


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
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(written, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(written).__name__}")
    defaults = json.loads(default_config().to_json_best_effort())
    return ml_collections.ConfigDict(_completed(written, defaults))


def _completed(written: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **written}
    for key, value in filled.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            filled[key] = _completed(value, defaults[key])
    return filled


def changed_keys(
    old: ml_collections.ConfigDict,
    new: ml_collections.ConfigDict,
    matter: Callable[[str], bool],
) -> list[str]:
    """Dotted names of the keys that differ and of which `matter(name)` is true."""
    old_flat, new_flat = (json.loads(c.to_json_best_effort()) for c in (old, new))
    return sorted(name for name in _differences(old_flat, new_flat) if matter(name))


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            name
            for key in old.keys() | new.keys()
            for name in _differences(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    return [] if old == new else [prefix.rstrip(".")]
