"""transformers' CLIPModel, MetaClip2Model and SiglipModel: their names and configs, and ours.

transformers keeps query, key and value apart and has projections as linear layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diht_jax.models.zoo import Architecture
from diht_jax.weights.layout import Layout, Tensors, bias, linear, norm, to_layout
from diht_jax.weights.settings import (
    ConfigSection,
    make_architecture,
    mlp_width_unless_usual,
    only_value,
)

# Index vectors that versions before 4.31 saved.
BUFFERS = frozenset(("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"))

# Of configs older than transformers' fix of the text pooling: the largest id is meant.
_LEGACY_EOS = 2
# transformers writes only what differs from the defaults of a model's config, which stand here.
_CLIP_TOWER = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_CLIP = {
    "vision_config": {
        **_CLIP_TOWER,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    },
    "text_config": {
        **_CLIP_TOWER,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "eos_token_id": 49407,
    },
}
_DEFAULTS = {
    "clip": _CLIP,
    "metaclip_2": _CLIP,
    "siglip": {
        "vision_config": {**_SIGLIP_TOWER, "image_size": 224, "patch_size": 16},
        "text_config": {**_SIGLIP_TOWER, "max_position_embeddings": 64, "vocab_size": 32000},
    },
}
_CLASSES = {"clip": "CLIPModel", "metaclip_2": "MetaClip2Model", "siglip": "SiglipModel"}
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# What makes our model a SigLIP; its pooling has the heads of the tower.
SIGLIP_FIELDS: dict[str, Any] = {
    "class_token": False,
    "rotary_grid": None,
    "vision_projection": "none",
    "text_projection": "bias",
    "causal_text": False,
    "text_pool": "last",
}
_CLIP_FIELDS = {
    field.name: field.default
    for field in dataclasses.fields(Architecture)
    if field.name in SIGLIP_FIELDS
}


def model_type(arch: Architecture) -> str:
    """The kind of model that transformers has for an architecture, as its configs name it.

    Raises:
        ValueError: there is none.
    """
    fields = {field: getattr(arch, field) for field in SIGLIP_FIELDS}
    pool_heads = arch.vision_pool_heads
    if fields == SIGLIP_FIELDS and pool_heads == arch.vision_heads:
        return "siglip"
    if fields == _CLIP_FIELDS and pool_heads is None:
        # CLIPModel pools at the largest id where the config has this one.
        return "metaclip_2" if arch.end_of_text_id == _LEGACY_EOS else "clip"
    shown = ", ".join(f"{k}={v}" for k, v in {**fields, "vision_pool_heads": pool_heads}.items())
    raise ValueError(
        f"transformers has {', '.join(_CLASSES.values())}, and this model is none of them: {shown}"
    )


def to_huggingface(
    params: Mapping[str, Any], arch: Architecture, logit_bias: float = 0.0
) -> dict[str, np.ndarray]:
    """A parameter tree of ours under transformers' names and shapes; views of its arrays.

    Args:
        params, arch: the model.
        logit_bias: of SigLIP's loss, which SiglipModel has.
    """
    tensors = to_layout(params, layout(arch))
    if model_type(arch) == "siglip":
        tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
        tensors["logit_bias"] = np.asarray([logit_bias], np.float32)
    return tensors


def layout(arch: Architecture) -> Layout:
    """The layout of a model."""
    is_siglip = model_type(arch) == "siglip"
    patches = "vision_model.embeddings.patch_embedding"
    found = {
        "vision/patch_embedding/kernel": Tensors((f"{patches}.weight",), "convolution"),
        "log_logit_scale": Tensors(("logit_scale",)),
        **norm("vision/post_norm", "vision_model.post_layernorm"),
        **norm("text/final_norm", "text_model.final_layer_norm"),
    }
    if is_siglip:
        head, pool = "vision_model.head", "vision/pool"
        in_proj = f"{head}.attention.in_proj"
        found |= {
            **bias("vision/patch_embedding", patches),
            f"{pool}/probe": Tensors((f"{head}.probe",), "plane"),
            f"{pool}/in_proj/kernel": Tensors((f"{in_proj}_weight",), "transposed"),
            f"{pool}/in_proj/bias": Tensors((f"{in_proj}_bias",)),
            **linear(f"{pool}/out_proj", f"{head}.attention.out_proj"),
            **norm(f"{pool}/norm", f"{head}.layernorm"),
            **linear(f"{pool}/mlp/fc_in", f"{head}.mlp.fc1"),
            **linear(f"{pool}/mlp/fc_out", f"{head}.mlp.fc2"),
            **linear("text/projection", "text_model.head"),
        }
    else:
        found |= {
            "vision/class_embedding": Tensors(("vision_model.embeddings.class_embedding",)),
            "vision/projection/kernel": Tensors(("visual_projection.weight",), "transposed"),
            "text/projection/kernel": Tensors(("text_projection.weight",), "transposed"),
            **norm("vision/pre_norm", "vision_model.pre_layrnorm"),
        }
    for path, name in (
        ("vision/positional_embedding", "vision_model.embeddings.position_embedding"),
        ("text/positional_embedding", "text_model.embeddings.position_embedding"),
        ("text/token_embedding/embedding", "text_model.embeddings.token_embedding"),
    ):
        found[path] = Tensors((f"{name}.weight",))
    for tower, layers in (("vision", arch.vision_layers), ("text", arch.text_layers)):
        for i in range(layers):
            ours, theirs = f"{tower}/blocks/{i}", f"{tower}_model.encoder.layers.{i}"
            parts = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
            weights, biases = (tuple(f"{p}.{leaf}" for p in parts) for leaf in ("weight", "bias"))
            found |= {
                **norm(f"{ours}/attention_norm", f"{theirs}.layer_norm1"),
                f"{ours}/attention/in_proj/kernel": Tensors(weights, "transposed"),
                f"{ours}/attention/in_proj/bias": Tensors(biases),
                **linear(f"{ours}/attention/out_proj", f"{theirs}.self_attn.out_proj"),
                **norm(f"{ours}/mlp_norm", f"{theirs}.layer_norm2"),
                **linear(f"{ours}/mlp/fc_in", f"{theirs}.mlp.fc1"),
                **linear(f"{ours}/mlp/fc_out", f"{theirs}.mlp.fc2"),
            }
    return found


def read_architecture(config: Mapping[str, Any], path: str) -> Architecture:
    """The architecture of a `config.json` of one of the three models.

    Raises:
        ValueError: another kind of model, or a setting that our model does not have.
    """
    kind = config.get("model_type")
    if kind == "siglip2":
        raise ValueError(
            f"{path}: model_type 'siglip2' is NaFlex, whose pictures have many shapes; our image "
            "tower takes squares. Take a SigLIP 2 of fixed resolution (model_type 'siglip'), such "
            "as google/siglip2-base-patch16-224"
        )
    if kind not in _DEFAULTS:
        known = ", ".join(f"'{name}' ({_CLASSES[name]})" for name in _DEFAULTS)
        raise ValueError(f"{path}: expected model_type {known}; got {kind!r:.80}")
    text, vision = (_tower(config, name, kind, path) for name in ("text_config", "vision_config"))
    if vision.integer("num_channels", 3) != 3:
        raise ValueError(f"{path}: {vision.values['num_channels']} image channels; ours takes 3")
    activation, text_activation = (_activation(tower, path) for tower in (vision, text))
    epsilons = {tower.number("layer_norm_eps") for tower in (vision, text)}
    vision_width, text_width = vision.integer("hidden_size"), text.integer("hidden_size")
    if kind == "siglip":
        own = _siglip_fields(vision, text, path)
    else:
        own = _clip_fields(ConfigSection(config, "", path), text)
    return make_architecture(
        path,
        image_size=vision.side("image_size"),
        patch_size=vision.side("patch_size"),
        vision_layers=vision.integer("num_hidden_layers"),
        vision_width=vision_width,
        vision_heads=vision.integer("num_attention_heads"),
        text_layers=text.integer("num_hidden_layers"),
        text_width=text_width,
        text_heads=text.integer("num_attention_heads"),
        context_length=text.integer("max_position_embeddings"),
        vocab_size=text.integer("vocab_size"),
        activation=activation,
        text_activation=None if text_activation == activation else text_activation,
        layer_norm_epsilon=only_value(epsilons, "LayerNorm epsilons", path),
        vision_mlp_width=mlp_width_unless_usual(vision.integer("intermediate_size"), vision_width),
        text_mlp_width=mlp_width_unless_usual(text.integer("intermediate_size"), text_width),
        **own,
    )


def _clip_fields(whole: ConfigSection, text: ConfigSection) -> dict[str, Any]:
    """Fields of CLIPModel and MetaClip2Model."""
    end_of_text = text.integer("eos_token_id", least=0)
    # At the largest id there is, the first position of the id and the largest id are one.
    is_largest = end_of_text == text.integer("vocab_size") - 1
    is_legacy = whole.values["model_type"] == "clip" and end_of_text == _LEGACY_EOS
    return {
        "embed_dim": whole.integer("projection_dim", 512),
        "end_of_text_id": None if is_largest or is_legacy else end_of_text,
    }


def _siglip_fields(vision: ConfigSection, text: ConfigSection, path: str) -> dict[str, Any]:
    """Fields of SiglipModel."""
    if not vision.values.get("vision_use_head", True):
        raise ValueError(
            f"{path}: vision_config.vision_use_head=False; expected SigLIP's attention pooling"
        )
    width = vision.integer("hidden_size")
    embed_dim = text.integer("projection_size", text.integer("hidden_size"))
    if embed_dim != width:
        raise ValueError(
            f"{path}: embeddings of texts have {embed_dim} numbers (text_config.projection_size), "
            f"those of images {width} (vision_config.hidden_size); expected as many"
        )
    heads = vision.integer("num_attention_heads")
    return {"embed_dim": embed_dim, "vision_pool_heads": heads, **SIGLIP_FIELDS}


def _activation(tower: ConfigSection, path: str) -> str:
    name = tower.values["hidden_act"]
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{path}: hidden_act {name!r:.80}; our model has {known}")
    return _ACTIVATIONS[name]


def make_config(arch: Architecture, dtype: str) -> dict[str, Any]:
    """Contents of transformers' `config.json`, for parameters stored as `dtype`."""
    kind = model_type(arch)
    is_siglip = kind == "siglip"
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    size = {"projection_dim": arch.embed_dim}

    def tower(name: str, activation: str, **own: Any) -> dict[str, Any]:
        width = getattr(arch, f"{name}_width")
        return {
            "model_type": f"{kind}_{name}_model",
            "hidden_size": width,
            "intermediate_size": getattr(arch, f"{name}_mlp_width") or 4 * width,
            "num_hidden_layers": getattr(arch, f"{name}_layers"),
            "num_attention_heads": getattr(arch, f"{name}_heads"),
            "hidden_act": names[activation],
            "layer_norm_eps": arch.layer_norm_epsilon,
            **({} if is_siglip else size),
            **own,
        }

    last, end_of_text = arch.vocab_size - 1, arch.end_of_text_id
    markers = {
        "bos_token_id": last - 1,
        "eos_token_id": last if end_of_text is None else end_of_text,
    }
    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        **({} if is_siglip else size),
        "dtype": dtype,
        "text_config": tower(
            "text",
            arch.text_activation or arch.activation,
            vocab_size=arch.vocab_size,
            max_position_embeddings=arch.context_length,
            **({"projection_size": arch.embed_dim} if is_siglip else markers),
        ),
        "vision_config": tower(
            "vision",
            arch.activation,
            num_channels=3,
            image_size=arch.image_size,
            patch_size=arch.patch_size,
        ),
    }


def _tower(config: Mapping[str, Any], name: str, kind: str, path: str) -> ConfigSection:
    """The values of one tower; older files keep those that count in *_config_dict."""
    values: dict[str, Any] = dict(_DEFAULTS[kind][name])
    for part in (name, f"{name}_dict"):
        found = ConfigSection(config.get(part), part, path).values
        values |= {k: v for k, v in found.items() if v is not None}
    return ConfigSection(values, name, path)
