"""Loading of models: `load_model` loads a name, work directory or weight file as a `LoadedModel`.

`read_model` does not put the parameters on all devices; `diht_jax.export` uses it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from diht_jax import sharding
from diht_jax.config.keys import FLOATS
from diht_jax.extras.captioning import DECODER
from diht_jax.models.parameters import TOWERS, ModelDefinition, fit_model
from diht_jax.models.transformer import Execution
from diht_jax.models.zoo import ARCHITECTURES
from diht_jax.training.initial_parameters import set_architecture, set_inputs
from diht_jax.training.recipe import default_config, pictures_of
from diht_jax.training.terms.concepts import HEADS
from diht_jax.training.workdir.saved_run import (
    checkpoint_root,
    is_run,
    open_tokenizer,
    read_checks,
    read_config,
    restore_model,
    steps_of_run,
)
from diht_jax.training.workdir.stored_run import local_run
from diht_jax.weights.clip_layout import heads_to_clip
from diht_jax.weights.inference import LoadedModel
from diht_jax.weights.releases import RELEASES
from diht_jax.weights.source import ModelFiles, read_weights


def load_model(
    name_or_path: str | os.PathLike,
    *,
    step: int | None = None,
    ema: bool = False,
    image_size: int | None = None,
    context_length: int | None = None,
    dim: int | None = None,
    architecture: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    batch_size: int = 256,
    devices: Sequence[jax.Device] | None = None,
) -> LoadedModel:
    """Loads a model onto all local devices.

    Args:
        name_or_path: one of

            - "clipart_tiny", the small model for clip art and emoji in the package;
            - a released DiHT model, such as "diht_vitb32_224px": downloaded once and checked, or
              read from the path in the variable DIHT_JAX_WEIGHTS (`weights.releases`);
            - another published model by the name of its architecture, such as
              "siglip2_vitb16_224px", from the hub (`weights.releases.HUB_MODELS`);
            - a work directory of `diht_jax.train`, also in an object store (`s3://bucket/run`);
            - a weight file in CLIP's layout (OpenAI, open_clip, DiHT): .safetensors, .pt, .ckpt,
              .bin; nothing in it is executed;
            - a directory of transformers (CLIPModel, MetaClip2Model, SiglipModel), of open_clip, or
              of `diht_jax.export`;
            - one of these on the Hugging Face hub: "hf-hub:owner/name", or with "@revision".
        step: checkpoint of a work directory; the latest by default.
        ema: load the moving average of the parameters (`config.ema.decay` of the run).
        image_size: pixels; position embeddings are resized to it. None keeps the model's.
        context_length: tokens of a text; position embeddings are stretched or truncated to it
            (`models.parameters.stretch_positions`). None keeps the model's.
        dim: number of first dimensions of the embeddings to use, normalised again, for models
            trained with `config.matryoshka.sizes`. None uses all.
        architecture: fields of `models.Architecture` that a bare weight file does not contain,
            such as `{"activation": "quick_gelu"}`.
        dtype: of the computation, "float32" or "bfloat16". The default is that of training, and
            float32 for other weights.
        batch_size: largest number of examples embedded at once, over all devices.
        devices: devices to use instead of the local ones, such as `jax.devices()` in a job of
            several processes, which must then all make the same calls.

    Returns:
        The model, with the training config as `config` and the checkpoint's step as `step`.

    Raises:
        ValueError: there is no model, a file is damaged or unsafe, or parameters do not match.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype='{dtype}': expected {FLOATS}")
    mesh = sharding.create_mesh(data=-1, fsdp=1, devices=devices or jax.local_devices())
    model = read_model(
        name_or_path,
        step=step,
        ema=ema,
        image_size=image_size,
        context_length=context_length,
        dim=dim,
        architecture=architecture,
        mesh=mesh,
    )
    if dtype is not None:
        model.config.model.dtype = dtype
    return put_on_devices(model, mesh, batch_size=batch_size)


def put_on_devices(model: ModelFiles, mesh: Mesh, *, batch_size: int = 256) -> LoadedModel:
    """Puts a model of `read_model` on devices, to compute in the dtype `config.model.dtype`."""
    section = model.config.model
    # The run's kernel may not be supported here, but XLA's always is.
    attention = "xla" if section.attention == "xla" else "auto"
    definition = ModelDefinition(
        model.arch, section.dtype, section.param_dtype, Execution(attention=attention)
    )
    placed = dataclasses.replace(
        model,
        params=jax.device_put(model.params, sharding.tree_shardings(model.params, mesh)),
        decoder=jax.device_put(model.decoder, sharding.tree_shardings(model.decoder, mesh)),
    )
    return LoadedModel(definition, placed, mesh, batch_size=batch_size)


def read_model(
    name_or_path: str | os.PathLike,
    *,
    step: int | None = None,
    ema: bool = False,
    image_size: int | None = None,
    context_length: int | None = None,
    dim: int | None = None,
    architecture: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> ModelFiles:
    """Reads a model without creating a `LoadedModel`; see `load_model` for arguments and errors.

    The parameters of a work directory are put on the devices of the mesh, by default on one.
    """
    name = os.fspath(name_or_path)
    folder = local_run(name, step, mesh)
    if is_run(folder):
        if architecture:
            raise ValueError(f"{name}: a work directory knows its architecture; give none")
        mesh = mesh or sharding.create_mesh(1, 1, jax.local_devices()[:1])
        trained = restore_model(folder, mesh, step=step, ema=ema)
        params, arch = trained.params, trained.arch
        if image_size is not None or context_length is not None:
            params, arch = fit_model(
                params, arch, image_size=image_size, context_length=context_length
            )
            trained.config.model.overrides.update(
                image_size=arch.image_size, context_length=arch.context_length
            )
        model = ModelFiles(
            arch,
            params,
            name,
            heads=heads_to_clip(trained.learnt[HEADS]) if HEADS in trained.learnt else {},
            preprocessing=pictures_of(trained.config),
            tokenizer=open_tokenizer(trained.config, folder),
            config=trained.config,
            decoder=trained.learnt.get(DECODER),
            loss_scalars=trained.loss_scalars,
            step=trained.step,
            ema=ema,
        )
    elif step is not None or ema:
        raise ValueError(f"{name}: only work directories of diht_jax.train have steps and averages")
    else:
        model = read_weights(
            name,
            architecture=architecture,
            image_size=image_size,
            context_length=context_length,
        )
        _check_released(name, model)
        config = default_config()
        config.model.dtype = "float32"
        set_architecture(config.model, model.arch)
        set_inputs(config.model, model)
        model = dataclasses.replace(model, config=config)
    return model if dim is None else _with_dim(model, dim)


def identify_run(workdir: str) -> str:
    """Returns a text that identifies the trained model of a local work directory.

    It has the model's settings and the checksums of its latest checkpoint; "" without a run.
    """
    steps = steps_of_run(workdir)
    if not steps:
        return ""
    checks = read_checks(checkpoint_root(workdir) / str(steps[-1]))
    return json.dumps([read_config(workdir).model.to_dict(), checks], sort_keys=True)


def _check_released(name: str, weights: ModelFiles) -> None:
    """Raises ValueError if the weights of a released name have another architecture."""
    if name not in RELEASES:
        return
    released = ARCHITECTURES[name]
    sizes = {"image_size": released.image_size, "context_length": released.context_length}
    if dataclasses.replace(weights.arch, **sizes) != released:
        raise ValueError(
            f"{weights.path}: expected the architecture of '{name}', {released}; got {weights.arch}"
        )


def _with_dim(model: ModelFiles, dim: int) -> ModelFiles:
    """Truncates the embeddings of a model to the first `dim` dimensions, normalised again.

    Since embeddings are normalised after the projections, this only removes columns of these.
    """
    width = model.arch.embed_dim
    if not 1 <= dim <= width:
        raise ValueError(f"{model.path}: dim={dim}; expected 1 to {width}, the embeddings' size")
    if model.arch.vision_projection == "none":
        raise ValueError(f"{model.path}: dim={dim}: its images are not projected; leave dim out")
    towers = {}
    for tower in TOWERS:
        whole = model.params[tower]["projection"]
        projection = {name: value[..., :dim] for name, value in whole.items()}  # kernel and bias
        towers[tower] = {**model.params[tower], "projection": projection}
    config = model.config.copy_and_resolve_references()
    config.model.overrides.embed_dim = dim
    return dataclasses.replace(
        model,
        arch=dataclasses.replace(model.arch, embed_dim=dim),
        params={**model.params, **towers},
        # Heads on the full embeddings do not apply to truncated ones.
        heads={} if config.concepts.feature == "projected" else model.heads,
        config=config,
    )
