"""Frozen image models by their config: pictures of records in, embeddings out.

`data_prep.labelling.embeddings` runs one over all shards. Three kinds, by `config.teacher.kind`:

    swag         SWAG's vision transformer in Flax, on all local devices (the paper's teacher)
    torch        whatever torch module a function builds, `module:function`
    precomputed  embeddings from files, by key

What is learned from embeddings belongs in `heads.py`.
"""

from __future__ import annotations

import functools
import json

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep.teachers import precomputed, swag, torch_module
from data_prep.teachers.base import IMAGENET_MEAN, IMAGENET_STD, Teacher, TeacherInfo

_KINDS = {"swag": swag, "torch": torch_module, "precomputed": precomputed}


def default_teacher() -> ml_collections.ConfigDict:
    """The config section `teacher`."""
    c = ml_collections.ConfigDict()
    c.kind = "swag"  # "swag", "torch" or "precomputed"
    c.batch_size = 64  # images at once, over all devices

    c.swag = ml_collections.ConfigDict()
    c.swag.architecture = "vit_h_14"  # vit_b_16, vit_l_16 or vit_h_14; None: whatever the file has
    c.swag.heads = placeholder(int)  # of attention, where the width is not one of these
    # torchvision's *_lc_swag-*.pth; None: $DIHT_JAX_SWAG_WEIGHTS. Their licence is CC-BY-NC 4.0:
    # the weights and the labels made with them are for non-commercial use only.
    c.swag.weights = placeholder(str)
    c.swag.dtype = "float32"  # of the computation; "bfloat16" is faster on TPU and GPU

    c.torch = ml_collections.ConfigDict()
    c.torch.function = placeholder(str)  # "module:function", which returns a torch.nn.Module
    c.torch.image_size = 224  # px
    c.torch.mean = IMAGENET_MEAN  # per channel, for values in [0, 1]
    c.torch.std = IMAGENET_STD

    c.precomputed = ml_collections.ConfigDict()
    c.precomputed.files = placeholder(str)  # npz or parquet: file, folder or glob
    c.precomputed.key_field = "key"
    c.precomputed.embedding_field = "image_emb"
    return c


def describe_teacher(config: ml_collections.ConfigDict) -> TeacherInfo:
    """What can be said of a teacher without loading more than that needs.

    Args:
        config: of `default_teacher`.

    Raises:
        ValueError: an unknown kind, or files or functions that are missing.
    """
    return _find_kind(config).describe(config[config.kind])


def load_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """The teacher of a config section; loaded once per process.

    Args:
        config: of `default_teacher`.

    Raises:
        ValueError: as `describe_teacher`, and for files or functions that are no teacher.
    """
    return _load_teacher(json.dumps(config.to_dict(), sort_keys=True))


@functools.lru_cache(maxsize=1)
def _load_teacher(settings: str) -> Teacher:
    config = ml_collections.ConfigDict(json.loads(settings))
    if config.batch_size < 1:
        raise ValueError(f"config.teacher.batch_size={config.batch_size}; expected at least 1")
    return _find_kind(config).load(config[config.kind], config.batch_size)


def _find_kind(config: ml_collections.ConfigDict):
    if config.kind not in _KINDS:
        raise ValueError(
            f"config.teacher.kind='{config.kind}'; expected one of {', '.join(_KINDS)}"
        )
    return _KINDS[config.kind]
