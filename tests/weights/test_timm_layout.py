"""open_clip's SigLIP, SigLIP 2 and PE-Core with timm's image towers, imported and exported."""

import json

import numpy as np
import pytest
import torch

from diht_jax import load_model
from diht_jax.export import export_model
from diht_jax.weights import open_clip_layout
from diht_jax.weights.settings import Preprocessing
from diht_jax.weights.source import read_weights
from tests.weights import conftest as reference

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

SMALL = "vit_test_patch8_siglip_24"
PE_CORE = "vit_test_pe_core_patch16_64"
LIKE = ("vit_base_patch16_siglip_224", "vit_pe_core_tiny_patch16_384")
TEXT = {"context_length": 12, "vocab_size": 600, "width": 48, "heads": 2, "layers": 2}
SIGLIP_TEXT = {
    **TEXT,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
CONFIGS = {
    "SigLIP": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "vision_cfg": {"image_size": 24, "timm_model_name": SMALL, "timm_proj": "none"},
        "text_cfg": SIGLIP_TEXT,
    },
    "SigLIP 2": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "vision_cfg": {"image_size": 24, "timm_model_name": SMALL, "timm_proj": "none"},
        "text_cfg": {**SIGLIP_TEXT, "act_kwargs": {"approximate": "tanh"}},
    },
    "PE-Core": {
        "embed_dim": 40,
        "vision_cfg": {"image_size": 64, "timm_model_name": PE_CORE, "timm_proj": None},
        "text_cfg": TEXT,
    },
}
for _config in CONFIGS.values():
    _config["vision_cfg"] |= {"timm_pool": "map", "timm_model_pretrained": False}


@timm.models.register_model
def vit_test_patch8_siglip_24(pretrained=False, **settings):
    """timm's SigLIP in a smaller size."""
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2.5}
    return timm.models.vit_base_patch16_siglip_224(img_size=24, **sizes, **settings)


@timm.models.register_model
def vit_test_pe_core_patch16_64(pretrained=False, **settings):
    """timm's PE-Core in a smaller size, with rotary positions of its 24 x 24 patches."""
    return timm.models.vit_pe_core_tiny_patch16_384(img_size=64, depth=2, **settings)


def small_towers():
    """Returns entries for both in the form of our table."""
    siglip, pe_core = (open_clip_layout.TOWERS[name] for name in LIKE)
    sizes = {"image_size": 24, "patch_size": 8, "vision_width": 64, "vision_layers": 2}
    sizes |= {"vision_heads": 4, "vision_pool_heads": 4, "vision_mlp_width": 160}
    return {
        SMALL: {**siglip, **sizes},
        PE_CORE: {**pe_core, "image_size": 64, "vision_layers": 2},
    }


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    """An open_clip model with random weights, and its folder in the layout of open_clip's hub."""
    config = CONFIGS[request.param]
    torch.manual_seed(0)
    other = reference.randomize(open_clip.model.CustomTextCLIP(**config))
    folder = tmp_path_factory.mktemp("open_clip")
    torch.save(other.state_dict(), folder / "open_clip_pytorch_model.bin")
    content = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        for name, tower in small_towers().items():
            patch.setitem(open_clip_layout.TOWERS, name, tower)
        yield other, folder


def inputs(side):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, side, side, 3)).astype(np.uint8)
    return images, rng.integers(1, 600, (3, 12)).astype(np.int32)


def test_embeddings_and_logits_are_those_of_open_clip(model):
    other, folder = model
    ours = load_model(folder)
    images, tokens = inputs(ours.image_size)
    expected = reference.open_clip_outputs(other, images, tokens)
    reference.check_outputs(ours, images, tokens, expected)


@pytest.mark.parametrize("model", ["PE-Core"], indirect=True)
def test_the_first_numbers_of_embeddings_whose_projection_has_a_bias(model):
    whole, part = (load_model(model[1], dim=dim) for dim in (None, 24))
    images, _ = inputs(whole.image_size)
    expected = whole.encode_image(images)[:, :24]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(part.encode_image(images), expected, atol=1e-6)


def test_export_gives_the_model_back_bit_for_bit(model, tmp_path):
    other, folder = model
    export_model(str(folder), "open_clip", str(tmp_path / "out"))
    back = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    expected = other.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, value in back.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), expected[name].numpy(), err_msg=name)
    assert read_weights(tmp_path / "out").arch == read_weights(folder).arch


@pytest.mark.parametrize("name", open_clip_layout.TOWERS)
def test_the_sizes_of_a_tower_are_those_of_timm(name):
    fields = open_clip_layout.TOWERS[name]
    with torch.device("meta"):
        num_classes = 0 if fields["vision_projection"] == "none" else 40
        tower = timm.create_model(name, num_classes=num_classes)
    block = tower.blocks[0]
    assert tower.patch_embed.img_size == (fields["image_size"],) * 2
    assert tower.patch_embed.patch_size == (fields["patch_size"],) * 2
    assert (tower.embed_dim, len(tower.blocks)) == (fields["vision_width"], fields["vision_layers"])
    assert block.attn.num_heads == fields["vision_heads"]
    assert tower.attn_pool.num_heads == fields["vision_pool_heads"]
    assert block.mlp.fc1.out_features == fields["vision_mlp_width"] or 4 * fields["vision_width"]
    assert tower.norm.eps == fields["layer_norm_epsilon"]
    with torch.device("cpu"):
        values = torch.linspace(-4, 4, 9)
    kind = "tanh" if fields["activation"] == "gelu_tanh" else "none"
    expected = torch.nn.functional.gelu(values, approximate=kind)
    assert torch.equal(block.mlp.act(values), expected)
    if fields["rotary_grid"]:
        assert tower.rope.ref_feat_shape == (fields["rotary_grid"],) * 2


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP2", "ViT-L-16-SigLIP-384", "PE-Core-L-14-336"])
def test_published_configs_are_read_and_written(name):
    config = open_clip.get_model_config(name)
    arch = open_clip_layout.read_architecture(config, name)
    again = open_clip_layout.make_config(arch, Preprocessing())["model_cfg"]
    assert open_clip_layout.read_architecture(again, name) == arch
    assert again["vision_cfg"]["timm_model_name"] == config["vision_cfg"]["timm_model_name"]


def test_fastvit_is_refused():
    config = open_clip.get_model_config("MobileCLIP2-S2")
    with pytest.raises(ValueError, match=r"MobileCLIP2-S2: .*timm_model_name .*FastViT"):
        open_clip_layout.read_architecture(config, "MobileCLIP2-S2")
