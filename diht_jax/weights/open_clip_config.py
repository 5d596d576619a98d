"""The configs of open_clip, read and written: `open_clip_config.json`.

The parameters of open_clip's models have CLIP's own names (`clip_layout.py`), or timm's for image
towers of timm (`timm_layout.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diht_jax.models.zoo import Architecture
from diht_jax.weights import clip_layout, timm_layout
from diht_jax.weights.settings import (
    ConfigSection,
    Preprocessing,
    make_architecture,
    make_preprocess_cfg,
    mlp_width_unless_usual,
    only_value,
)

# Fields of a tower that are read below, or leave the computation alone.
_FIELDS = """
    image_size patch_size layers width head_width mlp_ratio context_length vocab_size heads
    pool_type eos_id patch_dropout output_tokens pad_id hf_model_pretrained timm_model_pretrained
    timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path final_ln_after_pool
    attn_pooler_queries attn_pooler_heads hf_proj_type hf_pooler_type hf_tokenizer_name
    tokenizer_kwargs act_kwargs
"""
_KNOWN = frozenset(_FIELDS.split())
_NEUTRAL = {"pos_embed_type": "learnable", "proj_type": "linear"}
# More fields of a model whose image tower is timm's: of the image tower, of the text tower.
_KNOWN_OF_TIMM = {
    "vision_cfg": ("timm_model_name",),
    "text_cfg": ("no_causal_mask", "proj_bias"),
}
# How each tower may pool its tokens; the first is the default.
_POOLS = {"vision_cfg": ("tok",), "text_cfg": ("argmax", "eos", "last")}


def read_architecture(config: Mapping[str, Any], path: str) -> Architecture:
    """The architecture of a "model_cfg" of `open_clip_config.json`.

    Raises:
        ValueError: a field is missing, or asks for something that our model does not have.
    """
    whole = ConfigSection(config, "", path)
    whole.require("vision_cfg", "text_cfg", "embed_dim")
    vision, text = whole.section("vision_cfg"), whole.section("text_cfg")
    _refuse_extras(vision.values, text.values, path)
    text_width = text.integer("width", 512)
    text_epsilon = text.section("norm_kwargs").number("eps", 1e-5)
    common = {
        "text_layers": text.integer("layers", 12),
        "text_width": text_width,
        "text_heads": text.integer("heads", 8),
        "embed_dim": whole.integer("embed_dim"),
        "context_length": text.integer("context_length", 77),
        "vocab_size": text.integer("vocab_size", 49408),
        "text_mlp_width": _mlp_width(text_width, text),
        "end_of_text_id": (
            text.integer("eos_id", 2) if text.values.get("pool_type") == "eos" else None
        ),
    }
    if "timm_model_name" in vision.values:
        fields = _timm_fields(vision, text, bool(config.get("quick_gelu")), path)
        epsilons = {fields.pop("layer_norm_epsilon"), text_epsilon}
    else:
        fields = _clip_fields(vision, text, bool(config.get("quick_gelu")), path)
        epsilons = {vision.section("norm_kwargs").number("eps", 1e-5), text_epsilon}
    epsilon = only_value(epsilons, "LayerNorm epsilons", path)
    return make_architecture(path, **common, **fields, layer_norm_epsilon=epsilon)


def _clip_fields(
    vision: ConfigSection, text: ConfigSection, quick_gelu: bool, path: str
) -> dict[str, Any]:
    """Fields of a CLIP with an image tower of open_clip's own."""
    vision.require("width", "layers")
    width = vision.integer("width")
    activations = {
        _activation(tower, quick_gelu, f"{path}: {name}")
        for name, tower in (("vision_cfg", vision), ("text_cfg", text))
    }
    return {
        "image_size": vision.side("image_size", 224),
        "patch_size": vision.side("patch_size", 16),
        "vision_layers": vision.integer("layers"),
        "vision_width": width,
        "vision_heads": width // vision.integer("head_width", 64),
        "vision_mlp_width": _mlp_width(width, vision),
        "activation": only_value(activations, "activations", path),
    }


def _timm_fields(
    vision: ConfigSection, text: ConfigSection, quick_gelu: bool, path: str
) -> dict[str, Any]:
    """Fields of a model with an image tower of timm, and a text tower of open_clip's own."""
    name = str(vision.values["timm_model_name"])
    tower = timm_layout.find_tower(name, path)
    wanted = {"timm_pool": "map", "timm_proj": tower.projection}
    wanted["image_size"] = tower.fields["image_size"]
    for key, value in wanted.items():
        found = vision.values.get(key)
        # open_clip computes as without a projection where it is "" as well.
        if found != value and not (key == "timm_proj" and not found and value is None):
            raise ValueError(
                f"{path}: vision_cfg.{key}={found!r:.80}; expected {value!r}, which {name} has"
            )
    activation = _activation(text, quick_gelu, f"{path}: text_cfg")
    return {
        **tower.fields,
        "text_activation": None if activation == tower.fields["activation"] else activation,
        "causal_text": not text.values.get("no_causal_mask", False),
        "text_pool": "last" if text.values.get("pool_type") == "last" else "end",
        "text_projection": "bias" if text.values.get("proj_bias") else "linear",
    }


def _activation(tower: ConfigSection, quick_gelu: bool, where: str) -> str:
    """The activation of a tower of open_clip's own."""
    approximate = tower.section("act_kwargs").values
    if approximate not in ({}, {"approximate": "none"}, {"approximate": "tanh"}):
        raise ValueError(
            f"{where}.act_kwargs={approximate!r:.80}; our model has 'approximate' alone"
        )
    by_tanh = approximate.get("approximate") == "tanh"
    return "quick_gelu" if quick_gelu else "gelu_tanh" if by_tanh else "gelu"


def make_config(
    arch: Architecture, preprocessing: Preprocessing, logit_bias: float | None = None
) -> dict[str, Any]:
    """Contents of `open_clip_config.json`, which open_clip reads from a directory or hub.

    Args:
        arch, preprocessing: of the model.
        logit_bias: of SigLIP's loss; None for a model without one.

    Raises:
        ValueError: open_clip has no such model.
    """
    norm, of_text = {}, {}
    by_tanh = {"act_kwargs": {"approximate": "tanh"}}
    if (arch.text_activation or arch.activation) == "gelu_tanh":
        of_text |= by_tanh
    if arch.layer_norm_epsilon != 1e-5:
        norm = {"norm_kwargs": {"eps": arch.layer_norm_epsilon}}
    if arch.end_of_text_id is not None:
        of_text |= {"pool_type": "eos", "eos_id": arch.end_of_text_id}
    if timm_layout.is_timm(arch):
        own, vision, more = _timm_settings(arch, logit_bias)
        of_text |= more
    else:
        clip_layout.check_is_clip(arch)
        own = {"quick_gelu": arch.activation == "quick_gelu"}
        vision = {
            "image_size": arch.image_size,
            "layers": arch.vision_layers,
            "width": arch.vision_width,
            "head_width": arch.vision_width // arch.vision_heads,
            "patch_size": arch.patch_size,
            **_mlp_ratio(arch.vision_width, arch.vision_mlp_width),
            **norm,
            **(by_tanh if arch.activation == "gelu_tanh" else {}),
        }
    return {
        "model_cfg": {
            "embed_dim": arch.embed_dim,
            **own,
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": arch.context_length,
                "vocab_size": arch.vocab_size,
                "width": arch.text_width,
                "heads": arch.text_heads,
                "layers": arch.text_layers,
                **_mlp_ratio(arch.text_width, arch.text_mlp_width),
                **norm,
                **of_text,
            },
        },
        "preprocess_cfg": make_preprocess_cfg(arch, preprocessing),
    }


def describe(arch: Architecture, preprocessing: Preprocessing) -> dict[str, Any]:
    """`make_config`, with the fields of our own architecture where open_clip has no such model."""
    try:
        return make_config(arch, preprocessing)
    except ValueError:
        settings = make_preprocess_cfg(arch, preprocessing)
        return {"model_cfg": dataclasses.asdict(arch), "preprocess_cfg": settings}


def _timm_settings(
    arch: Architecture, logit_bias: float | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings of a model with an image tower of timm: of the whole, of images, more of texts."""
    name = timm_layout.tower_name(arch)
    activation = arch.text_activation or arch.activation
    whole: dict[str, Any] = {"custom_text": True}
    if logit_bias is not None:
        whole["init_logit_bias"] = logit_bias
    if activation == "quick_gelu":
        whole["quick_gelu"] = True
    vision = {
        "image_size": arch.image_size,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": timm_layout.TOWERS[name].projection,
    }
    text: dict[str, Any] = {
        "no_causal_mask": not arch.causal_text,
        "proj_bias": arch.text_projection == "bias",
    }
    if arch.text_pool == "last":
        text["pool_type"] = "last"
    return whole, vision, text


def _refuse_extras(vision: Mapping[str, Any], text: Mapping[str, Any], path: str) -> None:
    is_timm = bool(vision.get("timm_model_name"))
    for name, values in (("vision_cfg", vision), ("text_cfg", text)):
        known = {*_KNOWN, *(_KNOWN_OF_TIMM[name] if is_timm else ())}
        if isinstance(values.get("layers"), list | tuple):
            raise ValueError(f"{path}: {name} is a ResNet; our model has transformers only")
        for key, value in values.items():
            is_epsilon = key == "norm_kwargs" and isinstance(value, dict) and {*value} == {"eps"}
            if value and key not in known and not is_epsilon and _NEUTRAL.get(key) != value:
                raise ValueError(
                    f"{path}: {name}.{key[:80]}={value!r:.80}; our model does not have this"
                )
        pool = values.get("pool_type", _POOLS[name][0])
        if pool not in _POOLS[name] or (pool == "last" and not is_timm):
            raise ValueError(f"{path}: {name}.pool_type={pool!r:.80}; expected '{_POOLS[name][0]}'")


def _mlp_width(width: int, tower: ConfigSection) -> int | None:
    return mlp_width_unless_usual(int(width * tower.number("mlp_ratio", 4.0)), width)


def _mlp_ratio(width: int, mlp_width: int | None) -> dict[str, float]:
    """The ratio that gives `mlp_width` back when open_clip multiplies and truncates."""
    if mlp_width is None:
        return {}
    ratio = mlp_width / width
    while int(width * ratio) < mlp_width:
        ratio *= 1 + 1e-12
    return {"mlp_ratio": ratio}
