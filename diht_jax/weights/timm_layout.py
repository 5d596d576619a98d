"""open_clip's models with an image tower of timm: SigLIP, SigLIP 2 and PE-Core.

open_clip names the image tower (`timm_model_name`), whose sizes are timm's own, and keeps the text
tower in a module `text` under CLIP's names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diht_jax.models.zoo import Architecture
from diht_jax.weights.clip_layout import TEXT_PREFIX, text_layout
from diht_jax.weights.layout import BlockNames, Layout, Tensors, bias, blocks, linear, norm
from diht_jax.weights.settings import ConfigSection

TRUNK = "visual.trunk."
_BLOCK = BlockNames("norm1", ("attn.qkv.",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


# Fields of `Architecture`: all that a tower's name decides but the size of the embeddings.
Tower = Mapping[str, Any]


def _siglip_towers() -> Iterator[tuple[str, Tower]]:
    # Image sizes for which timm computes GELU exactly, and those with GELU by tanh.
    for name, patch, width, layers, heads, mlp_width, exact, by_tanh in (
        ("base", 16, 768, 12, 12, None, (224, 256, 384, 512), ()),
        ("base", 32, 768, 12, 12, None, (), (256,)),
        ("large", 16, 1024, 24, 16, None, (256, 384), (512,)),
        ("so400m", 14, 1152, 27, 16, 4304, (224, 378, 384), ()),
        ("so400m", 16, 1152, 27, 16, 4304, (), (256, 384, 512)),
        ("giantopt", 16, 1536, 40, 16, None, (), (256, 384)),
    ):
        for size in (*exact, *by_tanh):
            fields = {
                "image_size": size,
                "patch_size": patch,
                "vision_width": width,
                "vision_layers": layers,
                "vision_heads": heads,
                "vision_mlp_width": mlp_width,
                "vision_pool_heads": heads,
                "class_token": False,
                "vision_projection": "none",
                "rotary_grid": None,
                "activation": "gelu_tanh" if size in by_tanh else "gelu",
                "layer_norm_epsilon": 1e-6,
            }
            yield f"vit_{name}_patch{patch}_siglip_{size}", fields


def _perception_encoders() -> Iterator[tuple[str, Tower]]:
    for name, size, patch, width, layers, heads in (
        ("tiny", 384, 16, 192, 12, 3),
        ("small", 384, 16, 384, 12, 6),
        ("base", 224, 16, 768, 12, 12),
        ("large", 336, 14, 1024, 24, 16),
    ):
        fields = {
            "image_size": size,
            "patch_size": patch,
            "vision_width": width,
            "vision_layers": layers,
            "vision_heads": heads,
            "vision_mlp_width": None,
            "vision_pool_heads": 8,
            "class_token": True,
            "vision_projection": "bias",
            "rotary_grid": size // patch,
            "activation": "gelu",
            "layer_norm_epsilon": 1e-5,
        }
        yield f"vit_pe_core_{name}_patch{patch}_{size}", fields


TOWERS: dict[str, Tower] = dict([*_siglip_towers(), *_perception_encoders()])


def find_tower(vision: ConfigSection) -> Tower:
    """The tower of the `timm_model_name` in "vision_cfg", which may end with a tag of its weights.

    Raises:
        ValueError: our image tower cannot be this one.
    """
    name = str(vision.values["timm_model_name"])
    found = TOWERS.get(name.partition(".")[0])
    if found is None:
        kind = "this is a FastViT, with convolutions; " if name.startswith("fastvit") else ""
        raise vision.error(
            "timm_model_name",
            f"{kind}the image towers of timm that ours can be: {', '.join(TOWERS)}",
        )
    return found


def tower_name(arch: Architecture) -> str:
    """Timm's name of an architecture's image tower.

    Raises:
        ValueError: timm has none of these sizes.
    """
    for name, tower in TOWERS.items():
        if all(getattr(arch, field) == value for field, value in tower.items()):
            return name
    raise ValueError(
        f"open_clip takes towers that pool by attention from timm, which has none of "
        f"{arch.image_size} px with patches of {arch.patch_size} px, {arch.vision_layers} layers, "
        f"width {arch.vision_width} and activation '{arch.activation}'"
    )


def projection_name(tower: Tower) -> str | None:
    """open_clip's `timm_proj` of a tower, "none" for one without a projection."""
    return "none" if tower["vision_projection"] == "none" else None


def is_timm(arch: Architecture) -> bool:
    """Returns whether open_clip has the image tower from timm: those that pool by attention."""
    return arch.vision_pool_heads is not None


def layout(arch: Architecture) -> Layout:
    """The layout of a model."""
    pool = f"{TRUNK}attn_pool"
    found = {
        "vision/patch_embedding/kernel": Tensors(
            (f"{TRUNK}patch_embed.proj.weight",), "convolution"
        ),
        "vision/positional_embedding": Tensors((f"{TRUNK}pos_embed",), "row"),
        **norm("vision/post_norm", f"{TRUNK}norm"),
        "vision/pool/probe": Tensors((f"{pool}.latent",), "plane"),
        # The query, and keys and values together.
        **linear("vision/pool/in_proj", f"{pool}.q", f"{pool}.kv", shares=(1, 2)),
        **linear("vision/pool/out_proj", f"{pool}.proj"),
        **norm("vision/pool/norm", f"{pool}.norm"),
        **linear("vision/pool/mlp/fc_in", f"{pool}.mlp.fc1"),
        **linear("vision/pool/mlp/fc_out", f"{pool}.mlp.fc2"),
        **blocks("vision/blocks", f"{TRUNK}blocks.", arch.vision_layers, _BLOCK),
        **text_layout(arch, TEXT_PREFIX),
        "log_logit_scale": Tensors(("logit_scale",)),
    }
    if arch.class_token:
        found["vision/class_embedding"] = Tensors((f"{TRUNK}cls_token",), "plane")
        found |= norm("vision/pre_norm", f"{TRUNK}norm_pre")
    else:
        found |= bias("vision/patch_embedding", f"{TRUNK}patch_embed.proj")
    if arch.vision_projection == "bias":
        found |= linear("vision/projection", f"{TRUNK}head")
    return found
