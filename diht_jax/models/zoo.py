"""Named architectures: the four of DiHT, and two small ones for laptops.

Read by the training command, the checkpoint loader and the tests; holds numbers only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from diht_jax.config import nearest_name


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
        vocab_size: entries of the BPE vocabulary.
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

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width {width} is no multiple of {tower}_heads {heads}")


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
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"config.model.overrides.{field}: expected a positive int, got {value!r}"
            )
    return dataclasses.replace(ARCHITECTURES[name], **replaced)
