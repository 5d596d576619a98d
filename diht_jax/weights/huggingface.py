"""The parameter names of transformers' `CLIPModel`, to and from CLIP's.

transformers keeps query, key and value apart and has both projections as linear layers, that is
transposed; the rest is renaming. Its configs belong in `settings.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diht_jax.models.zoo import Architecture

# Index vectors that versions before 4.31 saved.
BUFFERS = frozenset(("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"))

_WHOLE = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IN_PROJ = ("q_proj", "k_proj", "v_proj")


def drop_buffers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters alone."""
    return {name: value for name, value in tensors.items() if name not in BUFFERS}


def to_huggingface(tensors: Mapping[str, np.ndarray], arch: Architecture) -> dict[str, np.ndarray]:
    """transformers' names and shapes of a state dict in CLIP's layout.

    Args:
        tensors: all parameters of `arch`, float [...]; results are views of them.
        arch: sizes.
    """
    found = {theirs: tensors[ours] for ours, theirs in _WHOLE.items()}
    found |= {theirs: tensors[ours].T for ours, theirs in _TRANSPOSED.items()}
    for ours, theirs in _blocks(arch):
        for name, other in _IN_BLOCK.items():
            for leaf in ("weight", "bias"):
                found[f"{theirs}.{other}.{leaf}"] = tensors[f"{ours}.{name}.{leaf}"]
        for leaf in ("weight", "bias"):
            parts = np.split(tensors[f"{ours}.attn.in_proj_{leaf}"], 3)
            for name, part in zip(_IN_PROJ, parts, strict=True):
                found[f"{theirs}.self_attn.{name}.{leaf}"] = part
    return found


def from_huggingface(
    tensors: Mapping[str, np.ndarray], arch: Architecture
) -> dict[str, np.ndarray]:
    """CLIP's layout of a state dict in transformers'; the inverse of `to_huggingface`.

    Args:
        tensors: exactly the names and shapes that `to_huggingface` gives for `arch`.
        arch: sizes.
    """
    found = {ours: tensors[theirs] for ours, theirs in _WHOLE.items()}
    found |= {ours: tensors[theirs].T for ours, theirs in _TRANSPOSED.items()}
    for ours, theirs in _blocks(arch):
        for name, other in _IN_BLOCK.items():
            for leaf in ("weight", "bias"):
                found[f"{ours}.{name}.{leaf}"] = tensors[f"{theirs}.{other}.{leaf}"]
        for leaf in ("weight", "bias"):
            parts = [tensors[f"{theirs}.self_attn.{name}.{leaf}"] for name in _IN_PROJ]
            found[f"{ours}.attn.in_proj_{leaf}"] = np.concatenate(parts)
    return found


def expected_shapes(
    clip_shapes: Mapping[str, tuple[int, ...]], arch: Architecture
) -> dict[str, tuple[int, ...]]:
    """transformers' name -> shape, from those of CLIP's layout."""
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in clip_shapes.items()}
    return {name: value.shape for name, value in to_huggingface(empty, arch).items()}


def _blocks(arch: Architecture) -> list[tuple[str, str]]:
    towers = (
        ("visual.", "vision_model", arch.vision_layers),
        ("", "text_model", arch.text_layers),
    )
    return [
        (f"{prefix}transformer.resblocks.{i}", f"{model}.encoder.layers.{i}")
        for prefix, model, layers in towers
        for i in range(layers)
    ]
