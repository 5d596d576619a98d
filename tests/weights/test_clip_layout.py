"""State dicts in CLIP's layout give the embeddings of their original model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from diht_jax import load_model
from diht_jax.weights import open_clip_layout
from diht_jax.weights.settings import Preprocessing
from diht_jax.weights.source import read_weights
from tests.weights import conftest as reference


@pytest.mark.parametrize(
    ("activation", "others"),
    [
        ("quick_gelu", {}),
        ("gelu_tanh", {"vision_heads": 4, "vision_mlp_width": 300, "layer_norm_epsilon": 1e-3}),
    ],
)
def test_open_clip_state_dict_and_config(tmp_path, activation, others):
    arch = dataclasses.replace(reference.SMALL, activation=activation, **others)
    other = reference.open_clip_model(arch)
    assert other.transformer.resblocks[0].ln_1.eps == other.visual.ln_post.eps
    assert other.visual.ln_post.eps == arch.layer_norm_epsilon
    torch.save(other.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": reference.open_clip_config(arch), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path).arch == arch
    model, inputs = load_model(tmp_path), reference.inputs(arch)
    reference.check_outputs(model, *inputs, reference.open_clip_outputs(other, *inputs))
    assert model.logit_scale == pytest.approx(other.logit_scale.exp().item(), rel=1e-6)


def test_custom_text_prefix_and_data_parallel_prefix_and_training_checkpoint(tmp_path):
    state = reference.open_clip_model(reference.SMALL).state_dict()
    torch.save(state, tmp_path / "plain.pt")
    text = ("positional_embedding", "token_embedding", "transformer", "ln_final", "text_projection")
    renamed = {f"module.{'text.' * n.startswith(text)}{n}": v for n, v in state.items()}
    checkpoint = {"epoch": 3, "name": "run", "state_dict": renamed, "optimizer": {"state": {}}}
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    plain, wrapped = (read_weights(tmp_path / name) for name in ("plain.pt", "epoch_3.pt"))
    assert plain.arch == wrapped.arch == reference.SMALL
    jax.tree.map(np.testing.assert_array_equal, plain.params, wrapped.params)


def test_wrong_parameters_are_listed(tmp_path):
    state = dict(reference.open_clip_model(reference.SMALL).state_dict())
    del state["visual.ln_pre.bias"]
    del state["transformer.resblocks.1.ln_2.weight"]
    state["logit_bias"] = torch.zeros(())
    state["visual.proj2"] = torch.zeros(3)
    state["text_projection"] = state["text_projection"][:, :40]
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(ValueError) as error:
        load_model(tmp_path / "wrong.pt")
    message = str(error.value)
    assert "2 missing: transformer.resblocks.1.ln_2.weight, visual.ln_pre.bias" in message
    assert "2 unknown: logit_bias, visual.proj2" in message
    assert "1 of another shape: text_projection [64, 40] (expected [64, 48])" in message
    assert "wrong.pt" in message


def test_image_positions_are_resized_on_request_as_open_clip_does(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    other = reference.open_clip_model(reference.SMALL)
    torch.save(other.state_dict(), tmp_path / "a.pt")
    bigger = dataclasses.replace(reference.SMALL, image_size=48)
    resized = open_clip.model.CLIP(**reference.open_clip_config(bigger)).eval()
    open_clip.factory.load_checkpoint(resized, str(tmp_path / "a.pt"))
    model = load_model(tmp_path / "a.pt", image_size=48)
    assert model.image_size == 48 == model.config.model.overrides.image_size
    images, tokens = reference.inputs(bigger)
    expected = reference.open_clip_embeddings(resized, images, tokens)
    # torch's bicubic kernel differs from ours in the last digits of its weights.
    np.testing.assert_allclose(model.encode_image(images), expected[0], atol=1e-4)
    with pytest.raises(ValueError, match="no multiple of patch_size"):
        load_model(tmp_path / "a.pt", image_size=50)


def test_texts_that_end_at_the_first_entry_of_the_vocabulary_come_back():
    arch = dataclasses.replace(reference.SMALL, end_of_text_id=0)
    config = open_clip_layout.make_config(arch, Preprocessing())
    assert open_clip_layout.read_architecture(config["model_cfg"], "made") == arch


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("vision_cfg", "ls_init_value", 0.1),
        ("vision_cfg", "layers", [3, 4, 6, 3]),
        ("text_cfg", "pool_type", "last"),
        ("preprocess_cfg", "resize_mode", "longest"),
    ],
)
def test_settings_that_our_model_lacks_are_refused(tmp_path, section, field, value):
    torch.save(reference.open_clip_model(reference.SMALL).state_dict(), tmp_path / "model.pt")
    model = reference.open_clip_config(reference.SMALL)
    config = {"model_cfg": model, "preprocess_cfg": {}}
    (config if section in config else model)[section][field] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"open_clip_config.json: {section}"):
        load_model(tmp_path)
