"""open_clip's models: reading and writing their configs, and image towers from timm.

`open_clip_config.json` describes a model. Its parameters have CLIP's names (`clip_layout.py`), or
the names below if the image tower comes from timm: SigLIP, SigLIP 2 and PE-Core. open_clip refers
to such a tower by name (`timm_model_name`); timm defines its sizes. The text tower is then in a
module `text`, with CLIP's names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diht_jax.models.zoo import Architecture
from diht_jax.weights import clip_layout
from diht_jax.weights.clip_layout import (
    TEXT_PREFIX,
    BlockNames,
    Layout,
    Tensors,
    bias,
    blocks,
    linear,
    norm,
    text_layout,
)
from diht_jax.weights.settings import (
    ConfigSection,
    Preprocessing,
    make_architecture,
    make_preprocess_cfg,
)

# Fields of a tower that are read below, or do not affect the computation.
_FIELDS = """
    image_size patch_size layers width head_width mlp_ratio context_length vocab_size heads
    pool_type eos_id patch_dropout output_tokens pad_id hf_model_pretrained timm_model_pretrained
    timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path final_ln_after_pool
    attn_pooler_queries attn_pooler_heads hf_proj_type hf_pooler_type hf_tokenizer_name
    tokenizer_kwargs act_kwargs
"""
_KNOWN = frozenset(_FIELDS.split())
_NEUTRAL = {"pos_embed_type": "learnable", "proj_type": "linear"}
# Further fields of a model with an image tower from timm: of its image and of its text tower.
_KNOWN_OF_TIMM = {
    "vision_cfg": ("timm_model_name",),
    "text_cfg": ("no_causal_mask", "proj_bias"),
}
# Supported poolings of each tower; the first is the default.
_POOLS = {"vision_cfg": ("tok",), "text_cfg": ("argmax", "eos", "last")}


def read_architecture(config: Mapping[str, Any], path: str) -> Architecture:
    """Reads the architecture from the "model_cfg" of `open_clip_config.json`.

    Raises:
        ValueError: a field is missing, or requires something that our model lacks.
    """
    whole = ConfigSection(config, "", path)
    embed_dim = whole.integer("embed_dim")
    vision, text = whole.section("vision_cfg"), whole.section("text_cfg")
    _refuse_extras(vision, text)
    quick_gelu = bool(config.get("quick_gelu"))
    width = text.integer("width", 512)
    is_timm = "timm_model_name" in vision.values
    return make_architecture(
        path,
        embed_dim=embed_dim,
        text_layers=text.integer("layers", 12),
        text_width=width,
        text_heads=text.integer("heads", 8),
        text_mlp_width=_mlp_width(width, text),
        text_activation=_activation(text, quick_gelu),
        text_epsilon=text.section("norm_kwargs").number("eps", 1e-5),
        context_length=text.integer("context_length", 77),
        vocab_size=text.integer("vocab_size", 49408),
        end_of_text_id=(
            text.integer("eos_id", 2, least=0) if text.values.get("pool_type") == "eos" else None
        ),
        **(_timm_fields(vision, text) if is_timm else _clip_fields(vision, text, quick_gelu)),
    )


def _clip_fields(vision: ConfigSection, text: ConfigSection, quick_gelu: bool) -> dict[str, Any]:
    """Returns the fields of a CLIP with open_clip's own image tower."""
    width, activation = vision.integer("width"), _activation(vision, quick_gelu)
    if activation != _activation(text, quick_gelu):
        raise text.error("act_kwargs", "that of vision_cfg, since our CLIP has one activation")
    return {
        "image_size": vision.integer("image_size", 224),
        "patch_size": vision.integer("patch_size", 16),
        "vision_layers": vision.integer("layers"),
        "vision_width": width,
        "vision_heads": max(1, width // vision.integer("head_width", 64)),
        "vision_mlp_width": _mlp_width(width, vision),
        "activation": activation,
        "layer_norm_epsilon": vision.section("norm_kwargs").number("eps", 1e-5),
    }


def _timm_fields(vision: ConfigSection, text: ConfigSection) -> dict[str, Any]:
    """Returns the fields of a model with an image tower from timm and open_clip's text tower."""
    tower = find_tower(vision)
    for key, wanted in (
        ("timm_pool", "map"),
        # open_clip treats "" like the absence of a projection.
        ("timm_proj", projection_name(tower)),
        ("image_size", tower["image_size"]),
    ):
        if vision.values.get(key) != wanted and (vision.values.get(key) or wanted):
            raise vision.error(key, f"{wanted!r}, which this tower of timm has")
    return {
        **tower,
        "causal_text": not text.values.get("no_causal_mask", False),
        "text_pool": "last" if text.values.get("pool_type") == "last" else "end",
        "text_projection": "bias" if text.values.get("proj_bias") else "linear",
    }


def _activation(tower: ConfigSection, quick_gelu: bool) -> str:
    """Returns the activation of one of open_clip's own towers."""
    kind = tower.section("act_kwargs")
    found = kind.one_of("approximate", {"none": "gelu", "tanh": "gelu_tanh"}, "none")
    if kind.values.keys() - {"approximate"}:
        raise tower.error("act_kwargs", "'approximate' alone")
    return "quick_gelu" if quick_gelu else found


def make_config(
    arch: Architecture, preprocessing: Preprocessing, logit_bias: float | None = None
) -> dict[str, Any]:
    """Returns the contents of `open_clip_config.json`, which open_clip reads from directory or hub.

    `logit_bias` belongs to SigLIP's loss; None for a model without one.

    Raises:
        ValueError: open_clip has no such model.
    """
    activation = arch.text_activation or arch.activation
    whole: dict[str, Any] = {"embed_dim": arch.embed_dim, "quick_gelu": activation == "quick_gelu"}
    vision: dict[str, Any] = {"image_size": arch.image_size}
    if is_timm(arch):
        name = tower_name(arch)
        whole["custom_text"] = True
        if logit_bias is not None:
            whole["init_logit_bias"] = logit_bias
        vision |= {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "map"}
        vision["timm_proj"] = projection_name(TOWERS[name])
    else:
        clip_layout.check_is_clip(arch)
        vision |= {
            "patch_size": arch.patch_size,
            "head_width": arch.vision_width // arch.vision_heads,
            **_make_tower(arch, "vision", arch.activation),
        }
    whole["vision_cfg"] = vision
    text = {
        "context_length": arch.context_length,
        "vocab_size": arch.vocab_size,
        "heads": arch.text_heads,
        **_make_tower(arch, "text", activation),
    }
    if arch.end_of_text_id is not None:
        text |= {"pool_type": "eos", "eos_id": arch.end_of_text_id}
    if is_timm(arch):
        text["no_causal_mask"] = not arch.causal_text
        text["proj_bias"] = arch.text_projection == "bias"
    if arch.text_pool == "last":
        text["pool_type"] = "last"
    return {
        "model_cfg": {**whole, "text_cfg": text},
        "preprocess_cfg": make_preprocess_cfg(arch, preprocessing),
    }


def _make_tower(arch: Architecture, tower: str, activation: str) -> dict[str, Any]:
    """Returns the settings of one of open_clip's own towers."""
    width, mlp_width = getattr(arch, f"{tower}_width"), getattr(arch, f"{tower}_mlp_width")
    settings = {"width": width, "layers": getattr(arch, f"{tower}_layers")}
    if mlp_width is not None:
        settings["mlp_ratio"] = _mlp_ratio(width, mlp_width)
    if arch.layer_norm_epsilon != 1e-5:
        settings["norm_kwargs"] = {"eps": arch.layer_norm_epsilon}
    if activation == "gelu_tanh":
        settings["act_kwargs"] = {"approximate": "tanh"}
    return settings


def describe(arch: Architecture, preprocessing: Preprocessing) -> dict[str, Any]:
    """Returns `make_config`, or our own architecture fields if open_clip has no such model."""
    try:
        return make_config(arch, preprocessing)
    except ValueError:
        settings = make_preprocess_cfg(arch, preprocessing)
        return {"model_cfg": dataclasses.asdict(arch), "preprocess_cfg": settings}


def _refuse_extras(vision: ConfigSection, text: ConfigSection) -> None:
    is_timm = bool(vision.values.get("timm_model_name"))
    for name, tower in (("vision_cfg", vision), ("text_cfg", text)):
        known = {*_KNOWN, *(_KNOWN_OF_TIMM[name] if is_timm else ())}
        if isinstance(tower.values.get("layers"), list | tuple):
            raise tower.error("layers", "a number; this is a ResNet, and our model a transformer")
        for key, value in tower.values.items():
            is_epsilon = key == "norm_kwargs" and isinstance(value, dict) and {*value} == {"eps"}
            if value and key not in known and not is_epsilon and _NEUTRAL.get(key) != value:
                raise tower.error(key, "nothing, since our model does not have this")
        pool = tower.values.get("pool_type", _POOLS[name][0])
        if pool not in _POOLS[name] or (pool == "last" and not is_timm):
            raise tower.error("pool_type", repr(_POOLS[name][0]))


def _mlp_width(width: int, tower: ConfigSection) -> int:
    return int(width * tower.number("mlp_ratio", 4.0))


def _mlp_ratio(width: int, mlp_width: int) -> float:
    """Returns a ratio that yields `mlp_width` when open_clip multiplies and truncates."""
    ratio = mlp_width / width
    while int(width * ratio) < mlp_width:
        ratio *= 1 + 1e-12
    return ratio


TRUNK = "visual.trunk."
_BLOCK = BlockNames("norm1", ("attn.qkv.",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


# Fields of `Architecture` that a tower's name determines, which excludes the embedding size.
Tower = Mapping[str, Any]


def _make_towers() -> dict[str, Tower]:
    """Returns the towers by their names in timm."""
    sizes = ("patch_size", "vision_width", "vision_layers", "vision_heads", "vision_mlp_width")
    towers: dict[str, Tower] = {}
    # Image sizes for which timm has exact GELU, and those with tanh GELU.
    for name, values, exact, by_tanh in (
        ("base", (16, 768, 12, 12, None), (224, 256, 384, 512), ()),
        ("base", (32, 768, 12, 12, None), (), (256,)),
        ("large", (16, 1024, 24, 16, None), (256, 384), (512,)),
        ("so400m", (14, 1152, 27, 16, 4304), (224, 378, 384), ()),
        ("so400m", (16, 1152, 27, 16, 4304), (), (256, 384, 512)),
        ("giantopt", (16, 1536, 40, 16, None), (), (256, 384)),
    ):
        for size in (*exact, *by_tanh):
            towers[f"vit_{name}_patch{values[0]}_siglip_{size}"] = {
                **dict(zip(sizes, values, strict=True)),
                "image_size": size,
                "vision_pool_heads": values[3],
                "class_token": False,
                "vision_projection": "none",
                "rotary_grid": None,
                "activation": "gelu_tanh" if size in by_tanh else "gelu",
                "layer_norm_epsilon": 1e-6,
            }
    for name, size, values in (
        ("tiny", 384, (16, 192, 12, 3, None)),
        ("small", 384, (16, 384, 12, 6, None)),
        ("base", 224, (16, 768, 12, 12, None)),
        ("large", 336, (14, 1024, 24, 16, None)),
    ):
        towers[f"vit_pe_core_{name}_patch{values[0]}_{size}"] = {
            **dict(zip(sizes, values, strict=True)),
            "image_size": size,
            "vision_pool_heads": 8,
            "class_token": True,
            "vision_projection": "bias",
            "rotary_grid": size // values[0],
            "activation": "gelu",
            "layer_norm_epsilon": 1e-5,
        }
    return towers


TOWERS = _make_towers()


def find_tower(vision: ConfigSection) -> Tower:
    """Returns the tower for "timm_model_name" in "vision_cfg", which may end with a weights tag.

    Raises:
        ValueError: our image tower does not support this one.
    """
    name = str(vision.values["timm_model_name"])
    found = TOWERS.get(name.partition(".")[0])
    if found is None:
        kind = ", which FastViT is not, with its convolutions" if name.startswith("fastvit") else ""
        raise vision.error(
            "timm_model_name",
            f"an image tower of timm that ours can be{kind}: {', '.join(TOWERS)}",
        )
    return found


def tower_name(arch: Architecture) -> str:
    """Returns timm's name of an architecture's image tower.

    Raises:
        ValueError: timm has no tower of these sizes.
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
    """Returns open_clip's `timm_proj` of a tower, "none" if it has no projection."""
    return "none" if tower["vision_projection"] == "none" else None


def is_timm(arch: Architecture) -> bool:
    """Returns whether open_clip takes the image tower from timm: if it pools by attention."""
    return arch.vision_pool_heads is not None


def layout(arch: Architecture) -> Layout:
    """Returns the layout of a model."""
    pool = f"{TRUNK}attn_pool"
    found = {
        "vision/patch_embedding/kernel": Tensors(
            (f"{TRUNK}patch_embed.proj.weight",), "convolution"
        ),
        "vision/positional_embedding": Tensors((f"{TRUNK}pos_embed",), "row"),
        **norm("vision/post_norm", f"{TRUNK}norm"),
        "vision/pool/probe": Tensors((f"{pool}.latent",), "plane"),
        # The query is separate; keys and values are joined.
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
