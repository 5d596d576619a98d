"""CLIP's architecture compiles to the same program as before the architecture had options."""

import hashlib

import jax
import jax.numpy as jnp
import pytest

from diht_jax.models.dual_encoder import l2_normalize
from diht_jax.models.parameters import ModelDefinition, merge_model
from diht_jax.models.transformer import Execution
from tests import make

ARCH = make.small_architecture(
    image_size=32,
    vision_layers=2,
    vision_heads=2,
    text_layers=2,
    text_width=48,
    text_heads=3,
    embed_dim=40,
    vocab_size=100,
)
# SHA-256 of the StableHLO of commit 9f2925b6, lowered by this version of JAX.
JAX_VERSION = "0.10.2"
DIGESTS = {
    "scanned": "e5b8fc16e26c5946d1230ffd088f57478be94efd700da0899cc57d1d541c74e5",
    "patches left out": "51cb8dc2cd7dd6cdeba0f6c9f303665047bfd8698b6740cd113432716f44df6f",
}


def lowered(execution: Execution, kept: bool) -> str:
    """Returns the program text of a loss on the embeddings and its gradient."""
    definition = ModelDefinition(ARCH, jnp.bfloat16, jnp.float32, execution)
    init = definition.init_params
    params = jax.eval_shape(init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((4, 12), jnp.int32)
    patches = jax.ShapeDtypeStruct((4, 8), jnp.int32) if kept else None

    def encode(params, images, tokens, patches):
        model = merge_model(definition, params)
        features = model.vision.features(images, kept_patches=patches)
        image_emb = l2_normalize(model.vision.projection(features))
        return image_emb, model.encode_text(tokens)

    def loss(params, images, tokens, patches):
        image_emb, text_emb = encode(params, images, tokens, patches)
        scale = jnp.exp(params["log_logit_scale"])
        return -jnp.trace(jax.nn.log_softmax(scale * image_emb @ text_emb.T))

    return jax.jit(jax.value_and_grad(loss)).lower(params, images, tokens, patches).as_text()


CASES = {
    "scanned": (Execution(scan_layers=True), False),
    "patches left out": (Execution(remat="minimal"), True),
}


@pytest.mark.skipif(jax.__version__ != JAX_VERSION, reason=f"digests of JAX {JAX_VERSION}")
@pytest.mark.parametrize("name", CASES)
def test_clip_is_lowered_to_the_same_program(name):
    digest = hashlib.sha256(lowered(*CASES[name]).encode()).hexdigest()
    assert digest == DIGESTS[name]
