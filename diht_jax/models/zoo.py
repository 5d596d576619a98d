"""Named architectures: DiHT's, those of other published models, and two small ones for laptops.

Numbers only; no layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from diht_jax.config.architecture import ARCHITECTURE_FIELDS
from diht_jax.config.checks import nearest_name

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
        for field, kind in ARCHITECTURE_FIELDS.items():
            value, least = getattr(self, field), 0 if field == "end_of_text_id" else 1
            most = _MOST_LAYERS if field.endswith("_layers") else _LARGEST_SIZE
            if kind is int and value is not None and not least <= value <= most:
                raise ValueError(f"{field} {value}: expected {least} to {most}")
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field} '{value}': expected {_either(choices)}")
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
        self._check_image_tower()

    def _check_image_tower(self) -> None:
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


def _either(choices: Sequence[str | None]) -> str:
    *first, last = (name for name in choices if name is not None)
    return f"{', '.join(first)} or {last}"


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


def _siglip(image_size, patch_size, width, layers, heads, vocab_size, mlp_width=None):
    """SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786), whose two towers are alike."""
    return Architecture(
        image_size=image_size,
        patch_size=patch_size,
        vision_layers=layers,
        vision_width=width,
        vision_heads=heads,
        vision_mlp_width=mlp_width,
        text_layers=layers,
        text_width=width,
        text_heads=heads,
        text_mlp_width=mlp_width,
        embed_dim=width,
        context_length=64,
        vocab_size=vocab_size,
        activation="gelu_tanh",
        layer_norm_epsilon=1e-6,
        class_token=False,
        vision_pool_heads=heads,
        vision_projection="none",
        text_projection="bias",
        causal_text=False,
        text_pool="last",
    )


def _pe_core(image_size, patch_size, vision_layers, vision_width):
    """PE-Core (arXiv 2504.13181) with the text tower of its sizes B and L."""
    return Architecture(
        image_size=image_size,
        patch_size=patch_size,
        vision_layers=vision_layers,
        vision_width=vision_width,
        vision_heads=vision_width // 64,
        text_layers=24,
        text_width=1024,
        text_heads=16,
        embed_dim=1024,
        context_length=32,
        vision_pool_heads=8,
        rotary_grid=image_size // patch_size,
        vision_projection="bias",
    )


def _vit_h14(image_size, **fields):
    """open_clip's ViT-H-14, with QuickGELU or not."""
    return Architecture(
        image_size=image_size,
        patch_size=14,
        vision_layers=32,
        vision_width=1280,
        vision_heads=16,
        text_layers=24,
        text_width=1024,
        text_heads=16,
        embed_dim=1024,
        **fields,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "diht_vitb32_224px": _diht(224, 32, 12, 768, 512, 512),
    "diht_vitb16_224px": _diht(224, 16, 12, 768, 512, 512),
    "diht_vitl14_224px": _diht(224, 14, 24, 1024, 768, 768),
    "diht_vitl14_336px": _diht(336, 14, 24, 1024, 768, 768),
    "siglip_vitb16_224px": _siglip(224, 16, 768, 12, 12, 32000),
    "siglip_so400m14_384px": _siglip(384, 14, 1152, 27, 16, 32000, 4304),
    "siglip2_vitb16_224px": _siglip(224, 16, 768, 12, 12, 256000),
    "siglip2_vitl16_256px": _siglip(256, 16, 1024, 24, 16, 256000),
    "siglip2_so400m14_384px": _siglip(384, 14, 1152, 27, 16, 256000, 4304),
    "pe_core_vitb16_224px": _pe_core(224, 16, 12, 768),
    "pe_core_vitl14_336px": _pe_core(336, 14, 24, 1024),
    # MetaCLIP 2 (arXiv 2507.22062) on texts of all languages.
    "metaclip2_vith14_224px": _vit_h14(
        224, activation="quick_gelu", vocab_size=901629, end_of_text_id=2
    ),
    # DFN (arXiv 2309.17425): CLIPs.
    "dfn2b_vitb16_224px": dataclasses.replace(
        _diht(224, 16, 12, 768, 512, 512), activation="quick_gelu"
    ),
    "dfn2b_vitl14_224px": dataclasses.replace(
        _diht(224, 14, 24, 1024, 768, 768), activation="quick_gelu"
    ),
    "dfn5b_vith14_378px": _vit_h14(378, activation="quick_gelu"),
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
        is_number = kind in (int, float)
        is_wrong_kind = isinstance(value, bool) != (kind is bool) or not isinstance(value, allowed)
        if is_wrong_kind or (is_number and value <= 0):
            raise ValueError(
                f"config.model.overrides.{field}: expected a {'positive ' * is_number}"
                f"{kind.__name__}, got {value!r}"
            )
    return dataclasses.replace(ARCHITECTURES[name], **replaced)
