"""Exports models as directories that other programs can load.

`source.py` reads exported weights back bit for bit. `model_card.py` writes the text of the model
card.

StableHLO (from `jax.export`; JAX and IREE run it on CPUs, GPUs and TPUs) and ONNX (from torch's
exporter and the model of transformers) hold both towers as programs that run without this package,
weights included. They map pictures uint8 [b, size, size, 3] and token ids int32 [b, context_length]
to unit vectors, float32 [b, d], for any b.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import logging
from jax import export

from diht_jax.data.tokenizer import SMALLEST_VOCAB, check_vocab_size, merges
from diht_jax.input import transforms
from diht_jax.models.parameters import ModelDefinition, merge_model
from diht_jax.models.transformer import Execution
from diht_jax.models.zoo import Architecture
from diht_jax.storage.files import write_bytes
from diht_jax.weights import clip_layout, huggingface, open_clip_layout, tokenizer_file
from diht_jax.weights.clip_layout import to_layout
from diht_jax.weights.settings import make_preprocessor
from diht_jax.weights.source import (
    HUGGINGFACE_CONFIG,
    HUGGINGFACE_MERGES,
    HUGGINGFACE_PREPROCESSOR,
    LOGIT_BIAS,
    OPEN_CLIP_CONFIG,
    SETTINGS_DIGEST,
    TOKENIZER_KIND,
    ModelFiles,
    read_settings,
)
from diht_jax.weights.tensor_files import write_safetensors, write_torch

FORMATS = ("clip", "open_clip", "huggingface", "safetensors", "stablehlo", "onnx")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CARD_FILE = "README.md"
_PROGRAMS = ("stablehlo", "onnx")
_ONNX_PACKAGES = ("torch", "transformers", "onnx", "onnxscript")
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# open_clip and transformers reject unknown parameters.
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
        output: directory to create; `check_target` has checked it, with format and dtype.
        format: one of `FORMATS`: "clip" (`model.pt`, a plain torch state dict as OpenAI's, DiHT's
            and open_clip's code loads it), "safetensors" (the same names in
            `model.safetensors`), "open_clip" or "huggingface" (for their loaders),
            "stablehlo" or "onnx" (both towers as programs).
        model: the model to write.
        card: text of the model card.
        dtype: of the stored parameters, a key of `DTYPES`.
        keep_heads: also write the model's concept heads, if any.

    Raises:
        ValueError: a model or heads that the format cannot hold.
    """
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
    if model.tokenizer is not None:
        tokenizer_file.copy_tokenizer(model.tokenizer, str(output))
    elif model.has_tokenizer and format in _FORMATS_WITH_TOKENIZER:
        _write_huggingface_tokenizer(output, model.arch)
    for name, content in configs.items():
        _write_json(output / name, content)
    write_bytes(output / CARD_FILE, card.encode())
    if format == "onnx":
        write_onnx(output, model)
    elif format == "stablehlo":
        write_stablehlo(output, model, dtype)
    else:
        tensors = {**_named_tensors(format, model), **heads}
        tensors = {name: np.asarray(v).astype(DTYPES[dtype]) for name, v in tensors.items()}
        if format == "clip":
            write_torch(output / "model.pt", tensors)
        else:
            prefix = "open_clip_" if format == "open_clip" else ""
            settings = read_settings(output, format == "huggingface")
            stated = {SETTINGS_DIGEST: settings.digest()} if settings else {}
            write_safetensors(output / f"{prefix}model.safetensors", tensors, **stated)


def _make_configs(format: str, model: ModelFiles, dtype: str) -> dict[str, dict[str, Any]]:
    """Returns a format's configs by file name; ValueError if it cannot represent the model."""
    arch, preprocessing = model.arch, model.preprocessing
    if format == "huggingface":
        return {
            HUGGINGFACE_CONFIG: huggingface.make_config(arch, dtype),
            HUGGINGFACE_PREPROCESSOR: make_preprocessor(arch, preprocessing),
        }
    if format in _PROGRAMS:
        if format == "onnx":  # exported from the model of transformers
            huggingface.model_type(arch)
        return {OPEN_CLIP_CONFIG: open_clip_layout.describe(arch, preprocessing)}
    config = open_clip_layout.make_config(arch, preprocessing, model.loss_scalars.get(LOGIT_BIAS))
    # Facts about the tokenizer, for formats without tokenizer files.
    facts: dict[str, Any] = {"context_length": arch.context_length, "vocab_size": arch.vocab_size}
    if model.tokenizer is not None:
        clean = model.tokenizer.clean
        clean = "whitespace" if clean == "none" else clean
        names = {"hf_tokenizer_name": "in this folder", "tokenizer_kwargs": {"clean": clean}}
        config["model_cfg"]["text_cfg"] |= names
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
    """Returns the parameters by their names in a format's layout."""
    logit_bias = model.loss_scalars.get(LOGIT_BIAS)
    if format == "huggingface":
        return huggingface.to_huggingface(model.params, model.arch, logit_bias or 0.0)
    if not open_clip_layout.is_timm(model.arch):
        return clip_layout.to_clip(model.params, model.arch)
    tensors = to_layout(model.params, open_clip_layout.layout(model.arch))
    if logit_bias is not None:
        tensors[LOGIT_BIAS] = np.asarray(logit_bias, np.float32)
    return tensors


def check_target(output: pathlib.Path, format: str, dtype: str) -> None:
    """Checks that `write_model` can write this format to `output`.

    Raises:
        ValueError: unknown format or dtype, existing files, or no write permission.
    """
    if format not in FORMATS:
        raise ValueError(f"format '{format}': expected one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype '{dtype}': expected one of {', '.join(DTYPES)}")
    if format == "onnx":
        missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"format 'onnx' needs {', '.join(missing)}: `pip install {' '.join(missing)}`, or "
                "take the format 'stablehlo', which needs none of them"
            )
        if dtype != "float32":
            raise ValueError(f"format 'onnx' has float32 parameters; dtype '{dtype}' is not for it")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not an empty directory; name another one")
    path = output.absolute()
    present = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        raise ValueError(f"{output}: nothing can be written to {present}; name another directory")


def find_lost_scalars(format: str, model: ModelFiles, name: str) -> list[str]:
    """Returns the names of learnt loss scalars of the model `name` that a format cannot store.

    SigLIP's bias can be stored in transformers' SiglipModel, and in open_clip models with timm
    towers. All others are logged.
    """
    holds_bias = format not in _PROGRAMS and open_clip_layout.is_timm(model.arch)
    lost = [scalar for scalar in model.loss_scalars if not (holds_bias and scalar == LOGIT_BIAS)]
    for scalar in lost:
        logging.warning(
            "%s: %s=%.6g, which the loss has learnt, is left out, since format '%s' has no place "
            "for it: it is in the card. Probabilities of pairs need it, similarities do not",
            name,
            scalar,
            model.loss_scalars[scalar],
            format,
        )
    return lost


def _write_huggingface_tokenizer(output: pathlib.Path, arch: Architecture) -> None:
    used = check_vocab_size(arch.vocab_size)
    pieces, made = tokenizer_file.pieces(used), tokenizer_file.make_tokenizer(used)
    _write_json(output / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges(used))]
    write_bytes(output / HUGGINGFACE_MERGES, ("\n".join(lines) + "\n").encode())
    write_bytes(output / "tokenizer.json", made.to_str(pretty=True).encode())
    markers = {"bos_token": tokenizer_file.START_OF_TEXT}
    markers |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), tokenizer_file.END_OF_TEXT)
    config = {
        # Not CLIPTokenizer, which would apply its own normaliser before that of tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": arch.context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        **markers,
    }
    _write_json(output / "tokenizer_config.json", config)
    _write_json(output / "special_tokens_map.json", markers)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_stablehlo(output: pathlib.Path, model: ModelFiles, dtype: str) -> None:
    """Writes `image.stablehlo` and `text.stablehlo` for `jax.export.deserialize` into a directory.

    Parameters are stored in `dtype`; the computation is in float32.
    """
    arch, mean, std = model.arch, model.preprocessing.mean, model.preprocessing.std
    # XLA's attention is available on every platform.
    definition = ModelDefinition(arch, "float32", dtype, Execution(attention="xla"))
    stored = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), model.params)

    def encode_image(images):
        pixels = transforms.normalize(images, jnp.dtype("float32"), mean=mean, std=std)
        return merge_model(definition, stored).encode_image(pixels)

    def encode_text(tokens):
        return merge_model(definition, stored).encode_text(tokens)

    (batch,) = export.symbolic_shape("b")
    side = arch.image_size
    towers = {
        "image": (encode_image, jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)),
        "text": (encode_text, jax.ShapeDtypeStruct((batch, arch.context_length), jnp.int32)),
    }
    for name, (encode, inputs) in towers.items():
        exported = export.export(jax.jit(encode), platforms=_PLATFORMS)(inputs)
        write_bytes(output / f"{name}.stablehlo", bytes(exported.serialize()))


def write_onnx(output: pathlib.Path, model: ModelFiles) -> None:
    """Writes `image.onnx` and `text.onnx`, with float32 parameters, into a directory."""
    import torch

    for name, (tower, argument, example) in _make_towers(model).items():
        with tempfile.TemporaryDirectory(dir=output) as folder:
            path = pathlib.Path(folder) / "tower.onnx"
            torch.onnx.export(
                tower.eval(),
                (example,),
                path,
                input_names=[argument],
                output_names=["embeddings"],
                dynamic_shapes=({0: torch.export.Dim("b")},),
                external_data=False,
                dynamo=True,
                verbose=False,
            )
            write_bytes(output / f"{name}.onnx", path.read_bytes())


def _make_towers(source: ModelFiles) -> dict[str, tuple[Any, str, Any]]:
    """Returns torch modules by tower, each with the name and an example of its argument."""
    import torch
    from transformers import AutoConfig, AutoModel

    arch, preprocessing = source.arch, source.preprocessing
    # "eager" attention becomes plain matrix products, which every runtime supports.
    settings: dict[str, Any] = huggingface.make_config(arch, "float32")
    settings["attn_implementation"] = "eager"
    model = AutoModel.from_config(AutoConfig.for_model(**settings)).eval()
    tensors = huggingface.to_huggingface(source.params, arch)
    # Copies, since the parameters may be views of read-only arrays.
    state = {name: torch.from_numpy(np.array(v, np.float32)) for name, v in tensors.items()}
    model.load_state_dict(state)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))

    class Tower(torch.nn.Module):
        def __init__(self, tower, projection: str):
            super().__init__()
            self.tower, self.projection = tower, getattr(model, projection, torch.nn.Identity())

        def embed(self, **inputs):
            pooled = self.tower(**inputs).pooler_output
            return torch.nn.functional.normalize(self.projection(pooled), dim=-1)

    class ImageTower(Tower):
        def forward(self, images):
            pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 255
            return self.embed(pixel_values=(pixels - mean) / std)

    class TextTower(Tower):
        def forward(self, tokens):
            return self.embed(input_ids=tokens)

    images = torch.zeros((2, arch.image_size, arch.image_size, 3), dtype=torch.uint8)
    tokens = torch.zeros((2, arch.context_length), dtype=torch.int32)
    return {
        "image": (ImageTower(model.vision_model, "visual_projection"), "images", images),
        "text": (TextTower(model.text_model, "text_projection"), "tokens", tokens),
    }
