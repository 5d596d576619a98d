"""Named architectures: DiHT's, those of other published models, and two small ones for laptops.

Numbers only; no layers.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from diht_jax.config.checks import suggest

# Values of the fields that are names; the first is CLIP's.
CHOICES = {
    "activation": ("gelu", "quick_gelu", "gelu_tanh"),
    "text_activation": (None, "gelu", "quick_gelu", "gelu_tanh"),
    "vision_projection": ("linear", "bias", "none"),
    "text_projection": ("linear", "bias"),
    "text_pool": ("end", "last"),
}
# Far above any model's, and small enough that looking at the parameters' shapes ends.
_MOST_LAYERS = 1000
_LARGEST_SIZE = 2**24


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a dual encoder (DiHT, arXiv 2301.02280, and its official code).

    The defaults make a CLIP. The fields from `text_activation` on are what SigLIP and the
    Perception Encoder (PE-Core) have otherwise.

    Attributes:
        image_size: side of the square input, in pixels.
        patch_size: side of a patch, in pixels; divides `image_size`. Without a class token it need
            not: SigLIP at 384 px has 27 patches of 14 px in a row, and does not see the last 6 px.
        vision_layers, vision_width, vision_heads: the image tower.
        text_layers, text_width, text_heads: the text tower.
        embed_dim: size `d` of the shared embedding.
        context_length: text length, in tokens.
        vocab_size: entries of the BPE vocabulary; fewer than CLIP's 49,408 hold the first of its
            merges.
        activation: of the MLPs: "gelu" (exact, DiHT's and open_clip's), "quick_gelu" (OpenAI's
            x * sigmoid(1.702 x)) or "gelu_tanh" (SigLIP's, GELU by tanh).
        layer_norm_epsilon: torch's default, which released CLIP weights were trained with.
        vision_mlp_width, text_mlp_width: inner width of the MLPs; None is four times the width.
        end_of_text_id: a text is pooled at the first token with this id; None pools at the largest
            id, which is the same for CLIP's vocabulary.
        text_activation: of the text tower where it is another one; None is `activation`.
        class_token: False is SigLIP's image tower: patches only, with a bias, and no LayerNorm
            before the blocks. It needs `vision_pool_heads`.
        vision_pool_heads: heads of the attention that pools all tokens of the image tower; None
            pools at the class token.
        rotary_grid: side, in patches, of the grid that rotary positions count in (PE-Core), which
            stays what it is where images of another size are read; None: learned positions alone.
            It needs `vision_pool_heads`.
        vision_projection, text_projection: "linear", "bias" (linear with a bias), or for images
            "none": what was pooled is the embedding.
        causal_text: False: each token of a text sees all of them.
        text_pool: "end" pools a text at its end, "last" at the last token, padding or not.
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
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width {width} is no multiple of {tower}_heads {heads}")
        pool_heads, width = self.vision_pool_heads, self.vision_width
        if pool_heads is None and (not self.class_token or self.rotary_grid is not None):
            field = "rotary_grid" if self.class_token else "class_token=False"
            raise ValueError(f"{field} needs vision_pool_heads, since all tokens are pooled then")
        if pool_heads is not None and width % pool_heads:
            raise ValueError(
                f"vision_width {width} is no multiple of vision_pool_heads {pool_heads}"
            )
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
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the image tower: the patches, and the class token if there is one."""
        return self.num_patches + self.class_token


# Fields of `Architecture` and their types, without None.
ARCHITECTURE_FIELDS: dict[str, type] = {
    field: (*typing.get_args(kind), kind)[0]
    for field, kind in typing.get_type_hints(Architecture).items()
}


def _check_value(field: str, value: Any) -> None:
    """Raises ValueError for a value of another type, or a number out of range."""
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


# What SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786) have otherwise than CLIP: parts
# and sizes. The image is pooled with the heads of its tower.
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
# PE-Core (arXiv 2504.13181) with the text tower of its sizes B and L.
_PE_CORE: dict[str, Any] = {
    "context_length": 32,
    "vision_pool_heads": 8,
    "vision_projection": "bias",
}
# MetaCLIP 2 (arXiv 2507.22062) on texts of all languages.
_WORLDWIDE: dict[str, Any] = {"vocab_size": 901629, "end_of_text_id": 2}
_QUICK: dict[str, Any] = {"activation": "quick_gelu"}

# By the sizes of images and patches; layers, width and heads of the image tower and of the text
# tower; and the size of the embeddings.
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
    # Ours: sizes with which a laptop's CPU trains in minutes.
    "small_64px": Architecture(64, 8, 4, 192, 3, 2, 192, 3, 192, context_length=32),
    "tiny_32px": Architecture(32, 8, 4, 128, 2, 2, 128, 2, 128, context_length=32),
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
        raise ValueError(f"unknown architecture '{name}'; {suggest(name, ARCHITECTURES)}")
    replaced = {k: v for k, v in (overrides or {}).items() if v is not None}
    return replace_fields(ARCHITECTURES[name], replaced, "config.model.overrides")


def replace_fields(arch: Architecture, fields: Mapping[str, Any], where: str) -> Architecture:
    """The architecture with other values of some fields.

    Raises:
        ValueError: an unknown field (names the nearest known one), or sizes that do not fit.
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
    """Fields of an architecture, as a command line gives them, with values of their types."""
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
