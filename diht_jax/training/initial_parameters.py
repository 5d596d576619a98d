"""Initial parameters of a run: the model of `config.model.init_from`, or the previous stage.

docs/guides/train/stages.md explains what a stage inherits from the previous one and what it resets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Generator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from diht_jax import sharding
from diht_jax.input.mixing import Mixture
from diht_jax.models.parameters import fit_positions
from diht_jax.models.zoo import (
    ARCHITECTURE_FIELDS,
    ARCHITECTURES,
    Architecture,
    get_architecture,
)
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote
from diht_jax.training.multihost import share_from_first
from diht_jax.training.recipe import check_config, default_config, duration_in_steps
from diht_jax.training.workdir.saved_run import (
    TOKENIZER_DIRECTORY,
    checkpoint_root,
    finished_steps,
    is_run,
    read_config,
    read_position,
    restore_model,
    steps_of_run,
)
from diht_jax.training.workdir.stored_run import local_run, read_manifests
from diht_jax.weights.releases import RELEASES
from diht_jax.weights.settings import Preprocessing, field_value
from diht_jax.weights.source import ModelFiles, read_weights

# Sizes to which positional embeddings are fitted.
_INPUT_SIZES = ("image_size", "context_length")


def bind_architecture(
    config: ml_collections.ConfigDict,
    workdir: epath.Path | None = None,
    set_keys: Collection[str] | None = None,
) -> ml_collections.ConfigDict:
    """Returns the config with the architecture and preprocessing of `config.model.init_from`.

    The user's settings take precedence: the whole architecture if `model.name` is set, else the
    `model.overrides`, and the `model.pictures` that were set. A recipe for the same model keeps its
    image size and context length, to which positional embeddings are fitted.

    Args:
        workdir: of the run. If it has checkpoints, their architecture is used.
        set_keys: dotted names that the user set; by default those unlike `default_config`.
    """
    if set_keys is None:
        set_keys = _changed_keys(config.model)
    keeps_name = "model.name" in set_keys
    bound = config.copy_and_resolve_references()
    if workdir is not None and steps_of_run(workdir):
        stored = read_config(workdir).model
        inputs = stored
        if not keeps_name:
            bound.model.name = stored.name
            bound.model.overrides.update(stored.overrides)
    else:
        arch, inputs = _read_start(config.model.init_from)
        own = get_architecture(config.model.name, config.model.overrides.to_dict())
        if not keeps_name and _differing_fields(arch, own):
            set_architecture(bound.model, arch)
            logging.info("architecture: that of %s", config.model.init_from)
    for field in ARCHITECTURE_FIELDS:
        if f"model.overrides.{field}" in set_keys:
            bound.model.overrides[field] = config.model.overrides[field]
    for name, value in inputs.pictures.items():
        if f"model.pictures.{name}" not in set_keys:
            bound.model.pictures[name] = value
    if "model.tokenizer" not in set_keys:
        bound.model.tokenizer = inputs.tokenizer
        if "model.text_cleaning" not in set_keys:
            bound.model.text_cleaning = inputs.text_cleaning
    check_config(bound)
    return bound


def initial_parameters(
    config: ml_collections.ConfigDict, arch: Architecture, mesh: Mesh, drawn: dict[str, Any]
) -> dict[str, Any]:
    """Returns the model of `config.model.init_from`, with positions fitted to this run's inputs.

    Adapters and concept heads are initialised anew. The bias of a sigmoid loss and the logit scale
    come from the model, if it has them.

    Returns:
        Like `drawn`, on the mesh.
    """
    source = config.model.init_from
    with _naming("model.init_from", source):
        folder = local_run(source, mesh=mesh)
        start = restore_model(folder, mesh) if is_run(folder) else read_weights(source)
        _check_same_architecture(config.model, start.arch, arch)
        params = fit_positions(start.params, arch.num_patches, arch.context_length)
        params |= {name: jnp.asarray(value) for name, value in start.loss_scalars.items()}
        version = "" if start.step is None else f"step {start.step} of "
        logging.info("starts from %s%s", version, source)
        return _like(drawn, params, mesh)


def stage_folder(workdir: str, number: int) -> str:
    """Returns the work directory of a stage within that of all stages."""
    return files.join(workdir, f"stage_{number}")


def open_stage(workdir: str, count: int) -> int:
    """Returns the last stage with a checkpoint, or the first stage; earlier ones are finished.

    All processes of a job must call it.
    """
    begun = (n for n in range(count, 1, -1) if _has_checkpoint(stage_folder(workdir, n)))
    return share_from_first(lambda: next(begun, 1))


def check_stage(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Rejects all stages as one run, and a later stage without a stage to start from."""
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
    mixture: Mixture,
) -> tuple[dict[str, Any], dict[str, int], dict[str, Any]]:
    """Returns the end of the stage in `config.stage.previous`, from which this run starts.

    Args:
        drawn: initial parameters of this run; those that the previous stage lacks are kept.
        mixture: records of this run; the previous stage may have held out more of them.

    Returns:
        Parameters, on the mesh of the run; the position in the data, as for
        `TrainIterator.set_state`; and the fingerprint of these data, packed.

    Raises:
        ValueError: the stage cannot be read, is not finished, or has other parameters.
    """
    with _naming("stage.previous", config.stage.previous):
        folder = local_run(config.stage.previous, mesh=mesh)
        before = restore_model(folder, mesh)
        num_examples = mixture.count_trained(before.config.data, before.config.seed)
        steps = duration_in_steps(before.config, "total", num_examples=num_examples)
        if before.step < steps:
            raise ValueError(
                f"it has reached step {before.step} of {steps}; the command that trains it goes on "
                "from there"
            )
        share, its = config.data.validation_share, before.config.data.validation_share
        # With the same seed, a smaller share is a subset of a larger one.
        if share > its or (share and config.seed != before.config.seed):
            raise ValueError(
                f"with config.data.validation_share={its} and config.seed={before.config.seed} it "
                f"was trained on some of the records that {share} and {config.seed} hold out; take "
                "its values"
            )
        position, checks = read_position(checkpoint_root(folder) / str(before.step))
        if position["next_example"] % config.data.batch_size:
            raise ValueError(
                f"it ends after {position['next_example']} examples, which are no multiple of "
                f"config.data.batch_size={config.data.batch_size}"
            )
        params = {**before.params, **before.learnt}
        params = fit_positions(params, arch.num_patches, arch.context_length)
        return _like(drawn, params, mesh), position, checks["dataset"]


@contextlib.contextmanager
def _naming(key: str, source: str) -> Generator[None]:
    """Prefixes errors with the config key that names a source."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"config.{key}={source}: {error}") from error


def _changed_keys(section: ml_collections.ConfigDict) -> set[str]:
    """Returns the dotted names of the model's keys that differ from their defaults."""
    own, default = (
        flatten_dict({"model": s.to_dict()}, sep=".") for s in (section, default_config().model)
    )
    return {name for name, value in own.items() if value != default[name]}


def _read_start(source: str) -> tuple[Architecture, ml_collections.ConfigDict]:
    """Reads a model by path or name: its architecture, and a section `model` with its inputs."""
    section = default_config().model
    if source in RELEASES:
        return ARCHITECTURES[source], section
    with _naming("model.init_from", source):
        folder = local_run(source)
        if not is_run(folder):
            weights = read_weights(source)
            set_inputs(section, weights)
            return weights.arch, section
        section = read_config(folder).model
        if section.tokenizer is not None:
            section.tokenizer = files.join(folder, TOKENIZER_DIRECTORY)
        return get_architecture(section.name, section.overrides.to_dict()), section


def set_architecture(section: ml_collections.ConfigDict, arch: Architecture) -> None:
    """Sets the architecture in a section `model`: by its name, or by overrides of the default."""
    names = [name for name, known in ARCHITECTURES.items() if known == arch]
    # Overrides cannot remove a part, such as attention pooling; the default model has none.
    section.name = names[0] if names else default_config().model.name
    base = ARCHITECTURES[section.name]
    for field in ARCHITECTURE_FIELDS:
        value = getattr(arch, field)
        section.overrides[field] = None if value == getattr(base, field) else value


def set_inputs(section: ml_collections.ConfigDict, model: ModelFiles) -> None:
    """Sets preprocessing and tokenizer in a section `model`, where they differ from CLIP's."""
    default = Preprocessing()
    for name, value in dataclasses.asdict(model.preprocessing).items():
        section.pictures[name] = None if value == getattr(default, name) else value
    if model.tokenizer is not None:
        section.tokenizer = os.path.dirname(model.tokenizer.path)
        section.text_cleaning = model.tokenizer.clean


def _check_same_architecture(
    section: ml_collections.ConfigDict, found: Architecture, expected: Architecture
) -> None:
    """Rejects a model that differs in more than image size and context length."""
    differing = [
        f"config.model.overrides.{field}={field_value(found, field)!r} "
        f"(the run has {field_value(expected, field)!r})"
        for field in _differing_fields(found, expected)
    ]
    if differing:
        raise ValueError(
            "it is a model of another architecture than "
            f"config.model.name={section.name} with config.model.overrides: it has "
            f"{', '.join(differing)}. Leave these settings out, and the run takes them from the "
            "model; or set them so"
        )


def _differing_fields(a: Architecture, b: Architecture) -> list[str]:
    """Returns the fields that differ, other than image size and context length."""
    fields = (field for field in ARCHITECTURE_FIELDS if field not in _INPUT_SIZES)
    return [field for field in fields if field_value(a, field) != field_value(b, field)]


def _like(drawn: dict[str, Any], params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Returns a tree like `drawn`, with parameters from `params` where it has them."""
    known, taken = flatten_dict(params, sep="/"), {}
    for name, leaf in flatten_dict(drawn, sep="/").items():
        found = known.get(name, leaf)
        if found.shape != leaf.shape:
            raise ValueError(
                f"its parameter {name} is {list(found.shape)}, and that of this run is "
                f"{list(leaf.shape)}; they may differ in the sizes of images and texts alone"
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
