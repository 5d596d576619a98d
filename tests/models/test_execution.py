"""How a model computes changes neither its parameters nor its results."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diht_jax.models import Architecture
from diht_jax.models.attention import attention_implementation
from diht_jax.models.parameters import (
    merge_model,
    model_definition,
    model_parameters,
    parameter_shapes,
    stack_blocks,
)
from diht_jax.models.remat import POLICIES
from diht_jax.models.transformer import Execution

ARCH = Architecture(
    image_size=32,
    patch_size=8,
    vision_layers=4,
    vision_width=32,
    vision_heads=2,
    text_layers=3,
    text_width=16,
    text_heads=2,
    embed_dim=16,
    context_length=8,
    vocab_size=64,
)
# Optimising the program would take most of the test, and does not move its memory.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
DEFINITION, INIT = model_definition(ARCH, jnp.float32, jnp.float32)


@functools.cache
def parameters():
    return jax.device_get(jax.jit(INIT)(jax.random.key(0)))


def scanned(**changes):
    return dataclasses.replace(DEFINITION, execution=Execution(scan_layers=True, **changes))


def vision_gradient(definition):
    """A compiled gradient of a function of the image embeddings; memory is that of its blocks."""

    def value(params, images):
        return jnp.sum(jnp.sin(3.0 * merge_model(definition, params).encode_image(images)))

    images = np.random.default_rng(0).standard_normal((64, 32, 32, 3)).astype(np.float32)
    lowered = jax.jit(jax.grad(value)).lower(parameters(), images)
    compiled = lowered.compile(QUICK_COMPILE)
    return compiled(parameters(), images), compiled.memory_analysis().temp_size_in_bytes


def test_remat_policies_keep_gradients_and_are_ordered_by_memory():
    expected, _ = vision_gradient(DEFINITION)
    memory = {}
    for name in POLICIES:
        grads, memory[name] = vision_gradient(scanned(remat=name))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grads, expected
        )
    assert memory["full"] < memory["minimal"] < memory["dots"] < memory["none"]
    assert memory["none"] > 1.5 * memory["full"]


def test_a_scanned_model_has_the_parameters_of_the_unrolled_one():
    definition = scanned()
    assert definition.init_params == DEFINITION.init_params or parameter_shapes(
        jax.eval_shape(definition.init_params, jax.random.key(0))
    ) == parameter_shapes(parameters())
    stacked = stack_blocks(parameters())
    kernel = stacked["vision"]["blocks"]["mlp"]["fc_in"]["kernel"]
    assert kernel.shape == (4, 32, 128)
    for i in range(4):
        np.testing.assert_array_equal(
            kernel[i], parameters()["vision"]["blocks"][str(i)]["mlp"]["fc_in"]["kernel"]
        )
    model = merge_model(definition, parameters())
    jax.tree.map(np.testing.assert_array_equal, model_parameters(model), stacked)
    # Either layout is taken.
    again = merge_model(definition, stacked)
    jax.tree.map(np.testing.assert_array_equal, model_parameters(again), stacked)
    tokens = np.random.default_rng(1).integers(1, 64, (5, 8)).astype(np.int32)
    np.testing.assert_allclose(
        model.encode_text(tokens),
        merge_model(DEFINITION, parameters()).encode_text(tokens),
        atol=1e-6,
    )


def gpu(capability):
    return types.SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA something",
        compute_capability=capability,
        client=types.SimpleNamespace(platform_version="PJRT C API\ncuda 12090"),
    )


ROCM = types.SimpleNamespace(
    platform="gpu",
    device_kind="AMD something",
    client=types.SimpleNamespace(platform_version="PJRT C API\nrocm 60300"),
)


@pytest.mark.parametrize(
    "choice, dtype, head_dim, device, expected",
    [
        ("auto", "bfloat16", 64, None, "xla"),
        ("auto", "bfloat16", 64, ROCM, "xla"),
        ("auto", "bfloat16", 64, gpu("7.5"), "xla"),
        ("auto", "bfloat16", 64, gpu("8.0"), "cudnn"),
        ("auto", "float16", 128, gpu("8.9"), "cudnn"),
        ("auto", "float32", 64, gpu("9.0"), "xla"),
        ("auto", "bfloat16", 256, gpu("8.0"), "xla"),
        ("auto", "bfloat16", 256, gpu("10.0"), "cudnn"),
        ("auto", "bfloat16", 60, gpu("9.0"), "xla"),
        ("xla", "bfloat16", 64, gpu("9.0"), "xla"),
        ("cudnn", "bfloat16", 64, gpu("9.0"), "cudnn"),
    ],
)
def test_attention_implementation(choice, dtype, head_dim, device, expected):
    assert attention_implementation(choice, dtype, head_dim, device) == expected


@pytest.mark.parametrize(
    "choice, dtype, device, message",
    [
        ("cudnn", "bfloat16", None, "needs an NVIDIA GPU, and the device is cpu"),
        ("cudnn", "float32", gpu("9.0"), "config.model.dtype is float32"),
        ("cudnn", "bfloat16", gpu("7.0"), "the GPU has 7.0"),
        ("fast", "bfloat16", None, "expected one of auto, xla, cudnn"),
    ],
)
def test_attention_that_does_not_apply_is_refused(choice, dtype, device, message):
    with pytest.raises(ValueError, match=message):
        attention_implementation(choice, dtype, 64, device)


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="config.model.remat='most': expected one of none, full"):
        Execution(remat="most")
