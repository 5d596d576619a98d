"""Models of released size, random weights, float32: the embeddings of open_clip to 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diht_jax.models.parameters import ModelDefinition, merge_model
from diht_jax.models.transformer import Execution
from diht_jax.models.zoo import ARCHITECTURES
from diht_jax.weights import clip_layout, open_clip_layout

open_clip = pytest.importorskip("open_clip")


def random_model(name):
    """open_clip's model `name` with every parameter drawn anew."""
    # On the meta device, and filled in place: torch's own initialisation takes seconds.
    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config(name))
    model = model.to_empty(device="cpu").eval()
    t = model.context_length
    model.attn_mask.copy_(torch.full((t, t), -torch.inf).triu(1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            bound = 0.035 if parameter.ndim > 1 else 0.2
            center = float(".ln_" in f".{key}" and key.endswith("weight"))
            parameter.uniform_(center - bound, center + bound, generator=generator)
        model.logit_scale.fill_(3.0)
    return model


def check(reference, model, name, arch, images, tokens):
    """Converts the model's state dict and compares the embeddings."""
    expected = reference.open_clip_embeddings(model, images, tokens)
    # The config names what shapes do not show.
    config = open_clip.get_model_config(name)
    assert open_clip_layout.read_architecture(config, name) == arch
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    params = clip_layout.from_clip(tensors, arch)
    definition = ModelDefinition(arch, jnp.float32, jnp.float32, Execution(scan_layers=True))

    @jax.jit
    def embed(params, pixels, tokens):
        model = merge_model(definition, params)
        return model.encode_image(pixels), model.encode_text(tokens)

    pixels = reference.pixel_values(images).numpy().transpose(0, 2, 3, 1)
    found = embed(params, pixels, tokens)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert np.abs(theirs).min() < 0.01 < np.abs(theirs).max()


def test_vit_b_32(reference):
    arch = ARCHITECTURES["diht_vitb32_224px"]
    images, tokens = reference.inputs(arch, count=1)
    check(reference, random_model("ViT-B-32"), "ViT-B-32", arch, images, tokens)
