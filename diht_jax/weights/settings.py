"""What a model needs beside its parameters, read from and written to the configs of others.

Architecture and preprocessing in the terms of open_clip (`open_clip_config.json`) and of Hugging
Face (`config.json`, `preprocessor_config.json`). A setting that would change what the model
computes and that our model does not have is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diht_jax.config.architecture import ARCHITECTURE_FIELDS
from diht_jax.input.transforms import CLIP_MEAN, CLIP_STD
from diht_jax.models.zoo import Architecture
from diht_jax.weights.config_section import ConfigSection, is_number

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
    _require_fields(config, ("vision_cfg", "text_cfg", "embed_dim"), path)
    vision, text = (
        ConfigSection(config, "vision_cfg", path),
        ConfigSection(config, "text_cfg", path),
    )
    _require_fields(vision.values, ("width", "layers"), f"{path}: vision_cfg")
    _refuse_open_clip_extras(vision.values, text.values, path)
    epsilons = {
        ConfigSection(tower.values, "norm_kwargs", path).number("eps", 1e-5)
        for tower in (vision, text)
    }
    vision_width, text_width = vision.integer("width"), text.integer("width", 512)
    end_of_text = text.integer("eos_id") if text.values.get("pool_type") == "eos" else None
    return _make_architecture(
        path,
        image_size=vision.side("image_size", 224),
        patch_size=vision.side("patch_size", 16),
        vision_layers=vision.integer("layers"),
        vision_width=vision_width,
        vision_heads=vision_width // vision.integer("head_width", 64),
        text_layers=text.integer("layers", 12),
        text_width=text_width,
        text_heads=text.integer("heads", 8),
        embed_dim=ConfigSection({"": config}, "", path).integer("embed_dim"),
        context_length=text.integer("context_length", 77),
        vocab_size=text.integer("vocab_size", 49408),
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        layer_norm_epsilon=_one_value(epsilons, "LayerNorm epsilons", path),
        vision_mlp_width=_mlp_width(vision_width, vision.number("mlp_ratio", 4.0)),
        text_mlp_width=_mlp_width(text_width, text.number("mlp_ratio", 4.0)),
        end_of_text_id=end_of_text,
    )


def architecture_from_own(config: Any, path: str) -> Architecture:
    """The architecture in a config that `diht_jax.export` wrote.

    Args:
        config: "architecture" of `diht_jax_config.json`.
        path: for messages.

    Raises:
        ValueError: fields are missing, unknown or of another type.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{path}: architecture is {config!r:.80}; expected an object")
    fields = {field.name: field for field in dataclasses.fields(Architecture)}
    unknown = sorted(config.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{path}: an architecture has no field {', '.join(unknown)!s:.200}")
    needed = [n for n, field in fields.items() if field.default is dataclasses.MISSING]
    _require_fields(config, tuple(needed), path)
    section, values = ConfigSection({"": config}, "", path), {}
    for name, value in config.items():
        kind = ARCHITECTURE_FIELDS[name]
        if value is None and fields[name].default is None:
            values[name] = None
        elif kind is int:
            values[name] = section.integer(name, least=0 if name == "end_of_text_id" else 1)
        else:
            values[name] = section.number(name) if kind is float else str(value)[:80]
    return _make_architecture(path, **values)


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
    text = _huggingface_tower(config, "text", _HF_TEXT_DEFAULTS, path)
    vision = _huggingface_tower(config, "vision", _HF_VISION_DEFAULTS, path)
    acts = {str(tower.values["hidden_act"]) for tower in (text, vision)}
    act = _one_value(acts, "activations", path)
    if act not in ("gelu", "quick_gelu"):
        raise ValueError(f"{path}: hidden_act '{act:.80}'; our model has gelu and quick_gelu")
    if vision.integer("num_channels") != 3:
        raise ValueError(f"{path}: {vision.values['num_channels']} image channels; ours takes 3")
    end_of_text = text.integer("eos_token_id", least=0)
    # At the largest id there is, the first position of the id and the largest id are one.
    is_largest = end_of_text in (_HF_LEGACY_EOS, text.integer("vocab_size") - 1)
    vision_width, text_width = vision.integer("hidden_size"), text.integer("hidden_size")
    return _make_architecture(
        path,
        image_size=vision.side("image_size"),
        patch_size=vision.side("patch_size"),
        vision_layers=vision.integer("num_hidden_layers"),
        vision_width=vision_width,
        vision_heads=vision.integer("num_attention_heads"),
        text_layers=text.integer("num_hidden_layers"),
        text_width=text_width,
        text_heads=text.integer("num_attention_heads"),
        embed_dim=ConfigSection({"": config}, "", path).integer("projection_dim", 512),
        context_length=text.integer("max_position_embeddings"),
        vocab_size=text.integer("vocab_size"),
        activation=act,
        layer_norm_epsilon=_one_value(
            {tower.number("layer_norm_eps") for tower in (text, vision)}, "LayerNorm epsilons", path
        ),
        vision_mlp_width=_unless_usual(vision.integer("intermediate_size"), vision_width),
        text_mlp_width=_unless_usual(text.integer("intermediate_size"), text_width),
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


def preprocessing_from_open_clip(config: Any, path: str) -> Preprocessing:
    """Of "preprocess_cfg" in `open_clip_config.json`; CLIP's where a field is missing.

    Raises:
        ValueError: pictures are squashed or padded, or resized by another filter; or no object.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{path}: preprocessing is {config!r:.80}; expected an object")
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
            if name == "norm_kwargs" and isinstance(value, dict) and value.keys() == {"eps"}:
                continue
            if _OPEN_CLIP_NEUTRAL.get(name) != value:
                raise ValueError(
                    f"{path}: {tower}.{name[:80]}={value!r:.80}; our model does not have this"
                )
    pools = ((vision, "vision_cfg", ("tok",)), (text, "text_cfg", ("argmax", "eos")))
    for values, tower, known in pools:
        pool = values.get("pool_type", known[0])
        if pool not in known:
            raise ValueError(f"{path}: {tower}.pool_type={pool!r:.80}; expected '{known[0]}'")


def _require(config: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> None:
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{path}: {name}={config[name]!r:.80}; our preprocessing has {value!r} only"
            )


def _preprocessing(mean: Any, std: Any, path: str) -> Preprocessing:
    mean, std = CLIP_MEAN if mean is None else mean, CLIP_STD if std is None else std
    for values in (mean, std):
        is_triple = isinstance(values, list | tuple) and len(values) == 3
        if not is_triple or not all(is_number(value) for value in values):
            raise ValueError(f"{path}: expected three means and deviations, got {values!r:.80}")
    if min(std) <= 0:
        raise ValueError(f"{path}: expected positive deviations, got {std}")
    return Preprocessing(tuple(mean), tuple(std))


def _huggingface_tower(
    config: Mapping[str, Any], tower: str, defaults: Mapping[str, Any], path: str
) -> ConfigSection:
    """The values of one tower; older files keep those that count in *_config_dict."""
    name = f"{tower}_config"
    given = [ConfigSection(config, n, path).values for n in (name, f"{name}_dict")]
    values = [{k: v for k, v in part.items() if v is not None} for part in given]
    return ConfigSection({name: {**defaults, **values[0], **values[1]}}, name, path)


def _make_architecture(path: str, **fields: Any) -> Architecture:
    fields["vision_heads"] = max(1, fields["vision_heads"])
    try:
        return Architecture(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _require_fields(config: Any, names: tuple[str, ...], path: str) -> None:
    if not isinstance(config, Mapping):
        raise ValueError(f"{path}: the model config is {config!r:.80}; expected an object")
    missing = [name for name in names if name not in config]
    if missing:
        raise ValueError(f"{path}: the model config lacks {', '.join(map(repr, missing))}")


def _one_value(values: set[Any], what: str, path: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"{path}: several {what}, {sorted(values)!s:.200}; our model has one")
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
