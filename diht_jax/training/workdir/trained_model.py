"""Reads the model of a run, config and parameters alone, from its work directory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from diht_jax.models.parameters import (
    TOWERS,
    ModelDefinition,
    lora_of,
    merge_adapters,
    parameter_shapes,
)
from diht_jax.models.zoo import Architecture, get_architecture
from diht_jax.sharding import tree_shardings
from diht_jax.training.workdir.saved_run import (
    CHECKPOINT_DIRECTORY,
    CHECKS_ITEM,
    CONFIG_FILE,
    STATE_ITEM,
    checkpoint_root,
    describe_difference,
    explain_error,
    finished_steps,
    read_checks,
    read_config,
    read_state,
    shared_steps,
)
from diht_jax.weights.source import list_weight_files


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model read from a work directory."""

    config: ml_collections.ConfigDict  # the training config
    arch: Architecture  # sizes
    # Nested dict of arrays, sharded by the partition rules, with adapters merged; holds the moving
    # average if that was requested.
    params: dict[str, Any]
    learnt: dict[str, Any]  # parameters of the objective
    loss_scalars: dict[str, float]  # those of the loss, such as `logit_bias`
    step: int  # optimiser step of the checkpoint


def is_run(name: str) -> bool:
    """Returns whether a path is a work directory of `diht_jax.train`, not a model directory."""
    path = epath.Path(name)
    if not (path / CONFIG_FILE).exists():
        return False
    # Directories of transformers also have a config.json, but next to the weights.
    return (path / CHECKPOINT_DIRECTORY).exists() or not list_weight_files(path)


def restore_model(
    workdir: str | epath.Path, mesh: Mesh, *, step: int | None = None, ema: bool = False
) -> TrainedModel:
    """Reads only config and parameters of a run.

    Args:
        mesh: devices for the parameters; all processes of a job with some of these devices
            must call it.
        step: step of the checkpoint; by default the latest, as seen by the first process of a job.
        ema: read the moving average of the parameters instead.

    Raises:
        ValueError: `workdir` is no work directory, or lacks the checkpoint or the average.
    """
    config = read_config(workdir)
    if ema and config.ema.decay is None:
        raise ValueError(
            f"{workdir}: this run kept no moving average of its parameters; train with "
            "config.ema.decay, or load the parameters themselves"
        )
    root = checkpoint_root(workdir)
    steps = shared_steps(root) if mesh.is_multi_process else finished_steps(root)
    if not steps or (step is not None and step not in steps):
        wanted = "no finished checkpoint" if step is None else f"no checkpoint of step {step}"
        raise ValueError(f"{root}: {wanted}; steps found: {steps or 'none'}")
    step = steps[-1] if step is None else step
    name = "ema_params" if ema else "params"
    try:
        arch = get_architecture(config.model.name, config.model.overrides.to_dict())
        lora = lora_of(config.lora)
        init_params = ModelDefinition(
            arch, config.model.dtype, config.model.param_dtype, lora=lora
        ).init_params
        shapes = parameter_shapes(jax.eval_shape(init_params, jax.random.key(0)))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{epath.Path(workdir) / CONFIG_FILE}: config.model describes no model that can be "
            f"built: {explain_error(error)}"
        ) from error
    directory = root / str(step)
    try:
        found = _read_parameters(directory, name, mesh)
        parts = (*TOWERS, "log_logit_scale")
        params = {part: found[part] for part in parts if part in found}
        if parameter_shapes(params) != shapes:
            raise ValueError(f"its parameters are not those of the model in {CONFIG_FILE}")
    except Exception as error:  # damaged files raise errors of any type
        raise ValueError(
            f"{directory / STATE_ITEM} cannot be read: {explain_error(error)}; steps found: {steps}"
        ) from None
    learnt = {name: value for name, value in found.items() if name not in parts}
    return TrainedModel(
        config=config,
        arch=arch,
        params=params if lora is None else merge_adapters(params, lora),
        learnt=learnt,
        loss_scalars={k: float(v) for k, v in learnt.items() if getattr(v, "ndim", None) == 0},
        step=step,
    )


def _read_parameters(directory: epath.Path, name: str, mesh: Mesh) -> dict[str, Any]:
    """Reads a checkpoint's parameters or average, on a mesh, with those of the objective."""
    stored = ocp.PyTreeCheckpointHandler().metadata(directory / STATE_ITEM).tree[name]
    target = jax.tree.map(
        lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split),
        stored,
        tree_shardings(stored, mesh),
    )
    found = read_state(directory, {name: target})[name]
    try:
        problem = describe_difference(read_checks(directory), {name: found}, f"{name}/")
    except Exception as error:  # damaged files raise errors of any type
        problem = f"{directory / CHECKS_ITEM}: {explain_error(error)}"
    if problem is not None:
        raise ValueError(problem)
    return found
