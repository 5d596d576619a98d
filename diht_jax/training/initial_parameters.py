"""Initial parameters of a run from `config.model.init_from`."""

from __future__ import annotations

from typing import Any

import jax
import ml_collections
from absl import logging
from jax.sharding import Mesh

from diht_jax import sharding
from diht_jax.models.parameters import parameter_shapes
from diht_jax.models.positions import fit_positions
from diht_jax.models.zoo import Architecture
from diht_jax.training.optimizer import merge_parameters
from diht_jax.training.workdir.stored_run import local_run
from diht_jax.training.workdir.trained_model import is_run, restore_model
from diht_jax.weights.releases import locate_weights
from diht_jax.weights.settings import Preprocessing
from diht_jax.weights.source import ModelFiles, read_weights

# What decides what parameters mean and does not show in their shapes.
_SETTINGS = ("activation", "vision_heads", "text_heads", "layer_norm_epsilon")


def initial_parameters(
    config: ml_collections.ConfigDict, arch: Architecture, mesh: Mesh, drawn: dict[str, Any]
) -> dict[str, Any]:
    """The model of `config.model.init_from`, with positions for this run's images and texts.

    Adapters, and the objective's own parameters, start anew.

    Returns:
        Like `drawn`, on the mesh.

    Raises:
        ValueError: it cannot be read, or is a model of another architecture.
    """
    source = config.model.init_from
    folder = local_run(source, mesh=mesh)
    if is_run(folder):
        trained = restore_model(folder, mesh)
        params, found_arch, version = trained.params, trained.arch, f"step {trained.step} of "
    else:
        weights = _read_weights(source)
        params, found_arch, version = weights.params, weights.arch, ""
    num_patches = (arch.image_size // arch.patch_size) ** 2
    try:
        params = fit_positions(params, num_patches, arch.context_length)
    except ValueError as error:
        raise ValueError(f"config.model.init_from={source}: {error}") from error
    params = merge_parameters(drawn, params)
    found, expected = parameter_shapes(params), parameter_shapes(drawn)
    names = found.keys() | expected.keys()
    wrong = sorted(name for name in names if found.get(name) != expected.get(name))
    if wrong:
        raise ValueError(
            f"config.model.init_from={source}: shapes differ from those of '{config.model.name}' "
            f"in {', '.join(wrong[:5])}"
        )
    for field in _SETTINGS:
        if getattr(found_arch, field) != getattr(arch, field):
            raise ValueError(
                f"config.model.init_from={source}: {field} is {getattr(found_arch, field)!r}, and "
                f"{getattr(arch, field)!r} here; set config.model.overrides.{field} to the former"
            )
    logging.info("starts from %s%s", version, source)
    params = jax.tree.map(lambda new, old: new.astype(old.dtype), params, drawn)
    return jax.device_put(params, sharding.tree_shardings(params, mesh))


def _read_weights(source: str) -> ModelFiles:
    try:
        weights = read_weights(locate_weights(source))
    except ValueError as error:
        raise ValueError(f"config.model.init_from={source}: {error}") from error
    pictures = weights.preprocessing
    if pictures != Preprocessing():
        raise ValueError(
            f"config.model.init_from={source}: its pictures have mean {pictures.mean} and "
            f"deviation {pictures.std}; training knows those of CLIP alone, {Preprocessing()}"
        )
    return weights
