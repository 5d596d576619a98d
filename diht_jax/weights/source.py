"""Weights of any CLIP, from a file or directory: found, read, checked, in our parameter tree.

The files at a path decide how it is read:

    open_clip_config.json            CLIP's layout, as open_clip's hub and our export have it
    config.json with "model_type"    transformers' CLIPModel, MetaClip2Model or SiglipModel
    one weight file                  CLIP's layout (OpenAI, open_clip, DiHT)

For a weight file by itself, a config next to it counts in the same way.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from diht_jax.config.architecture import ARCHITECTURE_FIELDS
from diht_jax.config.checks import nearest_name
from diht_jax.data import tokenizer
from diht_jax.data.file_tokenizer import FileTokenizer
from diht_jax.models.positions import fit_model
from diht_jax.models.zoo import Architecture
from diht_jax.storage.files import check_object
from diht_jax.storage.hub import download, is_hub_name
from diht_jax.weights import clip_layout, huggingface, open_clip_config, timm_layout
from diht_jax.weights.layout import from_layout
from diht_jax.weights.releases import HUB_MODELS, hash_file, locate_weights
from diht_jax.weights.settings import (
    ConfigSection,
    Preprocessing,
    read_preprocess_cfg,
    read_preprocessor,
)
from diht_jax.weights.tensor_files import INDEX_SUFFIX, WEIGHT_SUFFIXES, read_tensors
from diht_jax.weights.tokenizer_file import TOKENIZER_FILES, read_cleaning, read_tokenizer

OPEN_CLIP_CONFIG = "open_clip_config.json"
HUGGINGFACE_CONFIG = "config.json"
HUGGINGFACE_PREPROCESSOR = "preprocessor_config.json"
# In its place since transformers 5, with the other settings of a model's inputs.
HUGGINGFACE_PROCESSOR = "processor_config.json"
HUGGINGFACE_MERGES = "merges.txt"
# In `open_clip_config.json`; its first merges, where the vocabulary is smaller than CLIP's.
TOKENIZER_KIND = "CLIP byte-pair encoding (bpe_simple_vocab_16e6), lower case"

# Where a directory holds several weight files, the first of these is taken.
_PREFERRED = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
)


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model as read from files, with its origin.

    Attributes:
        arch: sizes, activation and the like.
        params: nested dict of arrays of `models.parameters`, one entry per block.
        path: weight file, or work directory of `diht_jax.train`.
        heads: concept heads under their names in CLIP's layout; empty where there are none.
        preprocessing: of the pictures.
        sha256: of a weight file, in hex; None for one in shards.
        config: the training config of a run; for others' weights `loading` fills in the defaults,
            and it is empty before.
        decoder: parameters of the caption decoder of a run that trained one.
        loss_scalars: what the loss has learnt, such as SigLIP's `logit_bias`.
        step: optimiser step, of a run.
        ema: whether these are the moving average of the parameters.
        has_tokenizer: its texts are tokenized, by `tokenizer` or else by `data.tokenizer`.
        tokenizer: the model's own; None where it is CLIP's, or there is none.
    """

    arch: Architecture
    params: dict[str, Any]
    path: str
    heads: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    sha256: str | None = None
    config: ml_collections.ConfigDict = dataclasses.field(default_factory=ml_collections.ConfigDict)
    decoder: dict[str, Any] | None = None
    loss_scalars: dict[str, float] = dataclasses.field(default_factory=dict)
    step: int | None = None
    ema: bool = False
    has_tokenizer: bool = True
    tokenizer: FileTokenizer | None = None

    @property
    def is_run(self) -> bool:
        """Returns whether `path` is a work directory."""
        return self.step is not None


def read_weights(
    path: str | os.PathLike[str],
    *,
    architecture: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
) -> ModelFiles:
    """Reads the weights of a CLIP.

    Args:
        path: of a weight file or a model directory, see above.
        architecture: fields of `Architecture` that neither shapes nor a config next to the file
            tell, such as `{"activation": "quick_gelu", "vision_heads": 16}`.
        image_size: pixels; image positions are resized to it. None keeps the file's.
        context_length: tokens; text positions are stretched to it. None keeps the file's.

    Raises:
        ValueError: nothing to read, a file that is damaged or could run code, parameters that are
            missing, unknown or of another shape (all are listed), settings our model lacks.
    """
    path = pathlib.Path(path)
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such weight file or model directory")
    file = find_weight_file(path) if path.is_dir() else path
    tensors = read_tensors(file)
    is_huggingface = "vision_model.embeddings.patch_embedding.weight" in tensors
    arch, preprocessing, has_clip_tokenizer = _read_settings(file.parent, is_huggingface)
    if arch is None:
        if is_huggingface:
            raise ValueError(
                f"{file}: names are those of a model of transformers, whose {HUGGINGFACE_CONFIG} "
                "must be in the same folder; it is not"
            )
        if any(name.startswith(timm_layout.TRUNK) for name in tensors):
            raise ValueError(
                f"{file}: names are those of open_clip with an image tower of timm, for which "
                f"{OPEN_CLIP_CONFIG} must be in the same folder; it is not"
            )
        arch = _infer_architecture(tensors, str(file), "activation" in (architecture or {}))
    arch = _replace_fields(arch, architecture or {})
    # A config may claim any number of layers; each would be looked for by its names.
    most_layers = max(arch.vision_layers, arch.text_layers)
    if most_layers > len(tensors):
        raise ValueError(f"{file}: {len(tensors)} parameters for a model of {most_layers} layers")
    found, heads = clip_layout.split_heads(tensors)
    if is_huggingface:
        layout = huggingface.layout(arch)
        found = {name: value for name, value in found.items() if name not in huggingface.BUFFERS}
    elif timm_layout.is_timm(arch):
        layout, found = timm_layout.layout(arch), clip_layout.drop_extras(found)
    else:
        layout, found = clip_layout.layout(arch), clip_layout.normalize_names(found)
    # A scale of shape [1] is the same as one of shape [].
    if "logit_scale" in found and found["logit_scale"].shape == (1,):
        found["logit_scale"] = found["logit_scale"].reshape(())
    loss_scalars = _take_loss_scalars(found, arch)
    params = from_layout(found, layout, clip_layout.our_shapes(arch), str(file))
    params, arch = fit_model(params, arch, image_size=image_size, context_length=context_length)
    has_clip_tokenizer |= arch.vocab_size == tokenizer.VOCAB_SIZE
    own, has_clip_tokenizer = _read_tokenizer(file.parent, is_huggingface, has_clip_tokenizer)
    return ModelFiles(
        arch=arch,
        params=jax.tree.map(np.asarray, params),
        path=str(file),
        heads=heads,
        preprocessing=preprocessing,
        sha256=None if file.name.endswith(INDEX_SUFFIX) else hash_file(file),
        loss_scalars=loss_scalars,
        has_tokenizer=has_clip_tokenizer or own is not None,
        tokenizer=own,
    )


def _take_loss_scalars(tensors: dict[str, np.ndarray], arch: Architecture) -> dict[str, float]:
    """Takes SigLIP's bias out of the tensors of a model that may have it."""
    name = "logit_bias"
    if arch.vision_pool_heads is None or name not in tensors or tensors[name].size != 1:
        return {}
    return {name: float(np.asarray(tensors.pop(name), np.float32).reshape(()))}


def find_model(name: str) -> pathlib.Path:
    """The files of a model by name, of this package or the hub, fetched where they are not here.

    Raises:
        ValueError: there is no such path and no such model, or the hub does not answer.
    """
    address = name if os.path.exists(name) else HUB_MODELS.get(name, name)
    return download(address, choose_files) if is_hub_name(address) else locate_weights(name)


def _infer_architecture(
    tensors: Mapping[str, np.ndarray], where: str, activation_given: bool
) -> Architecture:
    """The architecture of a state dict in CLIP's layout without any config."""
    arch = clip_layout.infer_architecture(clip_layout.normalize_names(tensors), where)
    if tensors.keys() >= clip_layout.EXTRAS:  # OpenAI's own archives
        return dataclasses.replace(arch, activation="quick_gelu")
    if not activation_given:
        logging.info(
            "%s: no config names the activation; taken for exact GELU, as in DiHT's and most of "
            "open_clip's weights (--architecture activation=quick_gelu for others)",
            where,
        )
    return arch


def find_weight_file(folder: pathlib.Path) -> pathlib.Path:
    """The weight file of a model directory.

    Raises:
        ValueError: none, or several of which none has a usual name.
    """
    names = list_weight_files(epath.Path(folder))
    for name in _PREFERRED:
        if name in names:
            return folder / name
    if len(names) == 1:
        return folder / names[0]
    raise ValueError(
        f"{folder}: neither a work directory of diht_jax.train (config.json is missing) nor a "
        f"directory with one weight file ({', '.join(WEIGHT_SUFFIXES)}); weight files found: "
        + (f"{', '.join(names)}; name one of them" if names else "none")
    )


def choose_files(names: Sequence[str]) -> list[str]:
    """What `read_weights` needs of the files of a repository: the configs and one set of weights.

    Raises:
        ValueError: there are no weights that it reads, or several of which none has a usual name.
    """
    weights = [n for n in names if n.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX)) and "/" not in n]
    usual = [name for name in _PREFERRED if name in weights]
    if not usual and len(weights) != 1:
        raise ValueError(
            f"there is no one weight file ({', '.join(WEIGHT_SUFFIXES)}) in it, but "
            f"{', '.join(weights) or 'none'}"
        )
    chosen = (usual or weights)[0]
    stem, _, suffix = chosen.removesuffix(INDEX_SUFFIX).rpartition(".")
    shards = [n for n in weights if n.startswith(f"{stem}-") and chosen.endswith(INDEX_SUFFIX)]
    pictures = (HUGGINGFACE_PROCESSOR, HUGGINGFACE_PREPROCESSOR)
    configs = (OPEN_CLIP_CONFIG, HUGGINGFACE_CONFIG, *pictures, HUGGINGFACE_MERGES)
    wanted = (chosen, *shards, *configs, *TOKENIZER_FILES)
    return [name for name in names if name in wanted]


def list_weight_files(folder: epath.Path) -> list[str]:
    """Names of the weight files and indices of shards in a directory, sorted."""
    suffixes = (*WEIGHT_SUFFIXES, INDEX_SUFFIX)
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(suffixes) and p.is_file())


def _read_settings(
    folder: pathlib.Path, is_huggingface: bool
) -> tuple[Architecture | None, Preprocessing, bool]:
    """The settings in the configs of the file's directory; no architecture without a config.

    The last one is whether a config names our tokenizer.
    """
    if is_huggingface:
        config = folder / HUGGINGFACE_CONFIG
        if not config.is_file():
            return None, Preprocessing(), False
        arch = huggingface.read_architecture(check_object(config.read_bytes(), config), str(config))
        has_tokenizer = _has_our_merges(folder / HUGGINGFACE_MERGES, arch.vocab_size)
        return arch, _read_image_processor(folder, arch), has_tokenizer
    path = folder / OPEN_CLIP_CONFIG
    if path.is_file():
        content = check_object(path.read_bytes(), path)
        arch = open_clip_config.read_architecture(content.get("model_cfg", content), str(path))
        preprocessing = content.get("preprocess_cfg", {})
        section = ConfigSection(content.get("tokenizer"), "tokenizer", str(path))
        has_tokenizer = section.values.get("kind") == TOKENIZER_KIND
        return arch, read_preprocess_cfg(preprocessing, str(path)), has_tokenizer
    return None, Preprocessing(), False


def _read_image_processor(folder: pathlib.Path, arch: Architecture) -> Preprocessing:
    """The preprocessing in a directory of transformers; the usual one of its model without a file.

    Of two files transformers takes `processor_config.json`, if it has this part.
    """
    together, alone = folder / HUGGINGFACE_PROCESSOR, folder / HUGGINGFACE_PREPROCESSOR
    if together.is_file():
        part = "image_processor"
        found = ConfigSection(
            check_object(together.read_bytes(), together).get(part), part, str(together)
        )
        if found.values:
            return read_preprocessor(found.values, str(together))
    if alone.is_file():
        return read_preprocessor(check_object(alone.read_bytes(), alone), str(alone))
    kind = "Siglip" if huggingface.model_type(arch) == "siglip" else "CLIP"
    return read_preprocessor({"image_processor_type": f"{kind}ImageProcessor"}, str(alone))


def _read_tokenizer(
    folder: pathlib.Path, is_huggingface: bool, has_clip_tokenizer: bool
) -> tuple[FileTokenizer | None, bool]:
    """The tokenizer in the file's directory, and whether the model has CLIP's instead."""
    if is_huggingface:
        return None if has_clip_tokenizer else read_tokenizer(folder), has_clip_tokenizer
    path = folder / OPEN_CLIP_CONFIG
    if path.is_file():
        content = check_object(path.read_bytes(), path)
        text = ConfigSection(content.get("model_cfg", content), "", str(path)).section("text_cfg")
        clean = read_cleaning(text.values, str(path))
        if clean is not None:
            return read_tokenizer(folder, clean), False
    return None, has_clip_tokenizer


def _has_our_merges(path: pathlib.Path, vocab_size: int) -> bool:
    """Returns whether a tokenizer's merges are the first of CLIP's that fill the vocabulary."""
    if not path.is_file() or vocab_size < tokenizer.SMALLEST_VOCAB:
        return False
    merges = [" ".join(pair) for pair in tokenizer.merges(min(vocab_size, tokenizer.VOCAB_SIZE))]
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[1:-1] == merges


def _replace_fields(arch: Architecture, fields: Mapping[str, Any]) -> Architecture:
    for name, value in fields.items():
        if name not in ARCHITECTURE_FIELDS:
            nearest = nearest_name(name, ARCHITECTURE_FIELDS)
            hint = f"; did you mean '{nearest}'?" if nearest else ""
            raise ValueError(f"an architecture has no field '{name}'{hint}")
        if not isinstance(value, ARCHITECTURE_FIELDS[name] | None):
            raise ValueError(
                f"architecture.{name}: expected {ARCHITECTURE_FIELDS[name].__name__}, got {value!r}"
            )
    return dataclasses.replace(arch, **fields)
