"""Each known wrong version of the loss is rejected by the checker that accepts the right one.

The wrong versions are written here, as small changes of one independent implementation that is
itself checked first, so a rejection is due to the change.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diht_jax.losses import contrastive_loss

WRONG_WEIGHTS = [
    "normalised along the wrong axis, image to text",
    "normalised along the wrong axis, text to image",
    "positive in the normaliser",
    "positive in the max",
    "beta missing from the normaliser",
    "no factor N-1",
    "no gradient through the weights",
]


def log_sum_exp(values, mask, max_mask):
    """Over the columns in `mask`, shifted by the largest of those in `max_mask`."""
    largest = jnp.max(values, axis=1, where=max_mask, initial=-jnp.inf, keepdims=True)
    largest = jax.lax.stop_gradient(largest)
    exps = jnp.where(mask, jnp.exp(jnp.where(mask, values, largest) - largest), 0)
    return jnp.log(exps.sum(1, keepdims=True)) + largest


def explicit_weights_loss(image_emb, text_emb, scale, alpha, beta, change=None):
    """Both directions on a full [N, N] matrix, with the weights made explicitly, in logs."""
    logits = scale * jnp.matmul(image_emb, text_emb.T, precision="highest")
    negative = ~jnp.eye(len(logits), dtype=bool)
    everything = jnp.ones_like(negative)

    def direction(s, name):
        normaliser = log_sum_exp(
            s if change == "beta missing from the normaliser" else beta * s,
            everything if change == "positive in the normaliser" else negative,
            everything if change == "positive in the max" else negative,
        )
        if change == f"normalised along the wrong axis, {name}":
            normaliser = normaliser.T  # what a missing keepdims does to a [N] row sum
        num_negatives = 1 if change == "no factor N-1" else len(s) - 1
        log_weights = np.log(num_negatives) + beta * s - normaliser
        if change == "no gradient through the weights":
            log_weights = jax.lax.stop_gradient(log_weights)
        negatives = log_sum_exp(log_weights + s, negative, negative)[:, 0]
        return jnp.logaddexp(jnp.log(alpha), negatives - jnp.diagonal(s))

    return (
        direction(logits, "image to text").mean() + direction(logits.T, "text to image").mean()
    ) / 2


def raw_exponentials_loss(image_emb, text_emb, scale, alpha, beta):
    """The formula as printed, evaluated as printed."""
    logits = scale * jnp.matmul(image_emb, text_emb.T, precision="highest")
    negative = ~jnp.eye(len(logits), dtype=bool)

    def direction(s):
        tilt = jnp.exp(beta * s) * negative
        weights = (len(s) - 1) * tilt / tilt.sum(1, keepdims=True)
        positives = jnp.exp(jnp.diagonal(s))
        return -jnp.log(positives / (alpha * positives + (weights * jnp.exp(s) * negative).sum(1)))

    return (direction(logits).mean() + direction(logits.T).mean()) / 2


def local_negatives_loss(image_emb, text_emb, scale, alpha, beta):
    """Right on every device's own rows, then averaged."""
    loss = explicit_weights_loss(image_emb, text_emb, scale, alpha, beta)
    return jax.lax.pmean(loss, "data")


def global_negatives_loss(image_emb, text_emb, scale, alpha, beta):
    return contrastive_loss(image_emb, text_emb, scale, alpha=alpha, beta=beta)


def micro_batch_mean_loss(image_emb, text_emb, scale, alpha, beta, num_micro=2):
    """Gradient accumulation done naively: the mean of the losses of micro-batches."""
    parts = zip(jnp.split(image_emb, num_micro), jnp.split(text_emb, num_micro), strict=True)
    losses = [global_negatives_loss(*part, scale, alpha, beta) for part in parts]
    return sum(losses) / num_micro


def micro_batched_gradients(image_emb, text_emb, scale, alpha, beta, *, scale_every_time):
    """Full-batch loss, back-propagated through one micro-batch of embeddings at a time."""
    num_micro, size = 2, image_emb.shape[0] // 2
    value, scale_grad, image_grads, text_grads = 0.0, 0.0, [], []
    for first in range(0, num_micro * size, size):

        def loss(images, texts, scale, first=first):
            place = functools.partial(jax.lax.dynamic_update_slice, start_indices=(first, 0))
            return global_negatives_loss(
                place(image_emb, images), place(text_emb, texts), scale, alpha, beta
            )

        rows = slice(first, first + size)
        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(
            image_emb[rows], text_emb[rows], scale
        )
        image_grads.append(grads[0])
        text_grads.append(grads[1])
        scale_grad = scale_grad + grads[2] if scale_every_time else grads[2]
    return value, (jnp.concatenate(image_grads), jnp.concatenate(text_grads), scale_grad)


@functools.cache
def differentiate(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def test_the_unchanged_version_is_accepted(reference):
    assert reference.find_errors(differentiate(explicit_weights_loss)) == []


@pytest.mark.parametrize("change", WRONG_WEIGHTS)
def test_wrong_weights_are_rejected(reference, change):
    wrong = functools.partial(explicit_weights_loss, change=change)
    assert reference.is_rejected(differentiate(wrong))


@pytest.mark.parametrize(
    "kind, scale", [("aligned", 100.0), ("collapsed", 100.0), ("opposed", 200.0)]
)
def test_raw_exponentials_are_rejected(reference, kind, scale):
    """Logits near 100 overflow; logits all near -200 underflow to 0/0."""
    value_and_grads = differentiate(raw_exponentials_loss)
    mild = [("random", 1 / 0.07, alpha, beta) for alpha in (1.0, 0.5) for beta in (0.0, 0.5)]
    assert reference.find_errors(value_and_grads, mild) == []
    errors = reference.find_errors(value_and_grads, [(kind, scale, 1.0, 0.5)])
    assert any("value nan" in error for error in errors)


def test_local_negatives_are_rejected(reference):
    one_device = reference.differentiate_on_mesh(local_negatives_loss, reference.mesh_of(1))
    assert reference.find_errors(one_device) == []
    eight_devices = reference.differentiate_on_mesh(local_negatives_loss, reference.mesh_of(8))
    assert reference.is_rejected(eight_devices)


def test_mean_of_micro_batch_losses_is_rejected(reference):
    assert reference.find_errors(differentiate(global_negatives_loss)) == []
    assert reference.is_rejected(differentiate(micro_batch_mean_loss))


def test_scale_gradient_counted_once_per_micro_batch_is_rejected(reference):
    right, wrong = (
        jax.jit(functools.partial(micro_batched_gradients, scale_every_time=every_time))
        for every_time in (False, True)
    )
    cases = [case for case in reference.CASES if case[0] == "random"]
    assert reference.find_errors(right, cases) == []
    errors = reference.find_errors(wrong, cases)
    assert errors and all("scale gradient" in error for error in errors)


def test_gradients_of_every_device_left_unreduced_are_rejected(reference):
    """Without check_vma, gradients inside of shard_map are `num_devices` times too large."""
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def local(image_emb, text_emb, scale, alpha, beta):
        def loss(image_emb, text_emb, scale):
            return contrastive_loss(
                image_emb, text_emb, scale, alpha=alpha, beta=beta, axis_name="data"
            )

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(image_emb, text_emb, scale)

    unreduced = jax.shard_map(
        local,
        mesh=reference.mesh_of(8),
        in_specs=(rows, rows, whole, whole, whole),
        out_specs=(whole, (rows, rows, whole)),
        check_vma=False,
    )
    errors = reference.find_errors(jax.jit(unreduced), [("random", 1 / 0.07, 1.0, 0.25)])
    assert any("image gradient" in error for error in errors)
    assert any("scale gradient" in error for error in errors)
