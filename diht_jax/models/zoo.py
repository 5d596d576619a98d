"""Named architectures: the four of DiHT, and two small ones for laptops.

Numbers only; no layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from diht_jax.config.architecture import ARCHITECTURE_FIELDS
from diht_jax.config.checks import nearest_name

ACTIVATIONS = ("gelu", "quick_gelu")
# Far above any model's, and small enough that looking at the parameters' shapes ends.
_MOST_LAYERS = 1000
_LARGEST_SIZE = 2**24


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a dual encoder (DiHT, arXiv 2301.02280, and its official code).

    Attributes:
        image_size: side of the square input, in pixels.
        patch_size: side of a patch, in pixels; divides `image_size`.
        vision_layers, vision_width, vision_heads: the image tower.
        text_layers, text_width, text_heads: the text tower.
        embed_dim: size `d` of the shared embedding.
        context_length: text length, in tokens.
        vocab_size: entries of the BPE vocabulary; fewer than CLIP's 49,408 hold the first of its
            merges.
        activation: of the MLPs: "gelu" (exact, DiHT's and open_clip's) or "quick_gelu" (OpenAI's
            x * sigmoid(1.702 x)).
        layer_norm_epsilon: torch's default, which released CLIP weights were trained with.
        vision_mlp_width, text_mlp_width: inner width of the MLPs; None is four times the width.
        end_of_text_id: a text is pooled at the first token with this id; None pools at the largest
            id, which is the same for CLIP's vocabulary.
    """

    image_size: int
    patch_size: int
    vision_layers: int
    vision_width: int
    vision_heads: int
    text_layers: int
    text_width: int
    text_heads: int
    embed_dim: int
    context_length: int = 77
    vocab_size: int = 49408
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    vision_mlp_width: int | None = None
    text_mlp_width: int | None = None
    end_of_text_id: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "end_of_text_id" else 1
            most = _MOST_LAYERS if field.name.endswith("_layers") else _LARGEST_SIZE
            is_size = field.name not in ("activation", "layer_norm_epsilon")
            if is_size and value is not None and not least <= value <= most:
                raise ValueError(f"{field.name} {value}: expected {least} to {most}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width {width} is no multiple of {tower}_heads {heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation '{self.activation}': expected {' or '.join(ACTIVATIONS)}")


def _diht(image_size, patch_size, vision_layers, vision_width, text_width, embed_dim):
    return Architecture(
        image_size=image_size,
        patch_size=patch_size,
        vision_layers=vision_layers,
        vision_width=vision_width,
        vision_heads=vision_width // 64,
        text_layers=12,
        text_width=text_width,
        text_heads=text_width // 64,
        embed_dim=embed_dim,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "diht_vitb32_224px": _diht(224, 32, 12, 768, 512, 512),
    "diht_vitb16_224px": _diht(224, 16, 12, 768, 512, 512),
    "diht_vitl14_224px": _diht(224, 14, 24, 1024, 768, 768),
    "diht_vitl14_336px": _diht(336, 14, 24, 1024, 768, 768),
    # Ours: sizes with which a laptop's CPU trains in minutes.
    "small_64px": Architecture(
        image_size=64,
        patch_size=8,
        vision_layers=4,
        vision_width=192,
        vision_heads=3,
        text_layers=2,
        text_width=192,
        text_heads=3,
        embed_dim=192,
        context_length=32,
    ),
    "tiny_32px": Architecture(
        image_size=32,
        patch_size=8,
        vision_layers=4,
        vision_width=128,
        vision_heads=2,
        text_layers=2,
        text_width=128,
        text_heads=2,
        embed_dim=128,
        context_length=32,
    ),
}


def get_architecture(name: str, overrides: dict[str, Any] | None = None) -> Architecture:
    """The architecture called `name`, with some fields replaced.

    Args:
        name: a key of `ARCHITECTURES`.
        overrides: fields of `Architecture` and their values; None leaves a field alone.

    Raises:
        ValueError: unknown name or field (names the nearest known one), or sizes that do not fit.
    """
    if name not in ARCHITECTURES:
        nearest = nearest_name(name, list(ARCHITECTURES))
        hint = f"did you mean '{nearest}'? " if nearest else ""
        raise ValueError(
            f"unknown architecture '{name}'; {hint}known: {', '.join(sorted(ARCHITECTURES))}"
        )
    fields = [field.name for field in dataclasses.fields(Architecture)]
    replaced = {k: v for k, v in (overrides or {}).items() if v is not None}
    for field, value in replaced.items():
        if field not in fields:
            nearest = nearest_name(field, fields)
            hint = f"did you mean '{nearest}'? " if nearest else ""
            raise ValueError(
                f"config.model.overrides has no field '{field}'; {hint}known: {', '.join(fields)}"
            )
        kind = ARCHITECTURE_FIELDS[field]
        allowed = (int, float) if kind is float else kind
        is_number = kind is not str
        if not isinstance(value, allowed) or isinstance(value, bool) or (is_number and value <= 0):
            raise ValueError(
                f"config.model.overrides.{field}: expected a {'positive ' * is_number}"
                f"{kind.__name__}, got {value!r}"
            )
    return dataclasses.replace(ARCHITECTURES[name], **replaced)
