"""The losses of several sizes at once, against the float64 sum of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from diht_jax.hardware.flops import count_flops
from diht_jax.losses.nested import gathered_losses, streaming_losses
from diht_jax.losses.softmax import Softmax
from diht_jax.losses.streaming import streaming_loss

SIZES, WEIGHTS, WIDTH = (3, 8, 16), (0.5, 2.0, 1.0), 16
NUM_PAIRS, MAX_WEIGHT = 48, 1.5
IDS = np.arange(NUM_PAIRS)[:, None] // 2  # in twos
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
AXES = ("data", "fsdp")


def pairs(num_pairs):
    rng = np.random.default_rng(0)
    image_emb = rng.normal(size=(num_pairs, WIDTH))
    text_emb = image_emb + 0.3 * rng.normal(size=(num_pairs, WIDTH))
    rows = (image_emb, text_emb)
    return [emb / np.linalg.norm(emb, axis=1, keepdims=True) for emb in rows]


def unit(emb, size):
    return emb[..., :size] / np.sqrt(np.sum(emb[..., :size] ** 2, axis=-1, keepdims=True))


def sharded(losses_fn, objective, mesh_shape, **options):
    """The weighted losses as a function of global arrays, and what they are split over."""
    devices = np.asarray(jax.devices()[: np.prod(mesh_shape)]).reshape(mesh_shape)
    rows, whole = PartitionSpec(AXES), PartitionSpec()

    def local(image_emb, text_emb, scale, parameters, ids, row_weights):
        losses, _ = losses_fn(
            *(image_emb, text_emb, scale, parameters),
            objective=objective,
            axis_name=AXES,
            pair_ids=ids if objective.equal_pairs != "negative" else None,
            row_weights=row_weights,
            **options,
        )
        return jax.lax.psum(losses @ jnp.asarray(WEIGHTS), AXES)

    return jax.shard_map(
        local,
        mesh=Mesh(devices, AXES),
        in_specs=(rows, rows, whole, whole, rows, rows),
        out_specs=whole,
    )


def loss_in_twos(image_emb, text_emb, row_weights):
    """The formula in float64 where every pair has an equal one, a positive, and weights are capped.

    Both directions, each row by its weight.
    """
    total, positive = 0, IDS == IDS.T
    for logits in (20.0 * image_emb @ text_emb.T, 20.0 * text_emb @ image_emb.T):
        tilt = np.exp(0.5 * logits) * ~positive
        weights = (len(logits) - 2) * tilt / tilt.sum(axis=1, keepdims=True)
        assert 0.01 < np.mean(weights > MAX_WEIGHT) < 0.99
        negatives = (np.minimum(weights, MAX_WEIGHT) * np.exp(logits)).sum(axis=1)
        positives = (np.exp(logits) * positive).sum(axis=1)
        means = (logits * positive).sum(axis=1) / 2
        total += row_weights @ (np.log(0.9 * positives + negatives) - means)
    return total


@pytest.mark.parametrize(
    "objective, row_weights",
    [
        (Softmax(weighted=True, differentiate_beta=True), None),
        (
            Softmax(
                weighted=True,
                differentiate_beta=True,
                equal_pairs="positive",
                max_weight=MAX_WEIGHT,
            ),
            np.random.default_rng(1).uniform(0, 2, NUM_PAIRS),
        ),
    ],
    ids=["hard_negatives", "equal_positives_capped_and_doubted"],
)
def test_one_ring_gives_the_losses_of_all_sizes(objective, row_weights, reference):
    """Two groups of four devices, six rows each; tiles of five do not divide them."""
    rows = pairs(NUM_PAIRS)
    with jax.enable_x64(True):
        arrays = (*map(jnp.asarray, rows), jnp.float64(20.0), (0.9, 0.5))
        found, expected = (
            jax.jit(
                jax.value_and_grad(sharded(fn, objective, mesh, **options), argnums=(0, 1, 2, 3)),
                compiler_options=QUICK_COMPILE,
            )(*arrays, IDS, row_weights)
            for fn, mesh, options in (
                (streaming_losses, (2, 4), {"sizes": SIZES, "tile": 5}),
                (gathered_losses, (1, 1), {"sizes": SIZES}),
            )
        )
        truth = 0
        for size, weight in zip(SIZES, WEIGHTS, strict=True):
            first = [unit(emb, size) for emb in rows]
            if row_weights is None:
                truth += weight * 2 * NUM_PAIRS * reference.defining_loss(*first, 20.0, 0.9, 0.5)
            else:
                truth += weight * loss_in_twos(*first, row_weights)
        np.testing.assert_allclose(found[0], truth, rtol=1e-12)
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * np.max(np.abs(other)))


def test_all_sizes_take_the_products_and_transfers_of_the_whole_embeddings():
    image_emb, text_emb = (jnp.asarray(emb, jnp.float32) for emb in pairs(64))
    arguments = (image_emb, text_emb, 20.0, (1.0, 0.25), None, None)

    def one_size(*args, sizes, **options):
        loss, statistics = streaming_loss(*args, **options)
        return jnp.stack([loss] * len(WEIGHTS)), statistics

    def measure(losses_fn):
        loss = sharded(losses_fn, Softmax(weighted=True), (8, 1), sizes=SIZES)
        step = jax.grad(loss, argnums=(0, 1))
        transfers = str(jax.make_jaxpr(step)(*arguments)).count(" ppermute[")
        return transfers, count_flops(step, *arguments).matmul_flops

    (transfers, flops), (single_transfers, single_flops) = map(
        measure, (streaming_losses, one_size)
    )
    assert transfers == single_transfers > 0
    assert flops == pytest.approx(single_flops, rel=0.01)
