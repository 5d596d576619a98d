"""transformers' `CLIPModel`: its parameter names and its configs, to and from ours.

transformers keeps query, key and value apart and has both projections as linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diht_jax.models.zoo import Architecture
from diht_jax.weights.layout import Layout, Tensors, linear, norm, to_layout
from diht_jax.weights.settings import (
    ConfigSection,
    Preprocessing,
    make_architecture,
    make_preprocessing,
    mlp_width_unless_usual,
    only_value,
)

# Index vectors that versions before 4.31 saved.
BUFFERS = frozenset(("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"))

# Of configs older than transformers' fix of the text pooling: the largest id is meant.
_LEGACY_EOS = 2
_BICUBIC_IN_PIL = 3


def to_huggingface(params: Mapping[str, Any], arch: Architecture) -> dict[str, np.ndarray]:
    """A parameter tree of ours under transformers' names and shapes; views of its arrays."""
    return to_layout(params, layout(arch))


def layout(arch: Architecture) -> Layout:
    """The layout of a model."""
    found = {
        "vision/patch_embedding/kernel": Tensors(
            ("vision_model.embeddings.patch_embedding.weight",), "convolution"
        ),
        "vision/class_embedding": Tensors(("vision_model.embeddings.class_embedding",)),
        "vision/projection/kernel": Tensors(("visual_projection.weight",), "transposed"),
        "text/projection/kernel": Tensors(("text_projection.weight",), "transposed"),
        "log_logit_scale": Tensors(("logit_scale",)),
        **norm("vision/pre_norm", "vision_model.pre_layrnorm"),
        **norm("vision/post_norm", "vision_model.post_layernorm"),
        **norm("text/final_norm", "text_model.final_layer_norm"),
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
    """The architecture of a `config.json` of transformers' `CLIPModel`.

    Raises:
        ValueError: another kind of model, or a setting that our model does not have.
    """
    if config.get("model_type") != "clip":
        raise ValueError(
            f"{path}: expected model_type 'clip' (transformers' CLIPModel), got "
            f"{config.get('model_type')!r}"
        )
    # Hugging Face writes only what differs from the defaults of its CLIPConfig, which stand here.
    text, vision = (_tower(config, name, path) for name in ("text_config", "vision_config"))
    towers = (text, vision)
    acts = {str(tower.values.get("hidden_act", "quick_gelu")) for tower in towers}
    act = only_value(acts, "activations", path)
    if act not in ("gelu", "quick_gelu"):
        raise ValueError(f"{path}: hidden_act '{act:.80}'; our model has gelu and quick_gelu")
    if vision.integer("num_channels", 3) != 3:
        raise ValueError(f"{path}: {vision.values['num_channels']} image channels; ours takes 3")
    vocab_size = text.integer("vocab_size", 49408)
    end_of_text = text.integer("eos_token_id", 49407, least=0)
    # At the largest id there is, the first position of the id and the largest id are one.
    is_largest = end_of_text in (_LEGACY_EOS, vocab_size - 1)
    vision_width, text_width = vision.integer("hidden_size", 768), text.integer("hidden_size", 512)
    vision_mlp, text_mlp = (
        tower.integer("intermediate_size", default)
        for tower, default in ((vision, 3072), (text, 2048))
    )
    epsilons = {tower.number("layer_norm_eps", 1e-5) for tower in towers}
    return make_architecture(
        path,
        image_size=vision.side("image_size", 224),
        patch_size=vision.side("patch_size", 32),
        vision_layers=vision.integer("num_hidden_layers", 12),
        vision_width=vision_width,
        vision_heads=vision.integer("num_attention_heads", 12),
        text_layers=text.integer("num_hidden_layers", 12),
        text_width=text_width,
        text_heads=text.integer("num_attention_heads", 8),
        embed_dim=ConfigSection(config, "", path).integer("projection_dim", 512),
        context_length=text.integer("max_position_embeddings", 77),
        vocab_size=vocab_size,
        activation=act,
        layer_norm_epsilon=only_value(epsilons, "LayerNorm epsilons", path),
        vision_mlp_width=mlp_width_unless_usual(vision_mlp, vision_width),
        text_mlp_width=mlp_width_unless_usual(text_mlp, text_width),
        end_of_text_id=None if is_largest else end_of_text,
    )


def make_config(arch: Architecture, dtype: str) -> dict[str, Any]:
    """Contents of `config.json` for transformers' `CLIPModel`, parameters stored as `dtype`."""

    def tower(name: str, **own: Any) -> dict[str, Any]:
        width = getattr(arch, f"{name}_width")
        return {
            "model_type": f"clip_{name}_model",
            "hidden_size": width,
            "intermediate_size": getattr(arch, f"{name}_mlp_width") or 4 * width,
            "num_hidden_layers": getattr(arch, f"{name}_layers"),
            "num_attention_heads": getattr(arch, f"{name}_heads"),
            "hidden_act": arch.activation,
            "layer_norm_eps": arch.layer_norm_epsilon,
            "projection_dim": arch.embed_dim,
            **own,
        }

    last, end_of_text = arch.vocab_size - 1, arch.end_of_text_id
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": arch.embed_dim,
        "dtype": dtype,
        "text_config": tower(
            "text",
            vocab_size=arch.vocab_size,
            max_position_embeddings=arch.context_length,
            bos_token_id=last - 1,
            eos_token_id=last if end_of_text is None else end_of_text,
        ),
        "vision_config": tower(
            "vision", num_channels=3, image_size=arch.image_size, patch_size=arch.patch_size
        ),
    }


def read_preprocessing(config: Mapping[str, Any], path: str) -> Preprocessing:
    """The preprocessing in `preprocessor_config.json`; CLIP's where a field is missing.

    Raises:
        ValueError: a step is left out, or pictures are resized by another filter.
    """
    steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
    wanted = {**steps, "resample": _BICUBIC_IN_PIL}
    mean, std = config.get("image_mean"), config.get("image_std")
    return make_preprocessing(config, mean, std, wanted, path)


def make_preprocessor(arch: Architecture, preprocessing: Preprocessing) -> dict[str, Any]:
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


def _tower(config: Mapping[str, Any], name: str, path: str) -> ConfigSection:
    """The values of one tower; older files keep those that count in *_config_dict."""
    values: dict[str, Any] = {}
    for part in (name, f"{name}_dict"):
        found = ConfigSection(config.get(part), part, path).values
        values |= {k: v for k, v in found.items() if v is not None}
    return ConfigSection(values, name, path)
