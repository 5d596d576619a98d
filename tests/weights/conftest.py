"""Small CLIPs of other libraries with random weights in every parameter, and their inputs."""

import functools

import jax
import numpy as np
import pytest

from diht_jax.weights import open_clip_layout as configs
from diht_jax.weights.settings import Preprocessing
from tests import make

# From CLIP's released code (paper: arXiv 2103.00020).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])

SMALL = make.small_architecture(
    image_size=32,
    vision_layers=2,
    vision_width=128,
    vision_heads=2,
    text_layers=3,
    embed_dim=48,
    vocab_size=600,
)


def open_clip_config(arch):
    """Returns a config from which open_clip's own code builds a model."""
    return configs.make_config(arch, Preprocessing())["model_cfg"]


def randomize(model, seed=0):
    """Moves every parameter off its initial value: zeros and ones would hide swapped parameters."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.1 if parameter.ndim <= 1 else 0.02)
    return model.eval()


@functools.cache
def open_clip_model(arch):
    """Returns a shared model, which must not be changed."""
    import torch

    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    return randomize(open_clip.model.CLIP(**open_clip_config(arch)))


def siglip_model(layers=2):
    """Returns transformers' SiglipModel, small, in the proportions of SigLIP 2's giant."""
    import torch

    transformers = pytest.importorskip("transformers")
    towers = {"num_hidden_layers": layers}
    vision = {"hidden_size": 64, "intermediate_size": 148, "num_attention_heads": 4}
    vision |= {"image_size": 24, "patch_size": 8}
    text = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 2}
    text |= {"vocab_size": 600, "max_position_embeddings": 16, "projection_size": 64}
    torch.manual_seed(0)
    config = transformers.SiglipConfig(vision_config=vision | towers, text_config=text | towers)
    model = randomize(transformers.SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(np.log(20.0))
        model.logit_bias.fill_(-7.5)
    return model


def inputs(arch, count=5):
    """uint8 images; int32 tokens whose largest id, the end of text, varies in position."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, arch.image_size, arch.image_size, 3)).astype(np.uint8)
    t, end = arch.context_length, arch.vocab_size - 1
    tokens = rng.integers(1, end - 1, (count, t)).astype(np.int32)
    for row, length in enumerate(rng.integers(2, t, count)):
        tokens[row, length] = end
        tokens[row, length + 1 :] = 0
    return images, tokens


def pixel_values(images, mean=MEAN, std=STD):
    """Returns float32 [b, 3, h, w], normalised in float64."""
    import torch

    values = (images.astype(np.float64) / 255 - mean) / std
    return torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32).copy())


def open_clip_embeddings(model, images, tokens):
    import torch

    with torch.no_grad():
        return (
            model.encode_image(pixel_values(images), normalize=True).numpy(),
            model.encode_text(torch.from_numpy(tokens), normalize=True).numpy(),
        )


def open_clip_outputs(model, images, tokens):
    """Returns the embeddings and open_clip's own logits."""
    import torch

    with torch.no_grad():
        logits = model.get_logits(pixel_values(images), torch.from_numpy(tokens))[0]
    return *open_clip_embeddings(model, images, tokens), logits.numpy()


def check_outputs(model, images, tokens, expected):
    """Checks that a loaded model gives another library's embeddings and logits."""
    image_emb, text_emb = model.encode_image(images), model.encode_text(tokens)
    np.testing.assert_allclose(image_emb, expected[0], atol=1e-5)
    np.testing.assert_allclose(text_emb, expected[1], atol=1e-5)
    logits = model.logit_scale * image_emb @ text_emb.T + model.logit_bias
    np.testing.assert_allclose(logits, expected[2], rtol=0, atol=1e-5)
    # The embeddings of two inputs differ by far more than the tolerance.
    assert np.abs(expected[0][0] - expected[0][1]).max() > 1e-3
    assert np.abs(expected[1][0] - expected[1][1]).max() > 1e-3


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs models on one device; tests/weights/test_inference.py compares with eight."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
