"""What a model needs beside its parameters, read from and written to the configs of others.

Architecture and preprocessing in the terms of open_clip (`open_clip_config.json`) and of Hugging
Face (`config.json`, `preprocessor_config.json`). Called by `source.py` and `export.py`. A setting
that would change what the model computes and that our model does not have is an error, never
ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diht_jax.data.transforms import CLIP_MEAN, CLIP_STD
from diht_jax.models.zoo import Architecture

# Fields of open_clip's configs that leave the computation alone, or are read below.
_OPEN_CLIP_VISION = {"image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio"}
_OPEN_CLIP_TEXT = {
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
    *("pool_type", "eos_id"),
}
_OPEN_CLIP_HARMLESS = {
    *("patch_dropout", "output_tokens", "pad_id", "hf_model_pretrained", "timm_model_pretrained"),
    *("timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    *(
        "final_ln_after_pool",
        "attn_pooler_queries",
        "attn_pooler_heads",
        "hf_proj_type",
        "hf_pooler_type",
    ),
}
_OPEN_CLIP_NEUTRAL = {"pool_type": "tok", "pos_embed_type": "learnable", "proj_type": "linear"}

# Hugging Face writes only what differs from these defaults of its CLIPConfig.
_HF_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_HF_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Of configs older than transformers' fix of the text pooling: the largest id is meant.
_HF_LEGACY_EOS = 2
_BICUBIC_IN_PIL = 3


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How pictures become the model's input, after resizing and centre crop (bicubic).

    Attributes:
        mean, std: per channel, for values in [0, 1].
    """

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


def architecture_from_open_clip(config: Mapping[str, Any], path: str) -> Architecture:
    """The architecture of an open_clip model config.

    Args:
        config: "model_cfg" of `open_clip_config.json`, or a file of open_clip's `model_configs`.
        path: for messages.

    Raises:
        ValueError: a field is missing, or asks for something that our model does not have.
    """
    try:
        vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
        _refuse_open_clip_extras(vision, text, path)
        epsilons = {(tower.get("norm_kwargs") or {}).get("eps", 1e-5) for tower in (vision, text)}
        vision_width, text_width = vision["width"], text.get("width", 512)
        return Architecture(
            image_size=_square(vision.get("image_size", 224), path),
            patch_size=_square(vision.get("patch_size", 16), path),
            vision_layers=vision["layers"],
            vision_width=vision_width,
            vision_heads=vision_width // vision.get("head_width", 64),
            text_layers=text.get("layers", 12),
            text_width=text_width,
            text_heads=text.get("heads", 8),
            embed_dim=config["embed_dim"],
            context_length=text.get("context_length", 77),
            vocab_size=text.get("vocab_size", 49408),
            activation="quick_gelu" if config.get("quick_gelu") else "gelu",
            layer_norm_epsilon=_one_value(epsilons, "LayerNorm epsilons", path),
            vision_mlp_width=_mlp_width(vision_width, vision.get("mlp_ratio", 4.0)),
            text_mlp_width=_mlp_width(text_width, text.get("mlp_ratio", 4.0)),
            end_of_text_id=text["eos_id"] if text.get("pool_type") == "eos" else None,
        )
    except KeyError as error:
        raise ValueError(f"{path}: the model config lacks {error}") from error


def open_clip_config(arch: Architecture, preprocessing: Preprocessing) -> dict[str, Any]:
    """Contents of `open_clip_config.json`, which open_clip reads from a directory or hub."""
    norm = {}
    if arch.layer_norm_epsilon != 1e-5:
        norm = {"norm_kwargs": {"eps": arch.layer_norm_epsilon}}
    text: dict[str, Any] = {
        "context_length": arch.context_length,
        "vocab_size": arch.vocab_size,
        "width": arch.text_width,
        "heads": arch.text_heads,
        "layers": arch.text_layers,
        **_mlp_ratio(arch.text_width, arch.text_mlp_width),
        **norm,
    }
    if arch.end_of_text_id is not None:
        text |= {"pool_type": "eos", "eos_id": arch.end_of_text_id}
    return {
        "model_cfg": {
            "embed_dim": arch.embed_dim,
            "quick_gelu": arch.activation == "quick_gelu",
            "vision_cfg": {
                "image_size": arch.image_size,
                "layers": arch.vision_layers,
                "width": arch.vision_width,
                "head_width": arch.vision_width // arch.vision_heads,
                "patch_size": arch.patch_size,
                **_mlp_ratio(arch.vision_width, arch.vision_mlp_width),
                **norm,
            },
            "text_cfg": text,
        },
        "preprocess_cfg": {
            "size": arch.image_size,
            "mode": "RGB",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def architecture_from_huggingface(config: Mapping[str, Any], path: str) -> Architecture:
    """The architecture of a `config.json` of transformers' `CLIPModel`.

    Raises:
        ValueError: another kind of model, or a setting that our model does not have.
    """
    if config.get("model_type") != "clip":
        raise ValueError(
            f"{path}: expected model_type 'clip' (transformers' CLIPModel), got "
            f"{config.get('model_type')!r}"
        )
    # Older files keep the values that count in *_config_dict.
    text, vision = (
        {**defaults, **_given(config, f"{tower}_config"), **_given(config, f"{tower}_config_dict")}
        for tower, defaults in (("text", _HF_TEXT_DEFAULTS), ("vision", _HF_VISION_DEFAULTS))
    )
    act = _one_value({text["hidden_act"], vision["hidden_act"]}, "activations", path)
    if act not in ("gelu", "quick_gelu"):
        raise ValueError(f"{path}: hidden_act '{act}'; our model has gelu and quick_gelu")
    if vision["num_channels"] != 3:
        raise ValueError(f"{path}: {vision['num_channels']} image channels; our model takes 3")
    end_of_text = text["eos_token_id"]
    # At the largest id there is, the first place of the id and the largest id are one.
    is_largest = end_of_text in (_HF_LEGACY_EOS, text["vocab_size"] - 1)
    return Architecture(
        image_size=_square(vision["image_size"], path),
        patch_size=_square(vision["patch_size"], path),
        vision_layers=vision["num_hidden_layers"],
        vision_width=vision["hidden_size"],
        vision_heads=vision["num_attention_heads"],
        text_layers=text["num_hidden_layers"],
        text_width=text["hidden_size"],
        text_heads=text["num_attention_heads"],
        embed_dim=config.get("projection_dim", 512),
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        activation=act,
        layer_norm_epsilon=_one_value(
            {text["layer_norm_eps"], vision["layer_norm_eps"]}, "LayerNorm epsilons", path
        ),
        vision_mlp_width=_unless_usual(vision["intermediate_size"], vision["hidden_size"]),
        text_mlp_width=_unless_usual(text["intermediate_size"], text["hidden_size"]),
        end_of_text_id=None if is_largest else end_of_text,
    )


def huggingface_config(arch: Architecture, dtype: str) -> dict[str, Any]:
    """Contents of `config.json` for transformers' `CLIPModel`, parameters stored as `dtype`."""
    common = {
        "hidden_act": arch.activation,
        "layer_norm_eps": arch.layer_norm_epsilon,
        "projection_dim": arch.embed_dim,
    }
    end_of_text = arch.end_of_text_id
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": arch.embed_dim,
        "dtype": dtype,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": arch.vocab_size,
            "hidden_size": arch.text_width,
            "intermediate_size": arch.text_mlp_width or 4 * arch.text_width,
            "num_hidden_layers": arch.text_layers,
            "num_attention_heads": arch.text_heads,
            "max_position_embeddings": arch.context_length,
            "bos_token_id": arch.vocab_size - 2,
            "eos_token_id": arch.vocab_size - 1 if end_of_text is None else end_of_text,
            **common,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": arch.vision_width,
            "intermediate_size": arch.vision_mlp_width or 4 * arch.vision_width,
            "num_hidden_layers": arch.vision_layers,
            "num_attention_heads": arch.vision_heads,
            "num_channels": 3,
            "image_size": arch.image_size,
            "patch_size": arch.patch_size,
            **common,
        },
    }


def preprocessing_from_open_clip(config: Mapping[str, Any], path: str) -> Preprocessing:
    """Of "preprocess_cfg" in `open_clip_config.json`; CLIP's where a field is missing.

    Raises:
        ValueError: pictures are squashed or padded, or resized by another filter.
    """
    _require(config, {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}, path)
    return _preprocessing(config.get("mean"), config.get("std"), path)


def preprocessing_from_huggingface(config: Mapping[str, Any], path: str) -> Preprocessing:
    """Of `preprocessor_config.json`; CLIP's where a field is missing.

    Raises:
        ValueError: a step is left out, or pictures are resized by another filter.
    """
    steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
    _require(config, {**steps, "resample": _BICUBIC_IN_PIL}, path)
    return _preprocessing(config.get("image_mean"), config.get("image_std"), path)


def huggingface_preprocessor(arch: Architecture, preprocessing: Preprocessing) -> dict[str, Any]:
    """Contents of `preprocessor_config.json` for transformers' `CLIPImageProcessor`."""
    size = arch.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BICUBIC_IN_PIL,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _refuse_open_clip_extras(vision: dict, text: dict, path: str) -> None:
    for tower, values, known in (
        ("vision_cfg", vision, _OPEN_CLIP_VISION),
        ("text_cfg", text, _OPEN_CLIP_TEXT),
    ):
        if isinstance(values.get("layers"), list | tuple):
            raise ValueError(f"{path}: {tower} is a ResNet; our model has transformers only")
        for name, value in values.items():
            if name in known | _OPEN_CLIP_HARMLESS or not value:
                continue
            if name == "norm_kwargs" and value.keys() == {"eps"}:
                continue
            if _OPEN_CLIP_NEUTRAL.get(name) != value:
                raise ValueError(f"{path}: {tower}.{name}={value!r}; our model does not have this")
    if vision.get("pool_type", "tok") != "tok":
        raise ValueError(f"{path}: vision_cfg.pool_type={vision['pool_type']!r}; expected 'tok'")
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise ValueError(f"{path}: text_cfg.pool_type={text['pool_type']!r}; expected 'argmax'")


def _require(config: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> None:
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{path}: {name}={config[name]!r}; our preprocessing has {value!r} only"
            )


def _preprocessing(mean: Any, std: Any, path: str) -> Preprocessing:
    mean, std = tuple(mean or CLIP_MEAN), tuple(std or CLIP_STD)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"{path}: expected three means and positive deviations, got {mean}, {std}")
    return Preprocessing(mean, std)


def _given(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in (config.get(name) or {}).items() if value is not None}


def _square(size: Any, path: str) -> int:
    sizes = set(size) if isinstance(size, list | tuple) else {size}
    return int(_one_value(sizes, "sides of a picture or patch", path))


def _one_value(values: set[Any], what: str, path: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"{path}: several {what}, {sorted(values)}; our model has one")
    return next(iter(values))


def _unless_usual(mlp_width: int, width: int) -> int | None:
    return None if mlp_width == 4 * width else mlp_width


def _mlp_width(width: int, ratio: float) -> int | None:
    return _unless_usual(int(width * ratio), width)


def _mlp_ratio(width: int, mlp_width: int | None) -> dict[str, float]:
    """The ratio that gives `mlp_width` back when open_clip multiplies and truncates."""
    if mlp_width is None:
        return {}
    ratio = mlp_width / width
    while int(width * ratio) < mlp_width:
        ratio *= 1 + 1e-12
    return {"mlp_ratio": ratio}
