"""Attention: the kernel follows the target device, and the padded path gives XLA's values."""

import dataclasses
import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diht_jax.config import load_recipe
from diht_jax.models import attention
from diht_jax.models.attention import (
    Target,
    TowerAttention,
    attend_padded,
    attention_implementation,
)
from diht_jax.training.program import TrainProgram, trusted_program
from diht_jax.training.step import training_execution
from tests.make import REPOSITORY


def device(platform, capability=None, version=""):
    fields = {"platform": platform, "device_kind": f"a {platform}"}
    if capability is not None:
        fields["compute_capability"] = capability
    return types.SimpleNamespace(**fields, client=types.SimpleNamespace(platform_version=version))


def cuda(major, minor=0):
    return Target("cuda", "NVIDIA something", (major, minor))


@pytest.mark.parametrize(
    "choice, dtype, head_dim, target, expected",
    [
        ("auto", "bfloat16", 64, cuda(7, 5), "xla"),
        ("auto", "bfloat16", 64, cuda(8), "cudnn"),
        ("auto", "float32", 64, cuda(9), "xla"),
        ("auto", "bfloat16", 256, cuda(10), "cudnn"),
        ("cudnn", "bfloat16", 64, cuda(9), "cudnn"),
    ],
)
def test_attention_implementation(choice, dtype, head_dim, target, expected):
    assert attention_implementation(choice, dtype, head_dim, target) == expected


@pytest.mark.parametrize(
    "choice, dtype, target, message",
    [
        ("cudnn", "bfloat16", cuda(7), "the GPU has 7.0"),
        ("pallas", "bfloat16", None, "needs a TPU, and the device is cpu"),
    ],
)
def test_attention_that_does_not_apply_is_refused(choice, dtype, target, message):
    with pytest.raises(ValueError, match=message):
        attention_implementation(choice, dtype, 64, target)


def test_the_step_asks_the_mesh_and_not_this_machine():
    model = load_recipe(REPOSITORY / "configs" / "diht_vitb16.py").model
    mesh = types.SimpleNamespace(devices=np.array([[device("gpu", "9.0", "cuda")]], object))

    def kernel():
        execution = training_execution(model, mesh)
        tower = {"num_tokens": 197, "num_heads": 12}
        choice = execution.attention
        return attention_implementation(choice, "bfloat16", 64, execution.target, **tower)

    assert kernel() == "cudnn"
    mesh.devices[0, 0] = device("tpu")
    assert kernel() == "pallas"
    mesh.devices[0, 0] = jax.devices()[0]
    assert kernel() == "xla"


def formula(q, k, v, causal):
    """Computes softmax(q k^T / sqrt(d)) v directly."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / np.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v, precision="highest")


def value_and_gradients(function, arrays):
    *inputs, cotangent = arrays
    out, pullback = jax.vjp(function, *inputs)
    return [out, *pullback(cotangent)]


@pytest.mark.parametrize("num_tokens, causal", [(50, False), (77, True), (577, False)])
def test_padded_attention_is_attention(num_tokens, causal):
    keys = jax.random.split(jax.random.key(num_tokens), 4)
    arrays = [jax.random.normal(key, (2, num_tokens, 2, 64)) for key in keys]
    padded = functools.partial(attend_padded, causal=causal, implementation="xla")
    found = value_and_gradients(padded, arrays)
    expected = value_and_gradients(functools.partial(formula, causal=causal), arrays)
    for ours, right in zip(found, expected, strict=True):
        scale = float(jnp.max(jnp.abs(right)))
        np.testing.assert_allclose(ours, right, rtol=0, atol=1e-5 * scale)


TOWER = TowerAttention(
    num_tokens=17, num_heads=2, head_dim=16, causal=False, dtype="bfloat16", kernel="cudnn"
)


def without_change(x):
    return x


def larger_gradients(x):
    """Keeps the values, but makes the incoming gradients a tenth larger."""
    return x + 0.1 * (x - jax.lax.stop_gradient(x))


def no_compiler(x):
    raise KeyError("no such instruction")  # an error that JAX's libraries would not raise


@pytest.mark.parametrize(
    "change, expected",
    [(without_change, "auto"), (larger_gradients, "xla"), (no_compiler, "xla")],
)
def test_the_kernel_for_tpus_has_to_agree_in_values_and_gradients(
    monkeypatch, caplog, change, expected
):
    tower = dataclasses.replace(TOWER, kernel="pallas", causal=True)
    attend_short = functools.partial(attention.attend_short, interpret=True)
    monkeypatch.setattr(
        attention,
        "attend_short",
        lambda *arrays, **options: change(attend_short(*arrays, **options)),
    )
    monkeypatch.setattr(TrainProgram, "attention", lambda self: {"text": tower})
    config = load_recipe(REPOSITORY / "configs" / "demo.py", "debug=True")
    with caplog.at_level(logging.INFO, logger="absl"):
        assert trusted_program(config, 10_000).config.model.attention == expected
    assert ("XLA's is used" in caplog.text) == (expected == "xla")
    assert "attention of the text tower: pallas" in caplog.text
