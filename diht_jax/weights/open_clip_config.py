"""The configs of open_clip, read and written: `open_clip_config.json`.

The parameters of open_clip's models have CLIP's own names (`clip_layout.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diht_jax.models.zoo import Architecture
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
    attn_pooler_queries attn_pooler_heads hf_proj_type hf_pooler_type
"""
_KNOWN = frozenset(_FIELDS.split())
_NEUTRAL = {"pos_embed_type": "learnable", "proj_type": "linear"}
# How each tower may pool its tokens; the first is the default.
_POOLS = {"vision_cfg": ("tok",), "text_cfg": ("argmax", "eos")}


def read_architecture(config: Mapping[str, Any], path: str) -> Architecture:
    """The architecture of a "model_cfg" of `open_clip_config.json`.

    Raises:
        ValueError: a field is missing, or asks for something that our model does not have.
    """
    whole = ConfigSection(config, "", path)
    whole.require("vision_cfg", "text_cfg", "embed_dim")
    vision, text = whole.section("vision_cfg"), whole.section("text_cfg")
    vision.require("width", "layers")
    _refuse_extras(vision.values, text.values, path)
    epsilons = {tower.section("norm_kwargs").number("eps", 1e-5) for tower in (vision, text)}
    vision_width, text_width = vision.integer("width"), text.integer("width", 512)
    end_of_text = text.integer("eos_id") if text.values.get("pool_type") == "eos" else None
    return make_architecture(
        path,
        image_size=vision.side("image_size", 224),
        patch_size=vision.side("patch_size", 16),
        vision_layers=vision.integer("layers"),
        vision_width=vision_width,
        vision_heads=vision_width // vision.integer("head_width", 64),
        text_layers=text.integer("layers", 12),
        text_width=text_width,
        text_heads=text.integer("heads", 8),
        embed_dim=whole.integer("embed_dim"),
        context_length=text.integer("context_length", 77),
        vocab_size=text.integer("vocab_size", 49408),
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        layer_norm_epsilon=only_value(epsilons, "LayerNorm epsilons", path),
        vision_mlp_width=_mlp_width(vision_width, vision),
        text_mlp_width=_mlp_width(text_width, text),
        end_of_text_id=end_of_text,
    )


def make_config(arch: Architecture, preprocessing: Preprocessing) -> dict[str, Any]:
    """Contents of `open_clip_config.json`, which open_clip reads from a directory or hub."""
    norm, pooling = {}, {}
    if arch.layer_norm_epsilon != 1e-5:
        norm = {"norm_kwargs": {"eps": arch.layer_norm_epsilon}}
    if arch.end_of_text_id is not None:
        pooling = {"pool_type": "eos", "eos_id": arch.end_of_text_id}
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
            "text_cfg": {
                "context_length": arch.context_length,
                "vocab_size": arch.vocab_size,
                "width": arch.text_width,
                "heads": arch.text_heads,
                "layers": arch.text_layers,
                **_mlp_ratio(arch.text_width, arch.text_mlp_width),
                **norm,
                **pooling,
            },
        },
        "preprocess_cfg": make_preprocess_cfg(arch, preprocessing),
    }


def _refuse_extras(vision: Mapping[str, Any], text: Mapping[str, Any], path: str) -> None:
    for name, values in (("vision_cfg", vision), ("text_cfg", text)):
        if isinstance(values.get("layers"), list | tuple):
            raise ValueError(f"{path}: {name} is a ResNet; our model has transformers only")
        for key, value in values.items():
            is_epsilon = key == "norm_kwargs" and isinstance(value, dict) and {*value} == {"eps"}
            if value and key not in _KNOWN and not is_epsilon and _NEUTRAL.get(key) != value:
                raise ValueError(
                    f"{path}: {name}.{key[:80]}={value!r:.80}; our model does not have this"
                )
        pool = values.get("pool_type", _POOLS[name][0])
        if pool not in _POOLS[name]:
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
