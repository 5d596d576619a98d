"""Stages of a recipe: runs of their own, each of which starts where the one before has ended.

A stage takes all parameters of the one before, those of the objective included, with positions for
its own sizes of images and texts, and goes on in the data from where that one stopped. The
optimiser starts anew with a warm-up of its own: at another learning rate, and with moments that
forget within tens of steps, those of the stage before would change nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import ml_collections
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from diht_jax import sharding
from diht_jax.models.parameters import fit_positions
from diht_jax.models.zoo import Architecture
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote
from diht_jax.training.multihost import share_from_first
from diht_jax.training.recipe import duration_in_steps
from diht_jax.training.workdir.saved_run import checkpoint_root, finished_steps, read_position
from diht_jax.training.workdir.stored_run import local_run, read_manifests
from diht_jax.training.workdir.trained_model import restore_model


def stage_folder(workdir: str, number: int) -> str:
    """Work directory of a stage in that of all of them."""
    return files.join(workdir, f"stage_{number}")


def open_stage(workdir: str, count: int) -> int:
    """The last stage with a checkpoint, or the first one; those before are finished.

    All processes of a job must call.
    """

    def read() -> bytes:
        begun = (n for n in range(count, 1, -1) if _has_checkpoint(stage_folder(workdir, n)))
        return str(next(begun, 1)).encode()

    return int(share_from_first(read))


def check_stage(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Refuses all stages as one run, and a later stage that would start from nothing."""
    number, count = config.stage.number, config.stage.count
    if count and not number:
        raise ValueError(
            f"config.stage.count={count}: the stages are runs of their own; train each with the "
            "recipe's argument, stage=1 and so on, or all of them with python -m diht_jax.train"
        )
    starts = config.stage.previous or config.model.init_from
    if (number or 1) > 1 and not starts and not finished_steps(checkpoint_root(workdir)):
        raise ValueError(
            f"config.stage.number={number}: it would start from nothing; set config.stage.previous "
            f"to the work directory of stage {number - 1}"
        )


def end_of_stage(
    config: ml_collections.ConfigDict,
    arch: Architecture,
    mesh: Mesh,
    drawn: dict[str, Any],
    *,
    num_records: int,
) -> tuple[dict[str, Any], dict[str, int], dict[str, Any]]:
    """The end of the stage in `config.stage.previous`, where the run of a config begins.

    Args:
        drawn: its initial parameters; what the stage before does not have stays.

    Returns:
        Parameters of the run, on its mesh; the position in the data, as for
        `TrainIterator.set_state`; and the fingerprint of these data, packed.

    Raises:
        ValueError: that stage cannot be read or is not finished, or has other parameters.
    """
    where = f"config.stage.previous={config.stage.previous}"
    folder = local_run(config.stage.previous, mesh=mesh)
    before = restore_model(folder, mesh)
    steps = duration_in_steps(before.config, "total", num_examples=num_records)
    if before.step < steps:
        raise ValueError(
            f"{where}: it has reached step {before.step} of {steps}; the command that trains it "
            "goes on from there"
        )
    position, checks = read_position(checkpoint_root(folder) / str(before.step))
    if position["next_example"] % config.data.batch_size:
        raise ValueError(
            f"{where}: it ends after {position['next_example']} examples, which are no multiple of "
            f"config.data.batch_size={config.data.batch_size}"
        )
    params = {**before.params, **before.learnt}
    params = fit_positions(params, arch.num_patches, arch.context_length)
    return _like(drawn, params, mesh, where), position, checks["dataset"]


def _like(drawn: dict[str, Any], params: dict[str, Any], mesh: Mesh, where: str) -> dict[str, Any]:
    """The parameters that `drawn` has, each from `params` where that has it."""
    known, taken = flatten_dict(params, sep="/"), {}
    for name, leaf in flatten_dict(drawn, sep="/").items():
        found = known.get(name, leaf)
        if found.shape != leaf.shape:
            raise ValueError(
                f"{where}: its parameter {name} is {list(found.shape)}, and that of this stage is "
                f"{list(leaf.shape)}; stages may differ in the sizes of images and texts alone"
            )
        taken[name] = found.astype(leaf.dtype)
    merged = unflatten_dict(taken, sep="/")
    return jax.device_put(merged, sharding.tree_shardings(merged, mesh))


def _has_checkpoint(workdir: str) -> bool:
    if is_remote(workdir) and read_manifests(workdir):
        return True
    if is_remote(workdir) and not workdir.startswith("gs://"):
        return False
    return bool(finished_steps(checkpoint_root(workdir)))
