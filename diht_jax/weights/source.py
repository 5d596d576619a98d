"""Reads the weights of any CLIP, from a file or directory, into our parameter tree.

The files at a path determine the format:

    open_clip_config.json            CLIP's layout, as on open_clip's hub and in our exports
    config.json with "model_type"    transformers' CLIPModel, MetaClip2Model or SiglipModel
    one weight file                  CLIP's layout (OpenAI, open_clip, DiHT)

For a path to a weight file, a config next to it has the same effect.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from diht_jax.data import tokenizer
from diht_jax.data.tokenizer import FileTokenizer
from diht_jax.models.parameters import fit_model
from diht_jax.models.zoo import Architecture, replace_fields
from diht_jax.storage.hub import download, is_hub_name
from diht_jax.weights import clip_layout, huggingface, open_clip_layout
from diht_jax.weights.clip_layout import from_layout
from diht_jax.weights.releases import HUB_MODELS, hash_file, locate_weights
from diht_jax.weights.settings import (
    ConfigSection,
    Preprocessing,
    read_config,
    read_preprocess_cfg,
    read_preprocessor,
)
from diht_jax.weights.tensor_files import (
    INDEX_SUFFIX,
    WEIGHT_SUFFIXES,
    read_metadata,
    read_tensors,
)
from diht_jax.weights.tokenizer_file import (
    TOKENIZER_FILES,
    is_copy,
    read_cleaning,
    read_tokenizer,
)

OPEN_CLIP_CONFIG = "open_clip_config.json"
HUGGINGFACE_CONFIG = "config.json"
HUGGINGFACE_PREPROCESSOR = "preprocessor_config.json"
# Used instead since transformers 5, together with other input settings of a model.
HUGGINGFACE_PROCESSOR = "processor_config.json"
HUGGINGFACE_MERGES = "merges.txt"
# In `open_clip_config.json`; smaller vocabularies have the first merges of CLIP's.
TOKENIZER_KIND = "CLIP byte-pair encoding (bpe_simple_vocab_16e6), lower case"

SETTINGS_DIGEST = "settings_crc32"  # in the metadata of weights
_SETTINGS_FILES = (
    OPEN_CLIP_CONFIG,
    HUGGINGFACE_CONFIG,
    HUGGINGFACE_PREPROCESSOR,
    HUGGINGFACE_MERGES,
    *TOKENIZER_FILES,
)

LOGIT_BIAS = "logit_bias"
# If a directory has several weight files, the first of these is used.
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
        params: nested dict of arrays as in `models.parameters`, one entry per block.
        path: weight file, or work directory of `diht_jax.train`.
        heads: concept heads by their names in CLIP's layout; empty if there are none.
        preprocessing: of the pictures.
        sha256: of a weight file, in hex; None for shards.
        config: the training config of a run; for other weights it is empty until `loading` fills
            in the defaults.
        decoder: parameters of the caption decoder, for a run that trained one.
        loss_scalars: learnt by the loss, such as SigLIP's `logit_bias`.
        step: optimiser step, for a run.
        ema: whether `params` are the moving average.
        has_tokenizer: whether texts can be tokenized, by `tokenizer` or by `data.tokenizer`.
        tokenizer: the model's own; None for CLIP's, or if there is none.
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


class Settings(NamedTuple):
    """Settings from the configs next to a weight file; see `ModelFiles`."""

    arch: Architecture
    preprocessing: Preprocessing
    has_tokenizer: bool
    tokenizer: FileTokenizer | None

    def digest(self) -> str:
        """Returns a CRC32 of all settings that are not defaults."""
        facts: list[Any] = [
            [
                [f.name, getattr(part, f.name)]
                for f in dataclasses.fields(part)
                if getattr(part, f.name) != f.default
            ]
            for part in (self.arch, self.preprocessing)
        ]
        facts += [self.has_tokenizer, self.tokenizer is None]  # a tokenizer has its own checksum
        return f"{zlib.crc32(json.dumps(facts).encode()):08x}"


def read_weights(
    path: str | os.PathLike[str],
    *,
    architecture: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
) -> ModelFiles:
    """Reads the weights of a CLIP.

    Args:
        path: weight file or model directory, see above; or the name of a model that is included in
            this package, released, or on the hub, downloaded if needed.
        architecture: fields of `Architecture` that neither shapes nor a config next to the file
            reveal, such as `{"activation": "quick_gelu", "vision_heads": 16}`.
        image_size: pixels; image positions are resized to it. None keeps the file's.
        context_length: tokens; text positions are stretched to it. None keeps the file's.

    Raises:
        ValueError: no weights, a file that is damaged or could run code, parameters that are
            missing, unknown or wrongly shaped (all are listed), or settings our model lacks.
    """
    name = os.fspath(path)
    address = name if os.path.exists(name) else HUB_MODELS.get(name, name)
    found = download(address, choose_files) if is_hub_name(address) else locate_weights(name)
    file = find_weight_file(found) if found.is_dir() else found
    folder, fields = file.parent, architecture or {}
    tensors = read_tensors(file)
    is_huggingface = "vision_model.embeddings.patch_embedding.weight" in tensors
    settings = read_settings(folder, is_huggingface)
    stated = read_metadata(file).get(SETTINGS_DIGEST)
    if stated is not None and (settings is None or settings.digest() != stated):
        raise ValueError(
            f"{folder}: {', '.join(_SETTINGS_FILES)}: one is missing, damaged or of another model, "
            f"since {file.name} was exported with other settings; export the model again"
        )
    where = str(file)
    if settings is not None:
        where += f" with {HUGGINGFACE_CONFIG if is_huggingface else OPEN_CLIP_CONFIG}"
    else:
        arch = _infer_architecture(tensors, str(file), "activation" in fields)
        has_tokenizer = arch.vocab_size == tokenizer.VOCAB_SIZE
        settings = Settings(arch, Preprocessing(), has_tokenizer, None)
    arch = replace_fields(settings.arch, fields, "architecture")
    # A config may claim any number of layers, and each would be searched for by name.
    most_layers = max(arch.vision_layers, arch.text_layers)
    if most_layers > len(tensors):
        raise ValueError(f"{where}: {len(tensors)} parameters for a model of {most_layers} layers")
    heads = {k: v for k, v in tensors.items() if k.startswith(clip_layout.HEADS_PREFIX)}
    tensors = {name: value for name, value in tensors.items() if name not in heads}
    params, loss_scalars = _convert(tensors, arch, is_huggingface, where)
    params, arch = fit_model(params, arch, image_size=image_size, context_length=context_length)
    return ModelFiles(
        arch=arch,
        params=jax.tree.map(np.asarray, params),
        path=str(file),
        heads=heads,
        preprocessing=settings.preprocessing,
        sha256=None if file.name.endswith(INDEX_SUFFIX) else hash_file(file),
        loss_scalars=loss_scalars,
        has_tokenizer=settings.has_tokenizer,
        tokenizer=settings.tokenizer,
    )


def read_settings(folder: pathlib.Path, is_huggingface: bool) -> Settings | None:
    """Reads the settings in a folder; None if it has no config of open_clip, and needs none."""
    if is_huggingface:
        return _read_huggingface(folder)
    return _read_open_clip(folder) if (folder / OPEN_CLIP_CONFIG).is_file() else None


def _convert(
    tensors: dict[str, np.ndarray], arch: Architecture, is_huggingface: bool, where: str
) -> tuple[dict[str, Any], dict[str, float]]:
    """Converts a state dict to our parameters and the learnt scalars of the loss."""
    if is_huggingface:
        layout = huggingface.layout(arch)
        tensors = {k: v for k, v in tensors.items() if k not in huggingface.BUFFERS}
    else:
        layout = (open_clip_layout if open_clip_layout.is_timm(arch) else clip_layout).layout(arch)
        tensors = clip_layout.normalize_names(tensors)
    # A scale of shape [1] is equivalent to one of shape [].
    if "logit_scale" in tensors and tensors["logit_scale"].shape == (1,):
        tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    loss_scalars = {}
    if open_clip_layout.is_timm(arch) and LOGIT_BIAS in tensors and tensors[LOGIT_BIAS].size == 1:
        loss_scalars[LOGIT_BIAS] = float(tensors.pop(LOGIT_BIAS).astype(np.float32).item())
    return from_layout(tensors, layout, clip_layout.our_shapes(arch), where), loss_scalars


def _infer_architecture(
    tensors: Mapping[str, np.ndarray], where: str, activation_given: bool
) -> Architecture:
    """Infers the architecture of a state dict in CLIP's layout without a config."""
    if any(name.startswith(open_clip_layout.TRUNK) for name in tensors):
        raise ValueError(
            f"{where}: names are those of open_clip with an image tower of timm, for which "
            f"{OPEN_CLIP_CONFIG} must be in the same folder; it is not"
        )
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
    """Finds the weight file of a model directory.

    Raises:
        ValueError: there is none, or there are several without a usual name.
    """
    try:
        return folder / _choose(list_weight_files(epath.Path(folder)))
    except ValueError as error:
        raise ValueError(
            f"{folder}: neither a work directory of diht_jax.train (config.json is missing) nor a "
            f"directory of weights: {error}"
        ) from error


def _choose(names: Sequence[str]) -> str:
    """Selects one of several weight files."""
    usual = [name for name in _PREFERRED if name in names]
    if not usual and len(names) != 1:
        raise ValueError(
            f"expected one ({', '.join(WEIGHT_SUFFIXES)}) or a usual name; weight files found: "
            + (f"{', '.join(names)}; name one of them" if names else "none")
        )
    return (usual or names)[0]


def choose_files(names: Sequence[str]) -> list[str]:
    """Selects the files of a repository that `read_weights` needs: configs and one set of weights.

    Raises:
        ValueError: there are no supported weights, or several without a usual name.
    """
    weights = [n for n in names if n.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX)) and "/" not in n]
    chosen = _choose(weights)
    stem, _, _ = chosen.removesuffix(INDEX_SUFFIX).rpartition(".")
    shards = [n for n in weights if n.startswith(f"{stem}-") and chosen.endswith(INDEX_SUFFIX)]
    wanted = (chosen, *shards, HUGGINGFACE_PROCESSOR, *_SETTINGS_FILES)
    return [name for name in names if name in wanted]


def list_weight_files(folder: epath.Path) -> list[str]:
    """Returns the sorted names of weight files and shard indices in a directory."""
    suffixes = (*WEIGHT_SUFFIXES, INDEX_SUFFIX)
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(suffixes) and p.is_file())


def _read_huggingface(folder: pathlib.Path) -> Settings:
    """Reads the settings in the folder of a model of transformers."""
    path = folder / HUGGINGFACE_CONFIG
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file, and the names in the weight file are those of a model of "
            "transformers, which needs it"
        )
    arch = huggingface.read_architecture(read_config(path), str(path))
    # A vocabulary of CLIP's size is CLIP's, unless an export of ours has another tokenizer.
    has_clips = not is_copy(os.listdir(folder)) and (
        arch.vocab_size == tokenizer.VOCAB_SIZE
        or _has_our_merges(folder / HUGGINGFACE_MERGES, arch.vocab_size)
    )
    own = None if has_clips else read_tokenizer(folder)
    kind = "Siglip" if huggingface.model_type(arch) == "siglip" else "CLIP"
    pictures = folder / HUGGINGFACE_PREPROCESSOR
    processor = read_config(pictures) or {"image_processor_type": f"{kind}ImageProcessor"}
    # transformers prefers this file if it has the image processor's part.
    together = folder / HUGGINGFACE_PROCESSOR
    part = ConfigSection(read_config(together), "", str(together)).section("image_processor")
    if part.values:
        pictures, processor = together, part.values
    preprocessing = read_preprocessor(processor, str(pictures))
    return Settings(arch, preprocessing, has_clips or own is not None, own)


def _read_open_clip(folder: pathlib.Path) -> Settings:
    """Reads the settings in the folder of an open_clip model, or of our export."""
    path = folder / OPEN_CLIP_CONFIG
    content = read_config(path)
    whole = ConfigSection(content, "", str(path))
    model = whole.section("model_cfg") if "model_cfg" in content else whole
    arch = open_clip_layout.read_architecture(model.values, str(path))
    preprocessing = read_preprocess_cfg(content.get("preprocess_cfg"), str(path))
    clean = read_cleaning(model.section("text_cfg").values, str(path))
    if clean is not None:
        own = read_tokenizer(folder, clean)
        return Settings(arch, preprocessing, own is not None, own)
    names_ours = whole.section("tokenizer").values.get("kind") == TOKENIZER_KIND
    has_clips = names_ours or arch.vocab_size == tokenizer.VOCAB_SIZE
    return Settings(arch, preprocessing, has_clips, None)


def _has_our_merges(path: pathlib.Path, vocab_size: int) -> bool:
    """Returns whether a tokenizer's merges are CLIP's, truncated to the vocabulary."""
    if not path.is_file() or vocab_size < tokenizer.SMALLEST_VOCAB:
        return False
    merges = [" ".join(pair) for pair in tokenizer.merges(min(vocab_size, tokenizer.VOCAB_SIZE))]
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[1:-1] == merges
