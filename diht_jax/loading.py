"""`load_model`: from a work directory of `diht_jax.train` to a `LoadedModel`."""

from __future__ import annotations

import os

import jax
from etils import epath

from diht_jax import sharding
from diht_jax.inference import LoadedModel
from diht_jax.models.parameters import model_definition
from diht_jax.training.checkpoint import restore_model


def load_model(
    name_or_path: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: str | None = None,
    batch_size: int = 256,
) -> LoadedModel:
    """Loads a trained model onto all local devices.

    Args:
        name_or_path: work directory of `diht_jax.train`.
        step: which checkpoint; the latest by default.
        dtype: of the computation, "float32" or "bfloat16"; as trained by default.
        batch_size: most examples embedded at once, over all devices.

    Returns:
        The model; its `config` is the training config, its `step` the checkpoint's.

    Raises:
        ValueError: no such directory or checkpoint.
    """
    workdir = epath.Path(name_or_path)
    if not workdir.exists():
        raise ValueError(
            f"{name_or_path}: no such work directory; expected one that diht_jax.train wrote"
        )
    mesh = sharding.create_mesh(data=-1, fsdp=1, devices=jax.local_devices())
    trained = restore_model(workdir, mesh, step=step)
    if dtype is not None:
        trained.config.model.dtype = dtype
    graphdef, _ = model_definition(
        trained.arch, trained.config.model.dtype, trained.config.model.param_dtype
    )
    return LoadedModel(
        graphdef,
        trained.params,
        mesh=mesh,
        config=trained.config,
        image_size=trained.arch.image_size,
        context_length=trained.arch.context_length,
        batch_size=batch_size,
        step=trained.step,
    )
