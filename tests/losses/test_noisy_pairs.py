"""Equal pairs as masked or positive pairs, and pair weights, against float64 formulas.

All forms of the loss with gradients, and batches without any negative.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from diht_jax.losses import contrastive_loss, contrastive_objective
from diht_jax.losses.dense import dense_loss
from diht_jax.losses.sigmoid import Sigmoid
from diht_jax.losses.softmax import Softmax
from diht_jax.losses.streaming import streaming_loss
from tests.losses import formulas

NUM_PAIRS, WIDTH = 40, 6
AXES = ("data", "fsdp")
# 17 groups of 1, 2 and 4 equal pairs, spread over the devices. Some ids differ in one word only.
GROUPS = np.random.default_rng(3).permutation(np.repeat(np.arange(17), [1] * 6 + [2] * 5 + [4] * 6))
IDS = np.stack([GROUPS // 5, GROUPS % 5], axis=1).astype(np.uint32)
IS_EQUAL, IS_SAME = GROUPS[:, None] == GROUPS[None, :], np.eye(NUM_PAIRS, dtype=bool)
ROW_WEIGHTS = np.random.default_rng(4).uniform(0, 2, NUM_PAIRS)
OF_ROWS = {"pair_ids": IDS, "row_weights": ROW_WEIGHTS}


@functools.cache
def pairs():
    """Returns float64 [N, d]: noisy pairs, some with a wrong text."""
    rng = np.random.default_rng(0)
    image_emb = rng.normal(size=(NUM_PAIRS, WIDTH))
    text_emb = image_emb + 0.3 * rng.normal(size=(NUM_PAIRS, WIDTH))
    text_emb[::8] = np.roll(text_emb, 3, axis=0)[::8]
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image_emb, text_emb))


def softmax_formula(image_emb, text_emb, scale, alpha, beta, equal_pairs, constant=False):
    return formulas.defining_loss(
        image_emb,
        text_emb,
        scale,
        alpha,
        beta,
        constant_weights=constant,
        equal_pairs=equal_pairs,
        is_equal=IS_EQUAL,
        row_weights=ROW_WEIGHTS,
    )


def sigmoid_formula(image_emb, text_emb, scale, bias, equal_pairs):
    logits = scale[..., None, None] * (image_emb @ np.swapaxes(text_emb, -1, -2))
    positive = IS_EQUAL if equal_pairs == "positive" else IS_SAME
    is_left_out = IS_EQUAL & (equal_pairs == "mask")
    signs = np.where(positive, 1, np.where(is_left_out, 0, -1))
    losses = np.log(1 + np.exp(-signs * (logits + bias[..., None, None]))) * (signs != 0)
    return ((ROW_WEIGHTS + ROW_WEIGHTS[:, None]) * losses).sum((-2, -1))


# "groups": 5 rows per device and 20 per group, in padded tiles of 3. The others have one level.
FORMS = {
    "groups": (functools.partial(streaming_loss, tile=3), (2, 4)),
    "group": (functools.partial(streaming_loss, tile=3), (1, 8)),
    "ring": (streaming_loss, (8, 1)),
    "gathered": (dense_loss, (2, 4)),
}


def rows_for(equal_pairs):
    """Returns the row arrays of a loss."""
    return {"row_weights": ROW_WEIGHTS} if equal_pairs == "negative" else OF_ROWS


@pytest.mark.parametrize(
    "equal_pairs, constant, form",
    [
        ("negative", False, "groups"),
        ("negative", True, "group"),
        ("mask", False, "groups"),
        ("mask", True, "ring"),
        ("mask", False, "gathered"),
        ("positive", False, "groups"),
        ("positive", False, "ring"),
        ("positive", False, "gathered"),
    ],
)
def test_softmax_is_the_formula(equal_pairs, constant, form):
    objective = Softmax(
        weighted=True,
        stop_weight_gradient=constant,
        differentiate_beta=True,
        equal_pairs=equal_pairs,
    )
    with jax.enable_x64(True):
        step = formulas.differentiate(FORMS[form][0], objective, FORMS[form][1])
        for scale, alpha, beta in ((20.0, 0.9, 0.5), (5.0, 1.0, 0.0)):
            value, (*grads, (by_alpha, by_beta)) = step(
                *pairs(), scale, (alpha, beta), rows_for(equal_pairs)
            )
            expected, expected_grads = formulas.complex_step(
                functools.partial(softmax_formula, constant=constant, equal_pairs=equal_pairs),
                *(*pairs(), np.float64(scale), np.float64(alpha), np.float64(beta)),
            )
            np.testing.assert_allclose(value, expected, rtol=1e-11)
            for grad, other in zip((*grads, by_alpha, by_beta), expected_grads, strict=True):
                np.testing.assert_allclose(grad, other, atol=1e-10 * np.max(np.abs(other)))


@pytest.mark.parametrize(
    "equal_pairs, expected", [("negative", np.log(0.5)), ("mask", 0.0), ("positive", 0.0)]
)
def test_a_single_pair_with_ids_has_no_negatives_and_counts_0(equal_pairs, expected):
    one, ids = np.ones((1, 1), np.float32), jax.numpy.zeros(1, "int32")
    loss = contrastive_loss(one, one, 2.0, alpha=0.5, pair_ids=ids, equal_pairs=equal_pairs)
    assert float(loss) == pytest.approx(expected)


@pytest.mark.parametrize(
    "equal_pairs, form",
    [("negative", "groups"), ("positive", "groups"), ("mask", "groups"), ("mask", "gathered")],
)
def test_sigmoid_is_the_formula(equal_pairs, form):
    with jax.enable_x64(True):
        step = formulas.differentiate(FORMS[form][0], Sigmoid(equal_pairs), FORMS[form][1])
        value, (*grads, (by_bias,)) = step(*pairs(), 5.0, (-2.0,), rows_for(equal_pairs))
    expected, expected_grads = formulas.complex_step(
        functools.partial(sigmoid_formula, equal_pairs=equal_pairs),
        *(*pairs(), np.float64(5), np.float64(-2)),
    )
    np.testing.assert_allclose(value, expected, rtol=1e-11)
    for grad, other in zip((*grads, by_bias), expected_grads, strict=True):
        np.testing.assert_allclose(grad, other, atol=1e-10 * np.max(np.abs(other)))


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("impl", ["streaming", "gathered"])
def test_without_any_negative_nothing_is_lost_and_nothing_is_learnt(impl, mesh_shape):
    """Nor is a batch of equal pairs a reason to skip the update."""
    devices = jax.devices()[: np.prod(mesh_shape)]
    mesh = Mesh(np.asarray(devices).reshape(mesh_shape), AXES)
    image_emb, text_emb = (np.float32(x) for x in pairs())
    step = jax.value_and_grad(contrastive_objective, argnums=(0, 1, 2), has_aux=True)
    (loss, metrics), grads = jax.jit(
        functools.partial(step, mesh=mesh, impl=impl, alpha=0.0, beta=0.25, equal_pairs="positive")
    )(image_emb, text_emb, 20.0, pair_ids=np.zeros(NUM_PAIRS, np.int32))
    assert loss == 0 and all(not np.any(grad) for grad in grads)
    assert metrics["equal_pairs"] == 1 and metrics["i2t_accuracy"] == 1
    assert metrics["hardest_negative_similarity"] == -1


def test_equal_texts_are_no_wrong_partners_in_the_metrics():
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), AXES)
    image_emb = np.float32(np.eye(4)[[0, 0, 1, 2]])
    objective = jax.jit(functools.partial(contrastive_objective, mesh=mesh))
    metrics = objective(image_emb, image_emb, 20.0, pair_ids=np.int32([7, 7, 1, 2]))[1]
    # Of the four pairs, the first two would tie.
    assert metrics["i2t_accuracy"] == 1 and metrics["equal_pairs"] == 0.5


def test_pair_weights_are_constants_of_the_mean():
    weights = np.float32(ROW_WEIGHTS)
    total = softmax_formula(*pairs(), *map(np.float64, (20, 0.9, 0.5)), "negative")
    expected = total / 2 / NUM_PAIRS
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), AXES)
    step = jax.value_and_grad(contrastive_objective, argnums=(0, 1), has_aux=True)
    (loss, _), grads = jax.jit(functools.partial(step, mesh=mesh, alpha=0.9, beta=0.5))(
        *map(np.float32, pairs()), 20.0, pair_weights=weights
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    alone = jax.jit(jax.grad(functools.partial(contrastive_loss, alpha=0.9, beta=0.5)))
    plain = alone(*map(np.float32, pairs()), 20.0, pair_weights=weights)
    np.testing.assert_allclose(grads[0], plain, atol=1e-5 * np.abs(plain).max())
