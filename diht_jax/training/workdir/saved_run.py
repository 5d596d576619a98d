"""Files of a run in its work directory: config, tokenizer, checkpoints, and the trained model.

Orbax verifies its index files but not the values: it restores an array file with a flipped bit
without an error. Each checkpoint therefore has additional checksums.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
import os
import pathlib
import tempfile
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from diht_jax.config.checks import validate_config
from diht_jax.data.tokenizer import FileTokenizer
from diht_jax.models.parameters import (
    TOWERS,
    ModelDefinition,
    lora_of,
    merge_adapters,
    parameter_shapes,
)
from diht_jax.models.zoo import Architecture, get_architecture
from diht_jax.sharding import tree_shardings
from diht_jax.storage import copies, files
from diht_jax.storage.stores import is_remote
from diht_jax.training.monitoring.trackers import replace_file
from diht_jax.training.multihost import error_chain, share_from_first
from diht_jax.training.recipe import default_config
from diht_jax.weights.source import list_weight_files
from diht_jax.weights.tokenizer_file import copy_tokenizer, is_copy, read_tokenizer

CONFIG_FILE = "config.json"
CHECKPOINT_DIRECTORY = "checkpoints"
CORRUPT_DIRECTORY = "corrupt_checkpoints"
TOKENIZER_DIRECTORY = "tokenizer"  # a copy of the files, so that the run is self-contained
# The items of a checkpoint.
STATE_ITEM, DATA_ITEM, CHECKS_ITEM = "state", "data", "checks"
CHECKSUMS = "checksums"  # key of the checks for `tree_checksums`
_LONGEST_CAUSE = 600


def write_config(workdir: str | epath.Path, config: ml_collections.ConfigDict) -> None:
    """Writes the config into the work directory, as JSON."""
    if jax.process_index() != 0:
        return
    # Atomic: a kill must not leave a run that cannot be resumed.
    text = config.to_json_best_effort(indent=2) + "\n"
    replace_file(epath.Path(workdir) / CONFIG_FILE, text.encode())


def read_config(workdir: str | epath.Path) -> ml_collections.ConfigDict:
    """Reads the config written by `write_config`, with defaults for missing keys.

    Raises:
        ValueError: the file is missing, no JSON or no training config.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{path} is missing: {workdir} is no work directory of diht_jax.train")
    written, config = files.check_object(path.read_bytes(), path), default_config()
    try:
        config.update(written)
        validate_config(config, default_config())
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error!s:.500}") from error
    return config


def open_tokenizer(
    config: ml_collections.ConfigDict, workdir: str | epath.Path | None
) -> FileTokenizer | None:
    """Opens the tokenizer of a run, from its work directory or else `config.model.tokenizer`.

    Args:
        workdir: None for a new run, since existing files may be left from an earlier attempt.

    Returns:
        The tokenizer; None for CLIP's.
    """
    if config.model.tokenizer is None:
        return None
    if workdir is not None:
        folder = files.join(os.fspath(workdir), TOKENIZER_DIRECTORY)
        names = files.list_names(folder)
        if is_copy(names):
            return read_tokenizer(_local_folder(folder, names))
    try:
        found = read_tokenizer(config.model.tokenizer)
    except ValueError as error:
        raise ValueError(f"config.model.tokenizer={config.model.tokenizer}: {error}") from error
    if found is None:
        raise ValueError(
            f"config.model.tokenizer={config.model.tokenizer}: no tokenizer's file in this folder, "
            "such as tokenizer.json"
        )
    clean = config.model.text_cleaning
    return found if clean is None else dataclasses.replace(found, clean=clean)


def keep_tokenizer(
    found: FileTokenizer, workdir: str | epath.Path, *, replace: bool = False
) -> None:
    """Copies a tokenizer to the work directory; keeps an existing one unless `replace`."""
    folder = files.join(os.fspath(workdir), TOKENIZER_DIRECTORY)
    names = files.list_names(folder)
    if jax.process_index() != 0 or (is_copy(names) and not replace):
        return
    for name in names:
        files.remove(files.join(folder, name))
    copy_tokenizer(found, folder)


def _local_folder(folder: str, names: list[str]) -> str:
    """Returns the folder, or a local copy of a folder in a store."""
    if not is_remote(folder):
        return folder
    name = f"tokenizer-{hashlib.sha256(folder.encode()).hexdigest()[:16]}"
    local = pathlib.Path(tempfile.gettempdir()) / f"diht_jax-{os.getuid()}" / name
    for name in names:
        copies.cached_copy(files.join(folder, name), name, folder=local)
    return str(local)


def read_position(directory: epath.Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Reads this process's data position and checks of a checkpoint.

    Returns:
        The position in the data, from `TrainIterator.get_state`; and the checks: `checksums` (from
        `tree_checksums`), `place` (from `json_checksum`, for the position) and `dataset`.

    Raises:
        ValueError: an item cannot be read; the message names it.
    """
    item = directory / DATA_ITEM
    try:
        position = ocp.JsonCheckpointHandler().restore(item)
        item = directory / CHECKS_ITEM
        checks = read_checks(directory)
        if checks["place"] != json_checksum(position):
            item = directory / DATA_ITEM
            raise ValueError("its contents are not what was saved")
        return dict(position), checks
    except Exception as error:  # damaged files raise errors of any type
        raise ValueError(f"{item}: {explain_error(error)}") from error


def read_state(directory: epath.Path, target: Any) -> Any:
    """Reads the arrays of a checkpoint that `target` has, in its shapes, dtypes and shardings.

    Uses Orbax's handlers without the manager, which synchronises all processes: if one process
    fails, the others must not wait.

    Raises:
        ValueError: the arrays cannot be read.
    """
    try:
        return ocp.PyTreeCheckpointHandler().restore(
            directory / STATE_ITEM,
            args=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
    except Exception as error:  # damaged files raise errors of any type
        raise ValueError(f"{directory / STATE_ITEM}: {explain_error(error)}") from error


def read_checks(directory: epath.Path) -> dict[str, Any]:
    """Reads the checksums of a checkpoint, and the fingerprint of its data set."""
    return dict(ocp.JsonCheckpointHandler().restore(directory / CHECKS_ITEM))


def finished_steps(root: epath.Path) -> list[int]:
    """Returns the steps of the finished checkpoints in a folder, latest last.

    In a bucket, a checkpoint has its final name even while it is being saved.
    """
    names = map(operator.attrgetter("name"), ocp.utils.checkpoint_steps_paths(root))
    return sorted(map(int, filter(str.isdigit, names)))


def steps_of_run(workdir: str | epath.Path) -> list[int]:
    """Returns the steps of finished checkpoints in a work directory; empty without a run."""
    is_run = (epath.Path(workdir) / CONFIG_FILE).exists()
    return finished_steps(checkpoint_root(workdir)) if is_run else []


def shared_steps(root: epath.Path) -> list[int]:
    """Returns `finished_steps` as the first process of the job sees them.

    On a network file system listings may be stale on some hosts, and a running job may save and
    remove checkpoints between two listings.
    """
    return share_from_first(functools.partial(finished_steps, root))


def checkpoint_root(workdir: str | epath.Path) -> epath.Path:
    """Returns the folder of a run's checkpoints; absolute, as Orbax requires."""
    path = epath.Path(workdir) / CHECKPOINT_DIRECTORY
    return path if "://" in os.fspath(path) else path.absolute()


def tree_checksums(tree: Any) -> dict[str, int]:
    """Computes a 32-bit checksum per array, independent of the mesh.

    It is `sum_i mix(bits_i + 0x9E3779B9 i)` modulo 2^32, with `bits_i` the value at index i as an
    unsigned integer and `mix` a bijection that spreads each bit over all bits. Integer sums do not
    depend on their order, and thus not on the sharding. Any single flipped bit changes the
    checksum. Several flipped bits and exchanged values change it except for one case in 2^32.
    Computed on the devices of the arrays.

    Args:
        tree: arrays of values up to 32 bits wide. All processes of a job must call it.

    Returns:
        Maps a path such as `params/vision/projection/kernel` to an integer in [0, 2^32).
    """
    numbers = np.asarray(_checksums(jax.tree.leaves(tree))).tolist()
    return dict(zip(parameter_shapes(tree), numbers, strict=True))


def describe_difference(checks: dict[str, Any], tree: Any, part: str = "") -> str | None:
    """Names arrays that differ from the saved ones; None if none do. All processes must call it.

    Args:
        part: prefix of the paths of the arrays to compare.
    """
    if CHECKSUMS not in checks:
        return "its checksums are missing, or of another kind"
    saved = {path: number for path, number in checks[CHECKSUMS].items() if path.startswith(part)}
    wrong = sorted(dict(saved.items() ^ tree_checksums(tree).items()))
    return f"values differ from what was saved in {', '.join(wrong[:3])}" if wrong else None


def json_checksum(value: Any) -> int:
    """Computes the CRC32C of a JSON-able value."""
    return google_crc32c.value(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _checksums(arrays: list[jax.Array]) -> jax.Array:
    # A single program for all arrays: on CPU devices, many small programs with sums over devices
    # can deadlock.
    return jnp.stack(list(map(_checksum, arrays)))


@jax.jit  # traced once per shape
def _checksum(array: jax.Array) -> jax.Array:
    array = jnp.asarray(array)
    width = array.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}"))
    bits = bits.astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        steps = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        index += steps * jnp.uint32(math.prod(array.shape[axis + 1 :]) % 2**32)
    bits += index * jnp.uint32(0x9E3779B9)
    # The finalizer of MurmurHash3, a bijection: each input bit flips half of the output bits.
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def explain_error(error: BaseException) -> str:
    """Returns the innermost cause on one line: Orbax wraps it in a page of settings."""
    error = error_chain(error)[-1]
    # TensorStore appends all its settings to its messages.
    text = " ".join(str(error).split()).split(" [tensorstore_spec=")[0] or type(error).__name__
    return text if len(text) <= _LONGEST_CAUSE else f"{text[:_LONGEST_CAUSE]}..."


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
