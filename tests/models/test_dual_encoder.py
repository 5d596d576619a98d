"""The dual encoder against open_clip's: sizes and initialisation; and its components."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diht_jax.models import l2_normalize
from diht_jax.models.dual_encoder import choose_patches
from diht_jax.models.parameters import (
    ModelDefinition,
    ParameterKeys,
    merge_model,
)
from diht_jax.weights.clip_layout import from_layout, layout, our_shapes
from tests import make
from tests.compiling import QUICK_COMPILE
from tests.weights.conftest import SMALL, open_clip_config


def test_parameters_are_drawn_by_the_keys_of_flax():
    rngs, keys = nnx.Rngs(params=7), ParameterKeys(7)
    assert [keys.params() == rngs.params() for _ in range(3)] == [True] * 3


def test_initialisation_has_the_spread_of_open_clips():
    # Wide enough to estimate a standard deviation to a few percent.
    arch = dataclasses.replace(SMALL, vision_layers=3, text_layers=3)
    init_params = ModelDefinition(arch, jnp.float32, jnp.float32).init_params
    ours = jax.jit(init_params, compiler_options=QUICK_COMPILE)(jax.random.key(1))
    open_clip = pytest.importorskip("open_clip")
    import torch

    torch.manual_seed(0)
    state = open_clip.model.CLIP(**open_clip_config(arch)).state_dict()
    state = {name: value.numpy() for name, value in state.items()}
    theirs = from_layout(state, layout(arch), our_shapes(arch), "open_clip")
    flat = {
        jax.tree_util.keystr(path): (np.asarray(a), np.asarray(b))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
        )
    }
    for name, (a, b) in flat.items():
        if b.std() == 0:
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)
            continue
        # Sampling error of a standard deviation: about 1 / sqrt(2 n) each.
        tolerance = 5 / np.sqrt(b.size) + 0.01
        np.testing.assert_allclose(a.std(), b.std(), rtol=tolerance, err_msg=name)
        assert abs(a.mean()) < 6 * b.std() / np.sqrt(b.size), name


def test_patch_dropout_keeps_a_random_subset_of_each_image():
    kept = np.asarray(choose_patches(jax.random.key(0), 3, 16, 0.5))
    assert kept.shape == (3, 8) and kept.dtype == np.int32
    for row in kept:
        assert len(set(row)) == 8 and set(row) <= set(range(16))
    assert len({tuple(sorted(row)) for row in kept}) > 1
    assert choose_patches(jax.random.key(0), 2, 16, 0.99).shape == (2, 1)

    definition = ModelDefinition(SMALL, jnp.float32, jnp.float32)
    model = merge_model(definition, make.draw_parameters(definition.init_params))
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 3)).astype(np.float32)
    features_of = jax.jit(model.vision.features)
    features = features_of(images, kept_patches=kept)
    # Attention is independent of the order, and patches that are left out have no influence.
    backwards = features_of(images, kept_patches=kept[:, ::-1])
    np.testing.assert_allclose(features, backwards, atol=1e-5)
    blanked = images.reshape(3, 4, 8, 4, 8, 3).copy()
    for i, row in enumerate(kept):
        for patch in set(range(16)) - set(row):
            blanked[i, patch // 4, :, patch % 4] = 7.0
    blanked = blanked.reshape(images.shape)
    np.testing.assert_allclose(features, features_of(blanked, kept_patches=kept), atol=1e-5)
    assert np.abs(features - features_of(blanked)).max() > 1e-2


def _normalized_and_gradient(rows: np.ndarray, cotangents: np.ndarray) -> tuple:
    """Returns x / |x| in float64 and its gradient; both are 0 for a zero row."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-12)
    tangential = cotangents - unit * (unit * cotangents).sum(1, keepdims=True)
    return unit, np.divide(tangential, lengths, out=np.zeros_like(rows), where=lengths > 1e-12)


@pytest.mark.parametrize("length", [0.0, 1e-13, 1e-9, 1.0, 1e9])
def test_normalisation_and_its_gradient_are_those_of_float64_also_at_zero(length):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 8))
    rows *= length / np.linalg.norm(rows, axis=1, keepdims=True)
    cotangents = rng.standard_normal((4, 8))
    unit, pull_back = jax.vjp(l2_normalize, jnp.asarray(rows, jnp.float32))
    (gradient,) = pull_back(jnp.asarray(cotangents, jnp.float32))
    expected, expected_gradient = _normalized_and_gradient(rows, cotangents)
    np.testing.assert_allclose(unit, expected, atol=1e-6)
    np.testing.assert_allclose(
        gradient, expected_gradient, rtol=1e-4, atol=1e-5 * np.abs(expected_gradient).max()
    )
