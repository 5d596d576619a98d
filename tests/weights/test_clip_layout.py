"""State dicts in CLIP's layout give the embeddings of the model that they come from."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from diht_jax import load_model
from diht_jax.weights import clip_layout
from diht_jax.weights.source import read_weights


def check_same_embeddings(model, images, tokens, expected):
    image_emb, text_emb = model.encode_image(images), model.encode_text(tokens)
    np.testing.assert_allclose(image_emb, expected[0], atol=1e-5)
    np.testing.assert_allclose(text_emb, expected[1], atol=1e-5)
    logits = model.logit_scale * image_emb @ text_emb.T + model.logit_bias
    np.testing.assert_allclose(logits, expected[2], rtol=0, atol=1e-5)
    # An image of its own is nearer than any other by far more than the tolerance.
    assert np.abs(expected[0][0] - expected[0][1]).max() > 1e-3
    assert np.abs(expected[1][0] - expected[1][1]).max() > 1e-3


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_tanh"])
def test_open_clip_state_dict_and_config(reference, tmp_path, activation):
    arch = dataclasses.replace(reference.SMALL, activation=activation)
    other = reference.open_clip_model(arch)
    torch.save(other.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": reference.open_clip_config(arch), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = load_model(tmp_path)
    assert model.config.model.overrides.activation == (None if activation == "gelu" else activation)
    inputs = reference.inputs(arch)
    check_same_embeddings(model, *inputs, reference.open_clip_outputs(other, *inputs))
    assert model.logit_scale == pytest.approx(other.logit_scale.exp().item(), rel=1e-6)


def test_heads_mlp_widths_and_epsilon_of_a_config(reference, tmp_path):
    arch = dataclasses.replace(
        reference.SMALL, vision_heads=4, vision_mlp_width=300, layer_norm_epsilon=1e-3
    )
    other, config = reference.open_clip_model(arch), reference.open_clip_config(arch)
    assert other.transformer.resblocks[0].ln_1.eps == other.visual.ln_post.eps == 1e-3
    torch.save(other.state_dict(), tmp_path / "model.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    assert read_weights(tmp_path).arch == arch
    inputs = reference.inputs(arch)
    check_same_embeddings(
        load_model(tmp_path), *inputs, reference.open_clip_outputs(other, *inputs)
    )


def test_metaclip_2_of_open_clip_pools_at_the_first_end_of_text(reference, tmp_path):
    arch = dataclasses.replace(
        reference.SMALL, activation="quick_gelu", vocab_size=600, end_of_text_id=2
    )
    config = reference.open_clip_config(arch)
    other = reference.open_clip_model(arch)
    torch.save(other.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config["text_cfg"] |= {"hf_tokenizer_name": "facebook/xlm-v-base"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    assert read_weights(tmp_path).arch == arch
    tokens = np.random.default_rng(0).integers(3, 600, (5, 12)).astype(np.int32)
    for row, end in enumerate([3, 5, 8, 11, 4]):
        tokens[row, end], tokens[row, end + 1 :] = 2, 1
    images, _ = reference.inputs(arch)
    expected = reference.open_clip_outputs(other, images, tokens)
    check_same_embeddings(load_model(tmp_path), images, tokens, expected)


def test_names_are_those_of_open_clip_and_shapes_those_of_our_model(reference):
    arch = reference.SMALL
    state = reference.open_clip_model(arch).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert clip_layout.expected_shapes(arch) == shapes
    tensors = {name: value.numpy() for name, value in state.items()}
    assert clip_layout.infer_architecture(tensors, "file") == arch
    params = clip_layout.from_clip(tensors, arch)
    back = clip_layout.to_clip(params, arch)
    assert back.keys() == tensors.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, tensors[name])


def test_custom_text_prefix_and_data_parallel_prefix_and_training_checkpoint(reference, tmp_path):
    state = reference.open_clip_model(reference.SMALL).state_dict()
    torch.save(state, tmp_path / "plain.pt")
    text = ("positional_embedding", "token_embedding", "transformer", "ln_final", "text_projection")
    renamed = {f"module.{'text.' * n.startswith(text)}{n}": v for n, v in state.items()}
    checkpoint = {"epoch": 3, "name": "run", "state_dict": renamed, "optimizer": {"state": {}}}
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    plain, wrapped = (read_weights(tmp_path / name) for name in ("plain.pt", "epoch_3.pt"))
    for (_, a), (_, b) in zip(_leaves(plain.params), _leaves(wrapped.params), strict=True):
        np.testing.assert_array_equal(a, b)


def _leaves(params):
    import jax

    return jax.tree_util.tree_leaves_with_path(params)


def test_wrong_parameters_are_listed(reference, tmp_path):
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


def test_image_positions_are_resized_on_request_as_open_clip_does(reference, tmp_path):
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
    # torch's bicubic kernel differs from ours in the last digits of a weight.
    np.testing.assert_allclose(model.encode_image(images), expected[0], atol=1e-4)
    with pytest.raises(ValueError, match="no multiple of patch_size"):
        load_model(tmp_path / "a.pt", image_size=50)


def test_preprocessing_of_a_config_is_kept_or_refused(reference, tmp_path):
    other = reference.open_clip_model(reference.SMALL)
    torch.save(other.state_dict(), tmp_path / "model.pt")
    config = {
        "model_cfg": reference.open_clip_config(reference.SMALL),
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]},
    }
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(config))
    images, _ = reference.inputs(reference.SMALL)
    with torch.no_grad():
        pixels = reference.pixel_values(
            images, np.array([0.5, 0.4, 0.3]), np.array([0.5, 0.6, 0.7])
        )
        expected = other.encode_image(pixels, normalize=True).numpy()
    np.testing.assert_allclose(load_model(tmp_path).encode_image(images), expected, atol=1e-5)
    config["preprocess_cfg"]["resize_mode"] = "longest"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"open_clip_config\.json: preprocess_cfg\.resize_mode"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("vision_cfg", "ls_init_value", 0.1),
        ("vision_cfg", "layers", [3, 4, 6, 3]),
        ("text_cfg", "pool_type", "last"),
    ],
)
def test_settings_that_our_model_lacks_are_refused(reference, tmp_path, section, field, value):
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    config = reference.open_clip_config(reference.SMALL)
    config[section][field] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(ValueError, match=rf"open_clip_config.json: {section}"):
        load_model(tmp_path)
