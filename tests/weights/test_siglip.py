"""transformers' SiglipModel (SigLIP, SigLIP 2 of fixed resolution) in our towers, and back."""

import numpy as np
import pytest
import torch

from diht_jax import load_model
from diht_jax.export import export_model
from diht_jax.weights import huggingface
from diht_jax.weights.source import read_weights

transformers = pytest.importorskip("transformers")

VISION = {
    "hidden_size": 64,
    "intermediate_size": 148,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 600,
    "max_position_embeddings": 12,
    "projection_size": 64,
}


@pytest.fixture(scope="module")
def siglip(reference, tmp_path_factory):
    """A small SiglipModel, with the shapes of SigLIP 2's giant, and its folder."""
    torch.manual_seed(0)
    config = transformers.SiglipConfig(vision_config=VISION, text_config=TEXT)
    model = reference.randomize(transformers.SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(np.log(20.0))
        model.logit_bias.fill_(-7.5)
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def inputs():
    """uint8 images, and tokens whose last one is not the largest."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 24, 24, 3)).astype(np.uint8)
    return images, rng.integers(1, 600, (5, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def outputs(siglip, reference, inputs):
    """What transformers computes."""
    images, tokens = inputs
    with torch.no_grad():
        return siglip[0](
            # The folder has no image processor's file.
            pixel_values=reference.pixel_values(images, 0.5, 0.5),
            input_ids=torch.from_numpy(tokens).long(),
        )


def test_embeddings_and_logits_are_those_of_transformers(siglip, inputs, outputs):
    model = load_model(siglip[1])
    image_emb, text_emb = model.encode_image(inputs[0]), model.encode_text(inputs[1])
    np.testing.assert_allclose(image_emb, outputs.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(text_emb, outputs.text_embeds.numpy(), atol=1e-5)
    logits = model.logit_scale * image_emb @ text_emb.T + model.logit_bias
    np.testing.assert_allclose(logits, outputs.logits_per_image.numpy(), atol=1e-5)
    assert np.ptp(logits) > 1e-2


def test_export_gives_the_model_back_bit_for_bit(siglip, tmp_path):
    export_model(str(siglip[1]), "huggingface", str(tmp_path / "out"))
    back = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(back) is transformers.SiglipModel
    for tower in ("text_config", "vision_config"):
        found, wanted = (getattr(c, tower).to_dict() for c in (back.config, siglip[0].config))
        assert {**found, "dtype": None} == {**wanted, "dtype": None}
    expected = siglip[0].state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, value in back.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), expected[name].numpy(), err_msg=name)


def test_defaults_are_those_of_transformers():
    arch = huggingface.read_architecture({"model_type": "siglip"}, "config.json")
    written = transformers.SiglipConfig().to_dict()
    assert arch == huggingface.read_architecture(written, "config.json")


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
