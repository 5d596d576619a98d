"""FastCLIP's loss against its published formula, step by step, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diht_jax import sharding
from diht_jax.losses.fastclip import fastclip_loss, gamma_at, initial_means

RHO, EPSILON, RECORDS, BATCH = 6.5, 1e-3, 20, 8


def by_hand(image_emb, text_emb, scale, u, ids, gamma):
    """Returns the paper's loss and gradients; updates u [2, records], which are not logarithms."""
    cosines, grads, logs = image_emb @ text_emb.T, [], []
    for direction, sims in enumerate((cosines, cosines.T)):
        ratios = np.exp(scale * (sims - np.diag(sims)[:, None]))
        np.fill_diagonal(ratios, 0)
        g = ratios.sum(1) / (BATCH - 1)
        old = np.where(np.isnan(u[direction, ids]), g, u[direction, ids])
        u[direction, ids] = new = (1 - gamma) * old + gamma * g
        by_logit = ratios / (BATCH - 1) / (EPSILON + new)[:, None]
        by_logit -= np.diag(by_logit.sum(1))
        grads.append(by_logit / scale / (2 * BATCH))
        logs.append(np.log(EPSILON + new))
    by_cosine = scale * (grads[0] + grads[1].T)
    inner = RHO + np.mean(logs)
    by_scale = np.sum((grads[0] + grads[1].T) * cosines) - inner / scale**2
    return inner / scale, (by_cosine @ text_emb, by_cosine.T @ image_emb, by_scale)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_loss_gradients_and_means_are_those_of_the_paper_over_several_steps(num_devices):
    with jax.enable_x64(True):
        mesh = sharding.create_mesh(-1, 2 if num_devices > 1 else 1, jax.devices()[:num_devices])

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
        def step(image_emb, text_emb, scale, means, ids, gamma):
            loss, _, after = fastclip_loss(
                image_emb, text_emb, scale, means, ids, gamma,
                rho=RHO, epsilon=EPSILON, mesh=mesh, axis_names=sharding.BATCH_AXES,
            )  # fmt: skip
            return loss, after

        rng, u = np.random.default_rng(0), np.full((2, RECORDS), np.nan)
        means = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), initial_means(RECORDS))
        for number in range(6):
            emb = rng.normal(size=(2, BATCH, 5))
            emb /= np.linalg.norm(emb, axis=2, keepdims=True)
            ids = rng.permutation(RECORDS)[:BATCH]
            scale, gamma = 3.0 + 9 * number, [1.0, 1.0, 0.7, 0.3, 0.3, 0.9][number]
            expected, slopes = by_hand(*emb, scale, u, ids, gamma)
            (loss, means), grads = step(*emb, scale, means, ids, gamma)
            np.testing.assert_allclose(loss, expected, rtol=1e-12)
            for grad, slope in zip(grads, slopes, strict=True):
                np.testing.assert_allclose(grad, slope, rtol=1e-9, atol=1e-14)
            for name, values in zip(("log_image_mean", "log_text_mean"), u, strict=True):
                known = ~np.isnan(values)
                found = np.asarray(means[name])
                np.testing.assert_allclose(
                    np.exp(found[:RECORDS][known]), values[known], rtol=1e-12
                )
                assert np.isneginf(found[:RECORDS][~known]).all()
                assert np.isneginf(found[RECORDS:]).all()


def test_gamma_falls_by_epochs():
    found = [
        float(gamma_at(step, gamma=0.2, gamma_epochs=4, batch_size=10, num_records=20))
        for step in range(12)
    ]
    epochs = [min(step // 2 / 4, 1) for step in range(12)]
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * epoch)) / 2 for epoch in epochs]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[:2] == [1.0, 1.0]
