"""Directories of transformers' CLIPModel and MetaClip2Model give these models' embeddings."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from diht_jax import load_model
from diht_jax.export import export_model
from diht_jax.weights import huggingface
from diht_jax.weights.source import read_weights

transformers = pytest.importorskip("transformers")


def clip_model(reference, arch, **text):
    config = huggingface.make_config(arch, "float32")
    config["text_config"] |= text
    torch.manual_seed(0)
    return reference.randomize(transformers.CLIPModel(transformers.CLIPConfig(**config)))


def embeddings(model, pixels, tokens):
    with torch.no_grad():
        out = model(pixel_values=pixels, input_ids=torch.from_numpy(tokens).long())
    return out.image_embeds.numpy(), out.text_embeds.numpy()


def check(reference, folder, other, arch, images, tokens):
    model = load_model(folder)
    expected = embeddings(other, reference.pixel_values(images), tokens)
    np.testing.assert_allclose(model.encode_image(images), expected[0], atol=1e-5)
    np.testing.assert_allclose(model.encode_text(tokens), expected[1], atol=1e-5)
    assert np.abs(expected[0][0] - expected[0][1]).max() > 1e-3
    assert np.abs(expected[1][0] - expected[1][1]).max() > 1e-3
    assert model.logit_scale == pytest.approx(other.logit_scale.exp().item(), rel=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_saved_model(reference, tmp_path, activation):
    arch = dataclasses.replace(
        reference.SMALL,
        activation=activation,
        vision_heads=4,
        text_heads=2,
        layer_norm_epsilon=1e-3,
        text_mlp_width=100,
    )
    other = clip_model(reference, arch)
    other.save_pretrained(tmp_path)
    assert read_weights(tmp_path).arch == arch
    check(reference, tmp_path, other, arch, *reference.inputs(arch))


def test_sharded_model(reference, tmp_path):
    other = clip_model(reference, reference.SMALL)
    other.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    images, tokens = reference.inputs(reference.SMALL)
    check(reference, tmp_path, other, reference.SMALL, images, tokens)
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="shard 'model-00002-of-.*' is missing"):
        load_model(tmp_path)


def test_legacy_end_of_text_is_the_largest_id(reference, tmp_path):
    other = clip_model(reference, reference.SMALL, eos_token_id=2)
    other.save_pretrained(tmp_path)
    images, tokens = reference.inputs(reference.SMALL)
    tokens[:, 1] = 2  # would be taken for the end of text
    assert read_weights(tmp_path).arch.end_of_text_id is None
    check(reference, tmp_path, other, reference.SMALL, images, tokens)


def test_end_of_text_below_added_tokens(reference, tmp_path):
    arch = dataclasses.replace(reference.SMALL, vocab_size=600, end_of_text_id=511)
    other = clip_model(reference, arch)
    other.save_pretrained(tmp_path)
    assert read_weights(tmp_path).arch == arch
    images, _ = reference.inputs(arch)
    tokens = np.random.default_rng(0).integers(1, 500, (5, 12)).astype(np.int32)
    tokens[np.arange(5), [3, 5, 8, 11, 4]] = 511
    tokens[:, 2] = 599  # an added token, larger than the end of text
    tokens[0, 6] = 511  # only the first one counts
    check(reference, tmp_path, other, arch, images, tokens)


def test_metaclip_2_pools_at_the_first_end_and_is_exported_as_it_came(reference, tmp_path):
    arch = dataclasses.replace(reference.SMALL, vocab_size=600, end_of_text_id=2)
    config = transformers.MetaClip2Config(**huggingface.make_config(arch, "float32"))
    torch.manual_seed(0)
    other = reference.randomize(transformers.MetaClip2Model(config))
    other.save_pretrained(tmp_path / "theirs")
    images, _ = reference.inputs(arch)
    # Of XLM-V: 0 begins a text, 2 ends it, 1 pads.
    tokens = np.random.default_rng(0).integers(3, 600, (5, 12)).astype(np.int32)
    tokens[:, 0] = 0
    for row, end in enumerate([3, 5, 8, 11, 4]):
        tokens[row, end], tokens[row, end + 1 :] = 2, 1
    assert read_weights(tmp_path / "theirs").arch == arch
    check(reference, tmp_path / "theirs", other, arch, images, tokens)
    export_model(str(tmp_path / "theirs"), "huggingface", str(tmp_path / "ours"))
    back = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert type(back) is transformers.MetaClip2Model
    pixels = reference.pixel_values(images)
    for ours, theirs in zip(*(embeddings(m, pixels, tokens) for m in (back, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_old_directory_with_a_torch_file_and_index_buffers(reference, tmp_path):
    """As `openai/clip-vit-base-patch32` is: pytorch_model.bin, position_ids, *_config_dict."""
    other = clip_model(reference, reference.SMALL)
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
    images, tokens = reference.inputs(reference.SMALL)
    check(reference, tmp_path, other, reference.SMALL, images, tokens)


def test_defaults_are_those_of_transformers():
    arch = huggingface.read_architecture({"model_type": "clip"}, "config.json")
    assert arch == huggingface.read_architecture(transformers.CLIPConfig().to_dict(), "config.json")
    assert arch.activation == "quick_gelu" and arch.vision_width == 768


def test_settings_that_our_model_lacks_are_refused():
    for changed, message in (
        ({"model_type": "blip"}, "expected model_type 'clip'.*got 'blip'"),
        ({"vision_config": {"num_channels": 1}}, "1 image channels"),
    ):
        with pytest.raises(ValueError, match=message):
            huggingface.read_architecture({"model_type": "clip", **changed}, "config.json")
