"""Names and configs of transformers' CLIPModel, MetaClip2Model and SiglipModel, mapped to ours.

transformers has separate query, key and value layers, and linear layers as projections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diht_jax.data.tokenizer import VOCAB_SIZE
from diht_jax.models.zoo import ARCHITECTURES, SIGLIP_PARTS, Architecture
from diht_jax.weights.clip_layout import (
    BlockNames,
    Layout,
    Tensors,
    bias,
    blocks,
    linear,
    norm,
    parts_unlike_clip,
    to_layout,
)
from diht_jax.weights.settings import ConfigSection, make_architecture

# Index vectors that versions before 4.31 stored.
BUFFERS = frozenset(("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"))

_BLOCK = BlockNames(
    attention_norm="layer_norm1",
    in_proj=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    out_proj="self_attn.out_proj",
    mlp_norm="layer_norm2",
    fc_in="mlp.fc1",
    fc_out="mlp.fc2",
)
_CLASSES = {"clip": "CLIPModel", "metaclip_2": "MetaClip2Model", "siglip": "SiglipModel"}
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# Our names for the sizes of a tower, after "vision_" or "text_", and those that one tower has.
_TOWER_SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}
_SIZES = {
    "vision": {"image_size": "image_size", "patch_size": "patch_size"},
    "text": {"context_length": "max_position_embeddings", "vocab_size": "vocab_size"},
}
# In configs older than transformers' fix of text pooling this stands for the largest id.
_LEGACY_EOS = 2
# transformers only writes values that differ from the default config, which is these models'.
_DEFAULT_CLIP = dataclasses.replace(ARCHITECTURES["diht_vitb32_224px"], activation="quick_gelu")
_DEFAULT_SIGLIP = ARCHITECTURES["siglip_vitb16_224px"]


def model_type(arch: Architecture) -> str:
    """Returns transformers' kind of model for an architecture, as named in its configs.

    Raises:
        ValueError: there is no such model.
    """
    parts = parts_unlike_clip(arch)
    parts.pop("text_activation", None)
    if parts == {**SIGLIP_PARTS, "vision_pool_heads": arch.vision_heads}:
        return "siglip"
    if not parts:
        # CLIPModel pools at the largest id if the config has this value.
        return "metaclip_2" if arch.end_of_text_id == _LEGACY_EOS else "clip"
    shown = ", ".join(f"{name}={value}" for name, value in parts.items())
    raise ValueError(
        f"transformers has {', '.join(_CLASSES.values())}, and this model is none of them: {shown}"
    )


def to_huggingface(
    params: Mapping[str, Any], arch: Architecture, logit_bias: float = 0.0
) -> dict[str, np.ndarray]:
    """Converts a parameter tree to transformers' names and shapes; views of its arrays.

    SiglipModel also stores the `logit_bias` of its loss.
    """
    tensors = to_layout(params, layout(arch))
    if model_type(arch) == "siglip":
        tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
        tensors["logit_bias"] = np.asarray([logit_bias], np.float32)
    return tensors


def layout(arch: Architecture) -> Layout:
    """Returns the layout of a model."""
    patches = "vision_model.embeddings.patch_embedding"
    found = {
        "vision/patch_embedding/kernel": Tensors((f"{patches}.weight",), "convolution"),
        "log_logit_scale": Tensors(("logit_scale",)),
        **norm("vision/post_norm", "vision_model.post_layernorm"),
        **norm("text/final_norm", "text_model.final_layer_norm"),
    }
    if model_type(arch) == "siglip":
        head, pool = "vision_model.head", "vision/pool"
        found |= {
            **bias("vision/patch_embedding", patches),
            f"{pool}/probe": Tensors((f"{head}.probe",), "plane"),
            **linear(f"{pool}/in_proj", f"{head}.attention.in_proj", dot="_"),
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
        found |= blocks(f"{tower}/blocks", f"{tower}_model.encoder.layers.", layers, _BLOCK)
    return found


def read_architecture(config: Mapping[str, Any], path: str) -> Architecture:
    """Reads the architecture from the `config.json` of one of the three models.

    Raises:
        ValueError: another kind of model, or a setting that our model lacks.
    """
    kind = config.get("model_type")
    if kind == "siglip2":
        raise ValueError(
            f"{path}: model_type 'siglip2' is NaFlex, whose pictures have many shapes; our image "
            "tower takes squares. Take a SigLIP 2 of fixed resolution (model_type 'siglip'), such "
            "as google/siglip2-base-patch16-224"
        )
    if kind not in _CLASSES:
        known = ", ".join(f"'{name}' ({shown})" for name, shown in _CLASSES.items())
        raise ValueError(f"{path}: expected model_type {known}; got {kind!r:.80}")
    vision, text = (_tower(config, kind, f"{tower}_config", path) for tower in _SIZES)
    if vision.integer("num_channels") != 3:
        raise ValueError(f"{path}: {vision.values['num_channels']} image channels; ours takes 3")
    fields: dict[str, Any] = {}
    for tower, section in (("vision", vision), ("text", text)):
        names = {f"{tower}_{ours}": theirs for ours, theirs in _TOWER_SIZES.items()}
        fields |= {
            ours: section.integer(theirs) for ours, theirs in {**names, **_SIZES[tower]}.items()
        }
    fields["activation"], fields["text_activation"] = (
        section.one_of("hidden_act", _ACTIVATIONS) for section in (vision, text)
    )
    fields["layer_norm_epsilon"] = vision.number("layer_norm_eps")
    if kind == "siglip":
        if not vision.values.get("vision_use_head", True):
            raise ValueError(
                f"{path}: vision_config.vision_use_head=False; expected SigLIP's attention pooling"
            )
        fields |= {**SIGLIP_PARTS, "vision_pool_heads": fields["vision_heads"]}
        fields["embed_dim"] = text.integer("projection_size", fields["text_width"])
    else:
        fields["embed_dim"] = ConfigSection(config, "", path).integer("projection_dim", 512)
        end_of_text = text.integer("eos_token_id", least=0)
        # If this is the largest id, pooling at its first position or at the largest id is equal.
        is_largest = end_of_text == fields["vocab_size"] - 1
        is_legacy = kind == "clip" and end_of_text == _LEGACY_EOS
        fields["end_of_text_id"] = None if is_largest or is_legacy else end_of_text
    return make_architecture(path, text_epsilon=text.number("layer_norm_eps"), **fields)


def make_config(arch: Architecture, dtype: str) -> dict[str, Any]:
    """Returns the contents of transformers' `config.json`, for parameters stored as `dtype`."""
    kind = model_type(arch)
    is_siglip = kind == "siglip"
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    size = {} if is_siglip else {"projection_dim": arch.embed_dim}
    towers = {}
    for tower, activation in (
        ("vision", arch.activation),
        ("text", arch.text_activation or arch.activation),
    ):
        width = getattr(arch, f"{tower}_width")
        sizes = {theirs: getattr(arch, f"{tower}_{own}") for own, theirs in _TOWER_SIZES.items()}
        sizes["intermediate_size"] = sizes["intermediate_size"] or 4 * width
        towers[f"{tower}_config"] = {
            "model_type": f"{kind}_{tower}_model",
            **sizes,
            "hidden_act": names[activation],
            "layer_norm_eps": arch.layer_norm_epsilon,
            **size,
            **{theirs: getattr(arch, ours) for ours, theirs in _SIZES[tower].items()},
        }
    towers["vision_config"]["num_channels"] = 3
    if is_siglip:
        towers["text_config"]["projection_size"] = arch.embed_dim
    else:
        last, end_of_text = arch.vocab_size - 1, arch.end_of_text_id
        if end_of_text is None:
            # With another vocabulary than CLIP's, the largest id of a text need not be its last.
            end_of_text = last if arch.vocab_size == VOCAB_SIZE else _LEGACY_EOS
        towers["text_config"] |= {"bos_token_id": last - 1, "eos_token_id": end_of_text}
    shared = {"architectures": [_CLASSES[kind]], "model_type": kind, "dtype": dtype}
    return {**shared, **size, **towers}


def _tower(config: Mapping[str, Any], kind: str, name: str, path: str) -> ConfigSection:
    """Returns the values of one tower; in older files those of *_config_dict take precedence."""
    defaults = make_config(_DEFAULT_SIGLIP if kind == "siglip" else _DEFAULT_CLIP, "float32")[name]
    defaults.pop("projection_size", None)  # defaults to the width
    for part in (name, f"{name}_dict"):
        found = ConfigSection(config.get(part), part, path).values
        defaults |= {k: v for k, v in found.items() if v is not None}
    return ConfigSection(defaults, name, path)
