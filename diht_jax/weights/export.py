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

from diht_jax.data import tokenizer
from diht_jax.data.file_tokenizer import FileTokenizer
from diht_jax.models.zoo import Architecture
from diht_jax.storage.files import write_bytes
from diht_jax.weights import (
    clip_layout,
    huggingface,
    open_clip_config,
    timm_layout,
    tokenizer_file,
)
from diht_jax.weights.programs import onnx, stablehlo
from diht_jax.weights.settings import Preprocessing, make_preprocessor
from diht_jax.weights.source import (
    HUGGINGFACE_CONFIG,
    HUGGINGFACE_MERGES,
    HUGGINGFACE_PREPROCESSOR,
    OPEN_CLIP_CONFIG,
    TOKENIZER_KIND,
)
from diht_jax.weights.tensor_files import write_safetensors, write_torch

FORMATS = ("clip", "open_clip", "huggingface", "safetensors", "stablehlo", "onnx")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CARD_FILE = "README.md"

_PROGRAMS = ("stablehlo", "onnx")
_LOGIT_BIAS = "logit_bias"
# open_clip and transformers refuse parameters that they do not know.
_FORMATS_WITH_HEADS = ("clip", "safetensors")


def write_model(
    output: pathlib.Path,
    format: str,
    *,
    arch: Architecture,
    params: Mapping[str, Any],
    preprocessing: Preprocessing,
    heads: Mapping[str, np.ndarray],
    card: str,
    dtype: str = "float32",
    has_tokenizer: bool = True,
    own_tokenizer: FileTokenizer | None = None,
    loss_scalars: Mapping[str, float] | None = None,
) -> None:
    """Writes a model directory.

    Args:
        output: is made, and must be empty.
        format: one of `FORMATS`: "clip" (`model.pt`, a plain torch state dict as OpenAI's, DiHT's
            and open_clip's code loads it), "safetensors" (the same names in
            `model.safetensors`), "open_clip" or "huggingface" (what their loaders expect),
            "stablehlo" or "onnx" (both towers as programs, see `weights.programs`).
        arch, params, preprocessing: the model, layer by layer.
        heads: concept heads to keep, by their names in the file; empty leaves them out.
        card: text of the model card.
        dtype: of the stored parameters, a key of `DTYPES`.
        has_tokenizer: see `ModelFiles`.
        own_tokenizer: the model's, whose files are copied; None where it is CLIP's.
        loss_scalars: what the loss has learnt; see `lost_scalars`.

    Raises:
        ValueError: unknown format or dtype, a model or heads that the format cannot hold, files in
            the way.
    """
    check_target(output, format, dtype)
    if heads and format not in _FORMATS_WITH_HEADS:
        raise ValueError(
            f"format '{format}' cannot hold concept heads, since its loader refuses what it does "
            f"not know; leave them out, or take {' or '.join(_FORMATS_WITH_HEADS)}"
        )
    _check_model(format, arch, preprocessing)
    output.mkdir(parents=True, exist_ok=True)
    if own_tokenizer is not None:
        tokenizer_file.copy_tokenizer(own_tokenizer, str(output))
    has_tokenizer = has_tokenizer and own_tokenizer is None
    if format in _PROGRAMS:
        _write_programs(output, format, arch, params, preprocessing, dtype)
        if has_tokenizer and arch.vocab_size <= tokenizer.VOCAB_SIZE:
            _write_huggingface_tokenizer(output, arch)
        write_bytes(output / CARD_FILE, card.encode())
        return
    logit_bias = (loss_scalars or {}).get(_LOGIT_BIAS)
    tensors = {**_named_tensors(format, arch, params, logit_bias), **heads}
    tensors = {name: np.asarray(v).astype(DTYPES[dtype]) for name, v in tensors.items()}
    write_bytes(output / CARD_FILE, card.encode())
    if format == "huggingface":
        _write_huggingface(output, tensors, arch, preprocessing, dtype)
        if has_tokenizer and arch.vocab_size <= tokenizer.VOCAB_SIZE:
            _write_huggingface_tokenizer(output, arch)
    else:
        config = open_clip_config.make_config(arch, preprocessing, logit_bias)
        if own_tokenizer is not None:
            config["model_cfg"]["text_cfg"] |= tokenizer_file.make_cleaning(own_tokenizer)
        settings = _tokenizer_settings(arch, has_tokenizer)
        _write_json(output / OPEN_CLIP_CONFIG, {**config, "tokenizer": settings})
        if format == "clip":
            write_torch(output / "model.pt", tensors)
        else:
            prefix = "open_clip_" if format == "open_clip" else ""
            write_safetensors(output / f"{prefix}model.safetensors", tensors)


def _named_tensors(
    format: str, arch: Architecture, params: Mapping[str, Any], logit_bias: float | None
) -> dict[str, np.ndarray]:
    """Parameters by their names in a format's layout."""
    if format == "huggingface":
        return huggingface.to_huggingface(params, arch, logit_bias or 0.0)
    if timm_layout.is_timm(arch):
        return timm_layout.to_timm(params, arch, logit_bias)
    return clip_layout.to_clip(params, arch)


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


def lost_scalars(format: str, arch: Architecture, loss_scalars: Mapping[str, float]) -> list[str]:
    """Names of what a loss has learnt that a format has no place for.

    SigLIP's bias has one in transformers' SiglipModel, and in open_clip's models of timm's towers.
    """
    holds_bias = format not in _PROGRAMS and timm_layout.is_timm(arch)
    return [name for name in loss_scalars if not (holds_bias and name == _LOGIT_BIAS)]


def _check_model(format: str, arch: Architecture, preprocessing: Preprocessing) -> None:
    try:
        if format in ("huggingface", "onnx"):  # the latter is exported from transformers' model
            huggingface.model_type(arch)
        elif format not in _PROGRAMS:
            open_clip_config.make_config(arch, preprocessing)
    except ValueError as error:
        raise ValueError(f"format '{format}': {error}") from error


def _write_programs(
    output: pathlib.Path,
    format: str,
    arch: Architecture,
    params: Mapping[str, Any],
    preprocessing: Preprocessing,
    dtype: str,
) -> None:
    _write_json(output / OPEN_CLIP_CONFIG, open_clip_config.describe(arch, preprocessing))
    model = {"arch": arch, "params": params, "preprocessing": preprocessing}
    if format == "onnx":
        onnx.write_onnx(output, **model)
    else:
        stablehlo.write_stablehlo(output, **model, dtype=dtype)


def _write_huggingface(
    output: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    arch: Architecture,
    preprocessing: Preprocessing,
    dtype: str,
) -> None:
    _write_json(output / HUGGINGFACE_CONFIG, huggingface.make_config(arch, dtype))
    preprocessor = make_preprocessor(arch, preprocessing)
    _write_json(output / HUGGINGFACE_PREPROCESSOR, preprocessor)
    write_safetensors(output / "model.safetensors", tensors)


def _write_huggingface_tokenizer(output: pathlib.Path, arch: Architecture) -> None:
    pieces = tokenizer_file.pieces(arch.vocab_size)
    made = tokenizer_file.make_tokenizer(arch.vocab_size)
    _write_json(output / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges(arch.vocab_size))]
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


def _tokenizer_settings(arch: Architecture, has_tokenizer: bool) -> dict[str, Any]:
    """Facts about the tokenizer, for formats that have no tokenizer files."""
    sizes = {"context_length": arch.context_length, "vocab_size": arch.vocab_size}
    if not has_tokenizer or arch.vocab_size < tokenizer.SMALLEST_VOCAB:
        return sizes
    used = tokenizer.check_vocab_size(arch.vocab_size)
    return {
        "kind": TOKENIZER_KIND,
        **sizes,
        "start_of_text_id": used - 2,
        "end_of_text_id": used - 1,
        "padding_id": 0,
    }


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
