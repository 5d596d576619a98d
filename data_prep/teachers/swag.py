"""SWAG's vision transformer in Flax on all local devices: the paper's teacher, as recalled.

`diht_jax.weights.swag` defines the network. Its weights are licensed under CC-BY-NC 4.0: they and
labels made with them are for non-commercial use only.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from typing import Any

import ml_collections
import numpy as np
from absl import logging
from ml_collections.config_dict import placeholder

from data_prep.teachers import base
from diht_jax.input import transforms

WEIGHTS_VARIABLE = "DIHT_JAX_SWAG_WEIGHTS"
DTYPES = ("bfloat16", "float32")


def default_config() -> ml_collections.ConfigDict:
    """Returns the default config section `teacher.swag`."""
    c = ml_collections.ConfigDict()
    c.architecture = "vit_h_14"  # vit_b_16, vit_l_16 or vit_h_14; None: that of the weights
    c.heads = placeholder(int)  # number of attention heads, for widths other than of these three
    # torchvision's *_lc_swag-*.pth; None: $DIHT_JAX_SWAG_WEIGHTS. Licensed under CC-BY-NC 4.0:
    # weights and labels made with them are for non-commercial use only.
    c.weights = placeholder(str)
    c.dtype = "bfloat16"  # dtype of the computation; or "float32"
    return c


def describe(config: ml_collections.ConfigDict) -> base.TeacherInfo:
    """Describes the teacher by its settings and the hash of its weights.

    Raises:
        ValueError: the file does not exist, its SHA-256 does not match its name, or the dtype is
            unknown.
    """
    from diht_jax.weights import swag
    from diht_jax.weights.releases import hash_file

    if config.dtype not in DTYPES:
        raise ValueError(
            f"config.teacher.swag.dtype='{config.dtype}'; expected {' or '.join(DTYPES)}"
        )
    path = _find_weights(config)
    sha256 = hash_file(path)
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named and not sha256.startswith(named[1]):
        raise ValueError(
            f"{path}: its SHA-256 starts with {sha256[:8]}, its name says {named[1]}; download it "
            "again"
        )
    identity = {
        "kind": "swag",
        "architecture": config.architecture,
        "heads": config.heads,
        "weights_sha256": sha256,
        "dtype": config.dtype,
    }
    return base.TeacherInfo(identity, in_this_process=True, name="swag", licence=swag.LICENCE)


def load(config: ml_collections.ConfigDict, batch_size: int) -> base.ImageTeacher:
    """Loads the network, with batches sharded over the devices and parameters replicated."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from diht_jax.weights.swag import swag_definition

    info = describe(config)
    path = _find_weights(config)
    arch, params = read_weights(path, config.architecture, config.heads)
    logging.info("teacher: %s; licence: %s", path, info.licence)
    mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
    batches = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    graphdef, _ = swag_definition(arch, config.dtype)
    run = jax.jit(functools.partial(_encode, graphdef, config.dtype), out_shardings=batches)
    return base.ImageTeacher(
        lambda images: run(params, jax.device_put(images, batches)),
        info,
        image_size=arch.image_size,
        batch_size=-(-batch_size // mesh.size) * mesh.size,
    )


def read_weights(
    path: pathlib.Path, architecture: str | None, heads: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reads torchvision's weights of a vision transformer.

    Args:
        path: state dict, from which only tensors are read.
        architecture: "vit_b_16", "vit_l_16" or "vit_h_14"; None accepts that of the file.
        heads: number of attention heads; None uses the one for the width.

    Returns:
        `SwagArchitecture`, with the image size of the file, and the parameters.

    Raises:
        ValueError: the file contains another network.
    """
    from diht_jax.weights import swag
    from diht_jax.weights.swag import ARCHITECTURES
    from diht_jax.weights.tensor_files import read_tensors

    if architecture not in (None, *ARCHITECTURES):
        raise ValueError(
            f"config.teacher.swag.architecture='{architecture}'; expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    arch, params = swag.from_torchvision(read_tensors(path), str(path), heads)
    expected = ARCHITECTURES.get(architecture, arch)
    for field in ("patch_size", "layers", "width"):
        if getattr(arch, field) != getattr(expected, field):
            raise ValueError(
                f"{path} is no {architecture}: {field} is {getattr(arch, field)}, expected "
                f"{getattr(expected, field)}; change config.teacher.swag.architecture"
            )
    return arch, params


def _encode(graphdef: Any, dtype: str, params: Any, images: Any) -> Any:
    from flax import nnx

    pixels = transforms.normalize(images, dtype, mean=base.IMAGENET_MEAN, std=base.IMAGENET_STD)
    return nnx.merge(graphdef, params)(pixels).astype(np.float32)


def _find_weights(config: ml_collections.ConfigDict) -> pathlib.Path:
    from diht_jax.weights.swag import LICENCE, URLS

    text = config.weights or os.environ.get(WEIGHTS_VARIABLE)
    path = pathlib.Path(text) if text else None
    if path is None or not path.is_file():
        found = f"'{path}' is no file" if path else "it is not set"
        raise ValueError(
            f"config.teacher.swag.weights (or ${WEIGHTS_VARIABLE}): {found}; expected the weights "
            f"that torchvision has of {config.architecture or 'a vision transformer'}, to be "
            f"downloaded from {URLS.get(config.architecture, ', '.join(URLS.values()))}. "
            f"Licence: {LICENCE}"
        )
    return path


TEACHER = base.TeacherKind(default_config, describe, load)
