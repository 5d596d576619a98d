"""transformers' CLIPModel, MetaClip2Model and SiglipModel in our towers, and exported again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from diht_jax import load_model
from diht_jax.export import export_model
from diht_jax.weights import huggingface
from diht_jax.weights.source import read_weights
from tests.weights import conftest as reference

transformers = pytest.importorskip("transformers")


def clip_model(arch, **text):
    config = huggingface.make_config(arch, "float32")
    config["text_config"] |= text
    torch.manual_seed(0)
    return reference.randomize(transformers.CLIPModel(transformers.CLIPConfig(**config)))


def embeddings(model, pixels, tokens):
    with torch.no_grad():
        out = model(pixel_values=pixels, input_ids=torch.from_numpy(tokens).long())
    return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


def check(folder, other, images, tokens):
    model = load_model(folder)
    expected = embeddings(other, reference.pixel_values(images), tokens)
    reference.check_outputs(model, images, tokens, expected)
    assert model.logit_scale == pytest.approx(other.logit_scale.exp().item(), rel=1e-6)


def test_saved_model(tmp_path):
    arch = dataclasses.replace(
        reference.SMALL,
        activation="quick_gelu",
        vision_heads=4,
        text_heads=2,
        layer_norm_epsilon=1e-3,
        text_mlp_width=100,
    )
    other = clip_model(arch)
    other.save_pretrained(tmp_path)
    assert read_weights(tmp_path).arch == arch
    check(tmp_path, other, *reference.inputs(arch))


def test_sharded_model(tmp_path):
    other = clip_model(reference.SMALL)
    other.save_pretrained(tmp_path / "whole")
    other.save_pretrained(tmp_path / "parts", max_shard_size="1MB")
    shards = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(shards) > 1
    whole, parts = (read_weights(tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    shards[1].unlink()
    with pytest.raises(ValueError, match="shard 'model-00002-of-.*' is missing"):
        load_model(tmp_path / "parts")


def test_legacy_end_of_text_is_the_largest_id(tmp_path):
    other = clip_model(reference.SMALL, eos_token_id=2)
    other.save_pretrained(tmp_path)
    images, tokens = reference.inputs(reference.SMALL)
    tokens[:, 1] = 2  # would be mistaken for the end of text
    assert read_weights(tmp_path).arch.end_of_text_id is None
    check(tmp_path, other, images, tokens)


def test_texts_of_another_vocabulary_than_clips_end_at_their_largest_id(tmp_path):
    other = clip_model(reference.SMALL)  # with a config that our exports write
    other.save_pretrained(tmp_path)
    images, tokens = reference.inputs(reference.SMALL)
    tokens = np.where(tokens == reference.SMALL.vocab_size - 1, 550, np.minimum(tokens, 500))
    check(tmp_path, other, images, tokens)


def test_end_of_text_below_added_tokens(tmp_path):
    arch = dataclasses.replace(reference.SMALL, vocab_size=600, end_of_text_id=511)
    other = clip_model(arch)
    other.save_pretrained(tmp_path)
    assert read_weights(tmp_path).arch == arch
    images, _ = reference.inputs(arch)
    tokens = np.random.default_rng(0).integers(1, 500, (5, 12)).astype(np.int32)
    tokens[np.arange(5), [3, 5, 8, 11, 4]] = 511
    tokens[:, 2] = 599  # an added token with a larger id than the end of text
    tokens[0, 6] = 511  # only the first end of text counts
    check(tmp_path, other, images, tokens)


def test_metaclip_2_pools_at_the_first_end_and_is_exported_as_it_came(tmp_path):
    arch = dataclasses.replace(reference.SMALL, vocab_size=600, end_of_text_id=2)
    config = transformers.MetaClip2Config(**huggingface.make_config(arch, "float32"))
    torch.manual_seed(0)
    other = reference.randomize(transformers.MetaClip2Model(config))
    other.save_pretrained(tmp_path / "theirs")
    images, _ = reference.inputs(arch)
    # XLM-V's ids: 0 starts a text, 2 ends it, 1 pads.
    tokens = np.random.default_rng(0).integers(3, 600, (5, 12)).astype(np.int32)
    tokens[:, 0] = 0
    for row, end in enumerate([3, 5, 8, 11, 4]):
        tokens[row, end], tokens[row, end + 1 :] = 2, 1
    assert read_weights(tmp_path / "theirs").arch == arch
    check(tmp_path / "theirs", other, images, tokens)
    export_model(str(tmp_path / "theirs"), "huggingface", str(tmp_path / "ours"))
    back = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert type(back) is transformers.MetaClip2Model
    pixels = reference.pixel_values(images)
    for ours, theirs in zip(*(embeddings(m, pixels, tokens) for m in (back, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_old_directory_with_a_torch_file_and_index_buffers(tmp_path):
    """As `openai/clip-vit-base-patch32`: pytorch_model.bin, position_ids, *_config_dict."""
    other = clip_model(reference.SMALL)
    other.save_pretrained(tmp_path / "new")
    state = other.state_dict()
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = other.config.to_dict()
    old = {
        "model_type": "clip",
        "projection_dim": 48,
        "text_config": {"eos_token_id": 2},
        "text_config_dict": {k: v for k, v in config["text_config"].items() if k != "eos_token_id"},
        "vision_config": {},
        "vision_config_dict": config["vision_config"],
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    new, found = read_weights(tmp_path / "new"), read_weights(tmp_path)
    assert new.arch == found.arch == reference.SMALL
    jax.tree.map(np.testing.assert_array_equal, found.params, new.params)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_defaults_are_those_of_transformers(kind):
    arch = huggingface.read_architecture({"model_type": kind}, "config.json")
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    assert arch == huggingface.read_architecture(theirs, "config.json")
    assert (arch.activation, arch.vision_width) == (
        ("quick_gelu", 768) if kind == "clip" else ("gelu_tanh", 768)
    )


def test_settings_that_our_model_lacks_are_refused():
    for changed, message in (
        ({"model_type": "blip"}, "expected model_type 'clip'.*got 'blip'"),
        ({"vision_config": {"num_channels": 1}}, "1 image channels"),
    ):
        with pytest.raises(ValueError, match=message):
            huggingface.read_architecture({"model_type": "clip", **changed}, "config.json")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A SiglipModel, and its folder."""
    model, folder = reference.siglip_model(), tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    return model, folder


def test_embeddings_and_logits_are_those_of_transformers(siglip):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 24, 24, 3)).astype(np.uint8)
    tokens = rng.integers(1, 600, (5, 16)).astype(np.int32)  # the last token is not the largest
    # The folder has no image processor's file, so the defaults apply.
    pixels = reference.pixel_values(images, 0.5, 0.5)
    expected = embeddings(siglip[0], pixels, tokens)
    reference.check_outputs(load_model(siglip[1]), images, tokens, expected)


def test_export_gives_the_model_back_bit_for_bit_by_the_code_of_its_card(siglip, tmp_path):
    export_model(str(siglip[1]), "huggingface", str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("processor =")[0]
    names = {}
    exec(code.replace("DIRECTORY", str(tmp_path / "out")), names)
    back = names["model"]
    assert type(back) is transformers.SiglipModel
    for tower in ("text_config", "vision_config"):
        found, wanted = (getattr(c, tower).to_dict() for c in (back.config, siglip[0].config))
        assert {**found, "dtype": None} == {**wanted, "dtype": None}
    expected = siglip[0].state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, value in back.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), expected[name].numpy(), err_msg=name)


def test_naflex_is_refused(siglip, tmp_path):
    transformers.Siglip2Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(siglip[1] / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: .*NaFlex.*fixed resolution"):
        load_model(tmp_path)


def test_a_format_without_a_place_for_it_is_refused(siglip, tmp_path):
    with pytest.raises(ValueError, match="format 'clip'.*24 px"):
        export_model(str(siglip[1]), "clip", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_positions_of_patches_are_resized_without_a_class_token(siglip):
    read = read_weights(siglip[1], image_size=32)
    table = siglip[0].vision_model.embeddings.position_embedding.weight.detach()
    grid = table.reshape(1, 3, 3, 64).permute(0, 3, 1, 2)
    resize = torch.nn.functional.interpolate
    expected = resize(grid, (4, 4), mode="bicubic", antialias=True, align_corners=False)
    expected = expected.permute(0, 2, 3, 1).reshape(16, 64).numpy()
    found = read.params["vision"]["positional_embedding"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
