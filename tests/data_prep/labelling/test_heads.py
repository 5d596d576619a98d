"""Heads against float64 formulas, SciPy's optimizer and counts made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from data_prep.labelling.config import default_config
from data_prep.labelling.examples import Split, make_targets
from data_prep.labelling.heads import Head
from data_prep.labelling.train_heads import (
    concept_recall,
    find_ranks,
    frequent_concepts,
    recall,
    soft_target_loss,
    summarize,
    train_head,
)


def _targets(rows: list[list[int]]) -> np.ndarray:
    return make_targets(np.array([len(row) for row in rows]), np.array(sum(rows, []), np.int64))


def _dense(targets: np.ndarray, num_concepts: int) -> np.ndarray:
    dense = np.zeros((len(targets), num_concepts + 1))  # the last column is for -1
    rows, _ = np.nonzero(targets >= 0)
    dense[rows, targets[targets >= 0]] = 1
    return dense[:, :-1] / dense.sum(axis=1, keepdims=True)


def _config(**changes):
    config = default_config().heads
    config.update(changes)
    return config


@pytest.mark.parametrize("std", [1e6, 0.4])
def test_training_reaches_the_minimum(std):
    rng = np.random.default_rng(1)
    n, d, v = 400, 6, 5
    # Far from standardised: means up to 50, scales from 0.01 to 30, one constant dimension.
    x = rng.normal(size=(n, d)) * [0.01, 0.3, 1, 30, 4, 0] + [50, 0, -3, 10, 0, 7]
    truth = rng.normal(size=(d, v)) / np.array([0.01, 0.3, 1, 30, 4, 1])[:, None]
    scores = (x - x.mean(axis=0)) @ truth + rng.gumbel(size=(n, v))
    targets = _targets([np.argsort(-row)[: 1 + i % 2].tolist() for i, row in enumerate(scores)])
    dense = _dense(targets, v)
    l2 = d / std**2
    standard = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-9)

    def objective(flat):
        kernel, bias = flat[: d * v].reshape(d, v), flat[d * v :]
        logits = standard @ kernel + bias
        loss = -(dense * special.log_softmax(logits, axis=1)).sum() / n
        residual = (special.softmax(logits, axis=1) - dense) / n
        gradient = standard.T @ residual + l2 / n * kernel
        penalty = 0.5 * l2 / n * (kernel**2).sum()
        return loss + penalty, np.concatenate([gradient.ravel(), residual.sum(axis=0)])

    best = optimize.minimize(objective, np.zeros(d * v + v), jac=True, method="L-BFGS-B").fun
    examples = Split(x.astype(np.float32), targets)
    # With a tiny threshold no concept is rare, and all images have the same weight.
    config = _config(
        repeat_threshold=1e-9, prior_logit_std=std, steps=1500, learning_rate=0.02, batch_size=256
    )
    head, curve = train_head(examples, examples, v, config, seed=0)
    logits = x @ head.kernel.astype(np.float64) + head.bias
    loss = -(dense * special.log_softmax(logits, axis=1)).sum() / n
    assert loss == pytest.approx(min(entry["held_out_loss"] for entry in curve), rel=1e-3)
    folded = np.where(x.std(axis=0) > 0, x.std(axis=0), 0)[:, None] * head.kernel
    reached = loss + 0.5 * l2 / n * (folded**2).sum()
    assert best < reached < 1.01 * best
    assert curve[0]["held_out_loss"] > 1.1 * best
    steps = [entry["step"] for entry in curve]
    assert steps[:9] == [0, 1, 2, 4, 8, 16, 32, 64, 75]
    again, _ = train_head(examples, examples, v, config, seed=0)
    np.testing.assert_array_equal(head.kernel, again.kernel)


def test_rare_concepts_are_up_sampled_by_the_square_root():
    # Constant embeddings: only the prior can be learned. Its optimum under the weights 1 / sqrt(f)
    # is sqrt(f), normalised.
    shares = np.array([0.64, 0.32, 0.04])
    rows = [[0]] * 64 + [[1]] * 32 + [[2]] * 4
    examples = Split(np.ones((100, 3), np.float32), _targets(rows))
    for threshold, weights in ((1.0, np.sqrt(shares)), (1e-6, shares)):
        config = _config(steps=600, learning_rate=0.03, batch_size=4096, repeat_threshold=threshold)
        head, _ = train_head(examples, examples, 3, config, seed=0)
        probs = special.softmax(np.ones(3) @ head.kernel + head.bias)
        np.testing.assert_allclose(probs, weights / weights.sum(), atol=0.02)


def test_training_ends_when_it_only_gets_worse():
    # Random labels: nothing learned from them holds for the held-out images.
    rng = np.random.default_rng(3)
    train, held_out = (
        Split(rng.normal(size=(60, 50)), _targets(rng.integers(0, 3, (60, 1)).tolist()))
        for _ in range(2)
    )
    config = _config(steps=400, learning_rate=0.05, batch_size=64, prior_logit_std=1e6)
    head, curve = train_head(train, held_out, 3, config, seed=0)
    losses = [entry["held_out_loss"] for entry in curve]
    assert np.argmin(losses) == 0
    steps = [entry["step"] for entry in curve]
    assert steps == [0, 1, 2, 4, 8, 16, 20, 40, 60, 80, 100]
    # The best head is the initial one: concept frequencies, and no dependence on the images.
    assert np.all(head.kernel == 0)


def test_no_example_is_an_error():
    some, none = (Split(np.ones((n, 2), np.float32), _targets([[0]] * n)) for n in (2, 0))
    with pytest.raises(ValueError, match="no held-out image has a concept.*2 for training and 0"):
        train_head(some, none, 1, _config(), 0)


def test_predictions_are_the_top_of_the_softmax():
    rng = np.random.default_rng(2)
    head = Head(rng.normal(size=(8, 300)).astype(np.float32), rng.normal(size=300).astype("f4"))
    x = rng.normal(size=(1100, 8)).astype(np.float16)
    ids, probs = head.predict(x, 10)
    logits = x.astype(np.float64) @ head.kernel + head.bias
    expected = np.argsort(-logits, axis=1)[:, :10]
    # Float32 may swap two nearly equal logits.
    assert (ids == expected).mean() > 0.999
    full = special.softmax(logits, axis=1)
    top = np.take_along_axis(full, ids.astype(int), axis=1)
    np.testing.assert_allclose(probs, top / top.sum(axis=1, keepdims=True), rtol=1e-4)
    assert ids.dtype == np.int32 and probs.dtype == np.float32
    alone, _ = head.predict(x[700:701], 10)
    np.testing.assert_array_equal(alone[0], ids[700])


def test_metrics_by_hand():
    # Image 0 has the concepts {0, 1}, image 1 {1}, image 2 {2, 3, 0}; concept 4 never occurs.
    targets = _targets([[0, 1], [1], [2, 3, 0]])
    ids = np.array([[1, 4, 0, 2, 3], [0, 1, 2, 3, 4], [4, 1, 2, 3, 0]])
    ranks = find_ranks(ids, targets)
    assert recall(ranks, targets, 1) == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert recall(ranks, targets, 3) == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert recall(ranks, targets, 5) == 1
    found = concept_recall(ranks, targets, 3, 5)
    np.testing.assert_array_equal(found, [0.5, 1, 1, 0, np.nan])
    summary = summarize(ids, targets, 5)
    assert summary["concept_recall_at_1"] == pytest.approx((0 + 1 / 2 + 0 + 0) / 4)
    assert summary["recall_at_10"] == summary["concept_recall_at_10"] == 1
    # Concepts missing from the predictions are misses.
    ranks = find_ranks(ids[:, :2], targets)
    assert recall(ranks, targets, 10) == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_baseline_knows_frequencies_only():
    ids = frequent_concepts(_targets([[2], [2, 0], [2, 0], [1]]), 2, 4, k=2)
    assert ids.tolist() == [[2, 0], [2, 0]]


def test_loss_is_dense_cross_entropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 11)) * 30
    rows = [[3], [0, 10], [1, 2, 3, 4], [7], [5, 6], [9]]
    ids, probs = np.zeros((6, 4), np.int32), np.zeros((6, 4))
    for i, row in enumerate(rows):
        ids[i, : len(row)], probs[i, : len(row)] = row, 1 / len(row)
    dense = _dense(_targets(rows), 11)
    expected = -(dense * special.log_softmax(logits, axis=1)).sum(axis=1)
    loss = soft_target_loss(*map(jnp.float32, (logits,)), ids, jnp.float32(probs))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    gradient = jax.grad(lambda z: soft_target_loss(z, ids, jnp.float32(probs)).sum())(
        jnp.float32(logits)
    )
    np.testing.assert_allclose(gradient, special.softmax(logits, axis=1) - dense, atol=2e-6)
