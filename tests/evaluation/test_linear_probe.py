"""The projected solver against closed forms and scipy."""

import numpy as np
import pytest
import scipy.optimize

from diht_jax.evaluation import linear_probe
from diht_jax.evaluation.linear_probe import (
    LabelledEmbeddings,
    ProbeSettings,
    fit_probes,
    probe_accuracy,
)


def _examples(seed, n, d=6, classes=3):
    """Returns overlapping clusters of unit vectors, so that no classifier is perfect."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = np.random.default_rng(99).normal(size=(classes, d))
    x = centres[labels] + 1.5 * rng.normal(size=(n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return LabelledEmbeddings(x.astype(np.float32), labels.astype(np.int32))


def _objective(flat, examples, start, weight_decay=0.0):
    """Returns the loss and its gradient in float64; `flat` has W before b."""
    x, y = examples.image_emb.astype(np.float64), examples.labels
    d, c = start.shape
    moved, bias = flat[: d * c].reshape(d, c), flat[d * c :]
    logits = x @ (start + moved) + bias
    logits -= logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    error = (np.exp(log_probs) - np.eye(c)[y]) / len(y)
    loss = -log_probs[np.arange(len(y)), y].mean() + weight_decay / 2 * (moved**2).sum()
    gradient = np.concatenate([(x.T @ error + weight_decay * moved).ravel(), error.sum(axis=0)])
    return loss, gradient


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_weight_decay_towards_the_start_equals_scipy(spread):
    train, start = _examples(0, 30), spread * np.random.default_rng(5).normal(size=(6, 3))
    fitted = fit_probes([train], train, start, [ProbeSettings(weight_decay=0.02)], num_steps=500)
    best = scipy.optimize.minimize(
        _objective, np.zeros(21), (train, start, 0.02), jac=True, method="BFGS", tol=1e-10
    )
    moved = fitted.weights[0] - start
    np.testing.assert_allclose(moved, best.x[:18].reshape(6, 3), atol=3e-4)
    # An equal shift of all logits changes nothing, so biases are compared without their mean.
    bias = best.x[18:] - best.x[18:].mean()
    np.testing.assert_allclose(fitted.bias[0] - fitted.bias[0].mean(), bias, atol=2e-4)


def test_inside_both_balls_equals_scipy():
    train = _examples(1, 30)
    start = np.random.default_rng(2).normal(size=(6, 3))
    radius, bias_radius = 0.7, 0.1
    fitted = fit_probes([train], train, start, [ProbeSettings(radius, bias_radius)])
    moved, bias = fitted.weights[0] - start, fitted.bias[0]
    best = scipy.optimize.minimize(
        _objective,
        np.zeros(21),
        (train, start),
        jac=True,
        method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda v: radius**2 - (v[:18] ** 2).sum()},
            {"type": "ineq", "fun": lambda v: bias_radius**2 - (v[18:] ** 2).sum()},
        ],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert best.success
    assert np.linalg.norm(moved) <= radius * (1 + 1e-5)
    assert np.linalg.norm(bias) <= bias_radius * (1 + 1e-5)
    loss = _objective(np.concatenate([moved.ravel(), bias]).astype(np.float64), train, start)[0]
    assert loss == pytest.approx(best.fun, abs=1e-6)
    np.testing.assert_allclose(moved, best.x[:18].reshape(6, 3), atol=1e-3)


def test_settings_and_draws_together_equal_one_by_one():
    draws, validation = [_examples(5, 15), _examples(6, 15)], _examples(7, 60)
    start = np.random.default_rng(8).normal(size=(6, 3)).astype(np.float32)
    # More settings than devices, and not a multiple of eight.
    settings = [ProbeSettings(r, b) for r in (0.0, 0.5, 8.0) for b in (0.0, 0.3, 1.0)]
    together = fit_probes(draws, validation, start, settings, num_steps=50)
    for d, draw in enumerate(draws):
        alone = [fit_probes([draw], validation, start, [s], num_steps=50) for s in settings]
        accuracies = []
        for fitted in alone:
            logits = validation.image_emb @ fitted.weights[0] + fitted.bias[0]
            accuracies.append((logits.argmax(axis=1) == validation.labels).mean())
            assert fitted.accuracy[0, 0] == pytest.approx(accuracies[-1])
        assert together.accuracy[d] == pytest.approx(accuracies)
        best = int(np.argmax(accuracies))
        assert together.chosen[d] == best
        np.testing.assert_allclose(together.weights[d], alone[best].weights[0], atol=1e-4)


def test_devices_compute_no_eigenvalues(monkeypatch):
    # jaxlib's batched eigenvalues can hang if several CPU devices compute them at the same time.
    programs, fit_chunk = [], linear_probe._fit_chunk

    def lower_and_fit(*args, **kwargs):
        programs.append(fit_chunk.lower(*args, **kwargs).as_text())
        return fit_chunk(*args, **kwargs)

    monkeypatch.setattr(linear_probe, "_fit_chunk", lower_and_fit)
    draws = [_examples(seed, 6) for seed in range(2)]
    fit_probes(draws, draws[0], np.zeros((6, 3)), [ProbeSettings()], num_steps=1)
    assert len(programs) == 1 and "custom_call" not in programs[0]


def test_blocks_change_nothing(monkeypatch):
    train, start = _examples(9, 37), np.zeros((6, 3), np.float32)
    whole = fit_probes([train], train, start, [ProbeSettings(3.0, 1.0)], num_steps=60)
    monkeypatch.setattr("diht_jax.evaluation.linear_probe._MOST_EXAMPLES_A_BLOCK", 8)
    blocks = fit_probes([train], train, start, [ProbeSettings(3.0, 1.0)], num_steps=60)
    np.testing.assert_allclose(blocks.weights, whole.weights, atol=1e-5)
    assert blocks.accuracy == whole.accuracy
    assert probe_accuracy(train, whole.weights[0], whole.bias[0]) == whole.accuracy[0, 0]
