"""Directories that other programs load a model from.

`source.py` reads back what is written here, bit for bit. The text of the model card comes from
`model_card.py`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from diht_jax.data.tokenizer import SMALLEST_VOCAB, VOCAB_SIZE, check_vocab_size, merges
from diht_jax.models.zoo import Architecture
from diht_jax.storage.files import write_bytes
from diht_jax.weights import (
    clip_layout,
    huggingface,
    open_clip_config,
    timm_layout,
    tokenizer_file,
)
from diht_jax.weights.layout import to_layout
from diht_jax.weights.programs import onnx, stablehlo
from diht_jax.weights.settings import make_preprocessor
from diht_jax.weights.source import (
    HUGGINGFACE_CONFIG,
    HUGGINGFACE_MERGES,
    HUGGINGFACE_PREPROCESSOR,
    LOGIT_BIAS,
    OPEN_CLIP_CONFIG,
    TOKENIZER_KIND,
    ModelFiles,
)
from diht_jax.weights.tensor_files import write_safetensors, write_torch

FORMATS = ("clip", "open_clip", "huggingface", "safetensors", "stablehlo", "onnx")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CARD_FILE = "README.md"

_PROGRAMS = ("stablehlo", "onnx")
# open_clip and transformers refuse parameters that they do not know.
_FORMATS_WITH_HEADS = ("clip", "safetensors")
_FORMATS_WITH_TOKENIZER = ("huggingface", *_PROGRAMS)


def write_model(
    output: pathlib.Path,
    format: str,
    model: ModelFiles,
    *,
    card: str,
    dtype: str = "float32",
    keep_heads: bool = False,
) -> None:
    """Writes a model directory.

    Args:
        output: is made, and must be empty.
        format: one of `FORMATS`: "clip" (`model.pt`, a plain torch state dict as OpenAI's, DiHT's
            and open_clip's code loads it), "safetensors" (the same names in
            `model.safetensors`), "open_clip" or "huggingface" (what their loaders expect),
            "stablehlo" or "onnx" (both towers as programs, see `weights.programs`).
        model: what to write.
        card: text of the model card.
        dtype: of the stored parameters, a key of `DTYPES`.
        keep_heads: write the model's concept heads too, if it has any.

    Raises:
        ValueError: unknown format or dtype, a model or heads that the format cannot hold, files in
            the way.
    """
    check_target(output, format, dtype)
    heads = model.heads if keep_heads else {}
    if heads and format not in _FORMATS_WITH_HEADS:
        raise ValueError(
            f"format '{format}' cannot hold concept heads, since its loader refuses what it does "
            f"not know; leave them out, or take {' or '.join(_FORMATS_WITH_HEADS)}"
        )
    try:
        configs = _make_configs(format, model, dtype)
    except ValueError as error:
        raise ValueError(f"format '{format}': {error}") from error
    output.mkdir(parents=True, exist_ok=True)
    has_place = format in _FORMATS_WITH_TOKENIZER and model.arch.vocab_size <= VOCAB_SIZE
    if model.tokenizer is not None:
        tokenizer_file.copy_tokenizer(model.tokenizer, str(output))
    elif model.has_tokenizer and has_place:
        _write_huggingface_tokenizer(output, model.arch)
    for name, content in configs.items():
        _write_json(output / name, content)
    write_bytes(output / CARD_FILE, card.encode())
    if format == "onnx":
        onnx.write_onnx(output, model)
    elif format == "stablehlo":
        stablehlo.write_stablehlo(output, model, dtype)
    else:
        tensors = {**_named_tensors(format, model), **heads}
        tensors = {name: np.asarray(v).astype(DTYPES[dtype]) for name, v in tensors.items()}
        if format == "clip":
            write_torch(output / "model.pt", tensors)
        else:
            prefix = "open_clip_" if format == "open_clip" else ""
            write_safetensors(output / f"{prefix}model.safetensors", tensors)


def _make_configs(format: str, model: ModelFiles, dtype: str) -> dict[str, dict[str, Any]]:
    """The configs of a format by the names of their files; ValueError if it has no such model."""
    arch, preprocessing = model.arch, model.preprocessing
    if format == "huggingface":
        return {
            HUGGINGFACE_CONFIG: huggingface.make_config(arch, dtype),
            HUGGINGFACE_PREPROCESSOR: make_preprocessor(arch, preprocessing),
        }
    if format in _PROGRAMS:
        if format == "onnx":  # exported from transformers' model
            huggingface.model_type(arch)
        return {OPEN_CLIP_CONFIG: open_clip_config.describe(arch, preprocessing)}
    config = open_clip_config.make_config(arch, preprocessing, model.loss_scalars.get(LOGIT_BIAS))
    # Facts about the tokenizer, of which these formats have no files.
    facts: dict[str, Any] = {"context_length": arch.context_length, "vocab_size": arch.vocab_size}
    if model.tokenizer is not None:
        config["model_cfg"]["text_cfg"] |= tokenizer_file.make_cleaning(model.tokenizer)
    elif model.has_tokenizer and arch.vocab_size >= SMALLEST_VOCAB:
        used = check_vocab_size(arch.vocab_size)
        facts |= {
            "kind": TOKENIZER_KIND,
            "start_of_text_id": used - 2,
            "end_of_text_id": used - 1,
            "padding_id": 0,
        }
    return {OPEN_CLIP_CONFIG: {**config, "tokenizer": facts}}


def _named_tensors(format: str, model: ModelFiles) -> dict[str, np.ndarray]:
    """Parameters by their names in a format's layout."""
    logit_bias = model.loss_scalars.get(LOGIT_BIAS)
    if format == "huggingface":
        return huggingface.to_huggingface(model.params, model.arch, logit_bias or 0.0)
    if not timm_layout.is_timm(model.arch):
        return clip_layout.to_clip(model.params, model.arch)
    tensors = to_layout(model.params, timm_layout.layout(model.arch))
    if logit_bias is not None:
        tensors[LOGIT_BIAS] = np.asarray(logit_bias, np.float32)
    return tensors


def check_target(output: pathlib.Path, format: str, dtype: str) -> None:
    """Checks that `write_model` could write this format there.

    Raises:
        ValueError: unknown format or dtype, or files in the way.
    """
    if format not in FORMATS:
        raise ValueError(f"format '{format}': expected one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype '{dtype}': expected one of {', '.join(DTYPES)}")
    if format == "onnx":
        onnx.check_packages()
        if dtype != "float32":
            raise ValueError(f"format 'onnx' has float32 parameters; dtype '{dtype}' is not for it")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not an empty directory; name another one")


def find_lost_scalars(
    format: str, arch: Architecture, loss_scalars: Mapping[str, float], name: str
) -> list[str]:
    """Names of what the loss of the model `name` has learnt that a format has no place for.

    SigLIP's bias has one in transformers' SiglipModel, and in open_clip's models of timm's towers.
    The others are logged.
    """
    holds_bias = format not in _PROGRAMS and timm_layout.is_timm(arch)
    lost = [scalar for scalar in loss_scalars if not (holds_bias and scalar == LOGIT_BIAS)]
    for scalar in lost:
        logging.warning(
            "%s: %s=%.6g, which the loss has learnt, is left out, since format '%s' has no place "
            "for it: it is in the card. Probabilities of pairs need it, similarities do not",
            name,
            scalar,
            loss_scalars[scalar],
            format,
        )
    return lost


def _write_huggingface_tokenizer(output: pathlib.Path, arch: Architecture) -> None:
    pieces = tokenizer_file.pieces(arch.vocab_size)
    made = tokenizer_file.make_tokenizer(arch.vocab_size)
    _write_json(output / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges(arch.vocab_size))]
    write_bytes(output / HUGGINGFACE_MERGES, ("\n".join(lines) + "\n").encode())
    write_bytes(output / "tokenizer.json", made.to_str(pretty=True).encode())
    markers = {"bos_token": tokenizer_file.START_OF_TEXT}
    markers |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), tokenizer_file.END_OF_TEXT)
    config = {
        # Not CLIPTokenizer, which would put its own normaliser before that of tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": arch.context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        **markers,
    }
    _write_json(output / "tokenizer_config.json", config)
    _write_json(output / "special_tokens_map.json", markers)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
