"""Sizes of named architectures: DiHT's, other published models, and two small ones for laptops."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from diht_jax.config.checks import suggest

# Allowed values of the string fields; the first is CLIP's.
CHOICES = {
    "activation": ("gelu", "quick_gelu", "gelu_tanh"),
    "text_activation": (None, "gelu", "quick_gelu", "gelu_tanh"),
    "vision_projection": ("linear", "bias", "none"),
    "text_projection": ("linear", "bias"),
    "text_pool": ("end", "last"),
}
# Far above any model's size, but small enough for computing the shapes of the parameters.
_MOST_LAYERS = 1000
_LARGEST_SIZE = 2**24


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a dual encoder (DiHT, arXiv 2301.02280, and its official code).

    The defaults are CLIP's. The fields from `text_activation` on are for SigLIP and the Perception
    Encoder (PE-Core).

    Attributes:
        image_size: side of the square input, in pixels.
        patch_size: side of a patch, in pixels. It must divide `image_size` if there is a class
            token. SigLIP at 384 px has 27 patches of 14 px in a row and ignores the last 6 px.
        vision_layers, vision_width, vision_heads: the image tower.
        text_layers, text_width, text_heads: the text tower.
        embed_dim: size `d` of the shared embedding.
        context_length: text length, in tokens.
        vocab_size: entries of the BPE vocabulary. A smaller size than CLIP's 49,408 has only the
            first merges of CLIP's.
        activation: of the MLPs: "gelu" (exact, DiHT's and open_clip's), "quick_gelu" (OpenAI's
            x * sigmoid(1.702 x)) or "gelu_tanh" (SigLIP's, GELU by tanh).
        layer_norm_epsilon: the default is torch's, which released CLIP weights were trained with.
        vision_mlp_width, text_mlp_width: inner width of the MLPs; None is four times the width.
        end_of_text_id: a text is pooled at the first token with this id; None pools at the largest
            id, which is the same for CLIP's vocabulary.
        text_activation: of the text tower, if it differs; None is `activation`.
        class_token: False is SigLIP's image tower: no class token, patch embedding with a bias, no
            LayerNorm before the blocks. False needs `vision_pool_heads`.
        vision_pool_heads: heads of the attention pooling of the image tower; None pools at the
            class token.
        rotary_grid: side, in patches, of the reference grid of rotary positions (PE-Core). It does
            not change with the image size. None has learned positions only; any other value needs
            `vision_pool_heads`.
        vision_projection, text_projection: "linear", "bias" (linear with a bias), or for images
            "none": the pooled feature is the embedding.
        causal_text: whether the text tower has a causal mask.
        text_pool: "end" pools at the end-of-text token, "last" at the last one, even if padding.
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
    text_activation: str | None = None
    class_token: bool = True
    vision_pool_heads: int | None = None
    rotary_grid: int | None = None
    vision_projection: str = "linear"
    text_projection: str = "linear"
    causal_text: bool = True
    text_pool: str = "end"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                _check_value(field.name, value)
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                *first, last = filter(None, choices)
                expected = f"{', '.join(first)} or {last}"
                raise ValueError(f"{field} '{value}': expected {expected}")
        if self.image_size < self.patch_size or (
            self.class_token and self.image_size % self.patch_size
        ):
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        needs_pool = not self.class_token or self.rotary_grid is not None
        if self.vision_pool_heads is None and needs_pool:
            field = "rotary_grid" if self.class_token else "class_token=False"
            raise ValueError(f"{field} needs vision_pool_heads, since all tokens are pooled then")
        for field in ("vision_heads", "text_heads", "vision_pool_heads"):
            tower, heads = field.partition("_")[0], getattr(self, field)
            width = getattr(self, f"{tower}_width")
            if heads is not None and width % heads:
                raise ValueError(f"{tower}_width {width} is no multiple of {field} {heads}")
        width = self.vision_width
        if self.rotary_grid is not None and width // self.vision_heads % 4:
            raise ValueError(
                f"rotary_grid needs heads of a multiple of 4, got {width} / {self.vision_heads}"
            )
        if self.vision_projection == "none" and width != self.embed_dim:
            raise ValueError(
                f"vision_projection 'none' makes embed_dim {width}, got {self.embed_dim}"
            )

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Number of tokens of the image tower: patches, and the class token if there is one."""
        return self.num_patches + self.class_token


# Fields of `Architecture` and their types, without None.
ARCHITECTURE_FIELDS: dict[str, type] = {
    field: (*typing.get_args(kind), kind)[0]
    for field, kind in typing.get_type_hints(Architecture).items()
}


def _check_value(field: str, value: Any) -> None:
    """Raises ValueError if a value has the wrong type or a number is out of range."""
    kind, expected = ARCHITECTURE_FIELDS[field], ""
    least = 0 if field == "end_of_text_id" else 1
    most = _MOST_LAYERS if field.endswith("_layers") else _LARGEST_SIZE
    if kind is int and (type(value) is not int or not least <= value <= most):
        expected = f"an integer from {least} to {most}"
    elif kind is float and (type(value) not in (int, float) or not 0 < value < math.inf):
        expected = "a positive number"
    elif kind in (bool, str) and not isinstance(value, kind):
        expected = kind.__name__
    if expected:
        raise ValueError(f"{field}={value!r:.80}: expected {expected}")


# How SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786) differ from CLIP. The attention
# pooling has as many heads as the image tower.
SIGLIP_PARTS: dict[str, Any] = {
    "class_token": False,
    "vision_projection": "none",
    "text_projection": "bias",
    "causal_text": False,
    "text_pool": "last",
}
_SIGLIP: dict[str, Any] = {
    "context_length": 64,
    "activation": "gelu_tanh",
    "layer_norm_epsilon": 1e-6,
    **SIGLIP_PARTS,
}
_SIGLIP_B: dict[str, Any] = {"vision_pool_heads": 12, **_SIGLIP}
_SIGLIP_L: dict[str, Any] = {"vision_pool_heads": 16, **_SIGLIP}
_SIGLIP_SO: dict[str, Any] = {"vision_mlp_width": 4304, "text_mlp_width": 4304, **_SIGLIP_L}
# PE-Core (arXiv 2504.13181), with the text tower of sizes B and L.
_PE_CORE: dict[str, Any] = {
    "context_length": 32,
    "vision_pool_heads": 8,
    "vision_projection": "bias",
}
# MetaCLIP 2 (arXiv 2507.22062), the multilingual models.
_WORLDWIDE: dict[str, Any] = {"vocab_size": 901629, "end_of_text_id": 2}
_QUICK: dict[str, Any] = {"activation": "quick_gelu"}

# The positional arguments are image and patch size; layers, width and heads of the image tower and
# of the text tower; and the embedding size.
ARCHITECTURES: dict[str, Architecture] = {
    "diht_vitb32_224px": Architecture(224, 32, 12, 768, 12, 12, 512, 8, 512),
    "diht_vitb16_224px": Architecture(224, 16, 12, 768, 12, 12, 512, 8, 512),
    "diht_vitl14_224px": Architecture(224, 14, 24, 1024, 16, 12, 768, 12, 768),
    "diht_vitl14_336px": Architecture(336, 14, 24, 1024, 16, 12, 768, 12, 768),
    "siglip_vitb16_224px": Architecture(
        224, 16, 12, 768, 12, 12, 768, 12, 768, vocab_size=32000, **_SIGLIP_B
    ),
    "siglip_so400m14_384px": Architecture(
        384, 14, 27, 1152, 16, 27, 1152, 16, 1152, vocab_size=32000, **_SIGLIP_SO
    ),
    "siglip2_vitb16_224px": Architecture(
        224, 16, 12, 768, 12, 12, 768, 12, 768, vocab_size=256000, **_SIGLIP_B
    ),
    "siglip2_vitl16_256px": Architecture(
        256, 16, 24, 1024, 16, 24, 1024, 16, 1024, vocab_size=256000, **_SIGLIP_L
    ),
    "siglip2_so400m14_384px": Architecture(
        384, 14, 27, 1152, 16, 27, 1152, 16, 1152, vocab_size=256000, **_SIGLIP_SO
    ),
    "pe_core_vitb16_224px": Architecture(
        224, 16, 12, 768, 12, 24, 1024, 16, 1024, rotary_grid=14, **_PE_CORE
    ),
    "pe_core_vitl14_336px": Architecture(
        336, 14, 24, 1024, 16, 24, 1024, 16, 1024, rotary_grid=24, **_PE_CORE
    ),
    "metaclip2_vith14_224px": Architecture(
        224, 14, 32, 1280, 16, 24, 1024, 16, 1024, **_QUICK, **_WORLDWIDE
    ),
    # DFN (arXiv 2309.17425): CLIPs.
    "dfn2b_vitb16_224px": Architecture(224, 16, 12, 768, 12, 12, 512, 8, 512, **_QUICK),
    "dfn2b_vitl14_224px": Architecture(224, 14, 24, 1024, 16, 12, 768, 12, 768, **_QUICK),
    "dfn5b_vith14_378px": Architecture(378, 14, 32, 1280, 16, 24, 1024, 16, 1024, **_QUICK),
    # Ours: small enough to train on a laptop's CPU in minutes.
    "small_64px": Architecture(64, 8, 4, 192, 3, 2, 192, 3, 192, context_length=32),
    "tiny_32px": Architecture(32, 8, 4, 128, 2, 2, 128, 2, 128, context_length=32),
}


def get_architecture(name: str, overrides: dict[str, Any] | None = None) -> Architecture:
    """Returns the architecture called `name`, with some fields replaced.

    Args:
        name: a key of `ARCHITECTURES`.
        overrides: values by field of `Architecture`; None leaves a field unchanged.

    Raises:
        ValueError: an unknown name or field (suggests the nearest), or inconsistent sizes.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture '{name}'; {suggest(name, ARCHITECTURES)}")
    replaced = {k: v for k, v in (overrides or {}).items() if v is not None}
    return replace_fields(ARCHITECTURES[name], replaced, "config.model.overrides")


def replace_fields(arch: Architecture, fields: Mapping[str, Any], where: str) -> Architecture:
    """Returns the architecture with some fields replaced; errors name `where` they came from.

    Raises:
        ValueError: an unknown field (suggests the nearest known one), or inconsistent sizes.
    """
    for field in fields:
        if field not in ARCHITECTURE_FIELDS:
            hint = suggest(field, ARCHITECTURE_FIELDS)
            raise ValueError(f"{where} has no field '{field}'; {hint}")
    try:
        return dataclasses.replace(arch, **fields)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


_BOOLEANS = {"true": True, "false": False}


def parse_fields(settings: Iterable[str]) -> dict[str, Any]:
    """Parses `field=value` settings of a command line into typed fields of an architecture."""
    fields = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in ARCHITECTURE_FIELDS:
            hint = suggest(name, ARCHITECTURE_FIELDS)
            raise ValueError(f"--architecture {setting[:200]}: no field '{name[:200]}'; {hint}")
        kind = ARCHITECTURE_FIELDS[name]
        try:
            fields[name] = _BOOLEANS[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise ValueError(
                f"--architecture: expected a pair like activation=quick_gelu, got '{setting[:200]}'"
            ) from None
    return fields
