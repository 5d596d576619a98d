"""How a model computes: rematerialisation, layer norms, bias gradients and activations.

Numbers are compared with float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from diht_jax.models.attention import Target
from diht_jax.models.layers import ACTIVATIONS, POLICIES, Linear
from diht_jax.models.parameters import ModelDefinition, merge_model
from diht_jax.models.transformer import Execution, layer_norm
from tests import make
from tests.compiling import QUICK_COMPILE

ARCH = make.small_architecture(
    image_size=32,
    vision_layers=3,
    vision_width=32,
    vision_heads=2,
    text_layers=3,
    text_width=16,
    text_heads=2,
    context_length=8,
    vocab_size=64,
)
DEFINITION = ModelDefinition(ARCH, jnp.float32, jnp.float32)
INIT = DEFINITION.init_params


def temporary_bytes(remat):
    """Temporary bytes of the gradient of a function of the image embeddings, mostly the blocks'."""
    execution = Execution(scan_layers=True, remat=remat)
    definition = dataclasses.replace(DEFINITION, execution=execution)

    def value(params, images):
        return jnp.sum(jnp.sin(3.0 * merge_model(definition, params).encode_image(images)))

    params = jax.eval_shape(INIT, jax.random.key(0))
    images = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)
    compiled = jax.jit(jax.grad(value)).lower(params, images).compile(QUICK_COMPILE)
    return compiled.memory_analysis().temp_size_in_bytes


def test_remat_policies_are_ordered_by_memory():
    """The tests of the whole step check that the policies keep the gradients."""
    memory = {name: temporary_bytes(name) for name in POLICIES}
    assert memory["full"] < memory["minimal"] < memory["dots"] < memory["none"]
    assert memory["none"] > 1.5 * memory["full"]


@pytest.mark.parametrize("ratio, tolerance", [(1, 2e-6), (10, 1e-4)])
def test_layer_norm_in_one_pass_is_the_formulas(ratio, tolerance):
    """`ratio` is the mean over the deviation: one pass loses digits where it is large."""
    x = np.random.default_rng(0).standard_normal((64, 768)).astype(np.float32) + np.float32(ratio)
    wide = x.astype(np.float64)
    deviation = np.sqrt(wide.var(axis=1, keepdims=True) + 1e-5)
    expected = (wide - wide.mean(axis=1, keepdims=True)) / deviation
    settings = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    found = layer_norm(768, epsilon=1e-5, use_fast_variance=True, **settings)(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_only_a_tpu_computes_layer_norms_in_one_pass_and_sums_biases_in_float32():
    for platform, expected in (("tpu", True), ("cpu", False), ("cuda", False)):
        execution = Execution(target=Target(platform, platform), attention="xla")
        definition = dataclasses.replace(DEFINITION, execution=execution)
        model = merge_model(definition, jax.eval_shape(INIT, jax.random.key(0)))
        for block in (*model.vision.blocks, *model.text.blocks):
            for norm in (block.attention_norm, block.mlp_norm):
                assert norm.use_fast_variance == expected
            for part in (block.attention, block.mlp):
                layers = [x for x in vars(part).values() if isinstance(x, Linear)]
                assert [x.float32_bias_gradient for x in layers] == [expected] * 2


def test_the_gradient_of_a_bias_of_many_rows_is_off_by_no_more_than_its_last_digit():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50_000, 8)).astype(jnp.bfloat16)
    gradient = (rng.standard_normal((50_000, 64)) + 0.05).astype(jnp.bfloat16)
    layer = Linear(8, 64, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.float32_bias_gradient = True
    graphdef, params = nnx.split(layer)
    _, pullback = jax.vjp(lambda params: nnx.merge(graphdef, params)(x), params)
    found = np.asarray(pullback(jnp.asarray(gradient))[0]["bias"][...], np.float64)
    exact = gradient.astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2**-8 * np.abs(exact).max())


REFERENCES = {
    "gelu": torch.nn.functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("name", REFERENCES)
def test_equals_torch_in_float64(name, dtype, tolerance):
    x = jnp.linspace(-9, 9, 1001).astype(dtype)
    gradient = jnp.cos(jnp.linspace(0, 50, 1001)).astype(dtype)
    value, pull = jax.vjp(ACTIVATIONS[name], x)
    (slope,) = pull(gradient)
    assert value.dtype == slope.dtype == x.dtype
    exact = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    reference = REFERENCES[name](exact)
    reference.backward(torch.tensor(np.asarray(gradient, np.float64)))
    for ours, theirs in ((value, reference.detach()), (slope, exact.grad)):
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs.numpy(), rtol=tolerance, atol=tolerance
        )
