"""The affinity loss against its float64 formula: meshes, missing pairs, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diht_jax.extras import affinity
from diht_jax.extras.affinity import TeacherEmbeddings, affinity_loss, sharded_affinity_loss

WIDTHS, TEMPERATURES = (12, 7), (0.01, 0.07)
MISSING = (3, 17)  # the pair that each teacher has not embedded
NUM_PAIRS = 48
SCALE = 60.0


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def truth(image_emb, text_emb, scale, teachers):
    """Returns the value and gradients by the printed formula, without the missing pairs."""
    counts = np.all([[r.any(1) for r in t[:2]] for t in teachers], axis=(0, 1))
    x, y = image_emb[counts], text_emb[counts]
    logits, slopes, value = scale * x @ y.T, 0, 0
    for images, texts, temperature in teachers:
        u, v = (
            rows[counts] / np.linalg.norm(rows[counts], axis=1, keepdims=True)
            for rows in (images, texts)
        )
        similar = u @ v.T / temperature
        for s, t, turn in ((logits, similar, np.asarray), (logits.T, similar.T, np.transpose)):
            p, q = softmax(t), softmax(s)
            # Where p is tiny, so is its share of the divergence.
            value += np.sum(p * (np.log(p + 1e-300) - np.log(q + 1e-300)))
            slopes = slopes + turn(q - p)
    weight = 1 / (2 * len(teachers) * counts.sum())
    by_image, by_text = np.zeros_like(image_emb), np.zeros_like(text_emb)
    by_image[counts] = weight * scale * slopes @ y
    by_text[counts] = weight * scale * slopes.T @ x
    return weight * value, (by_image, by_text, weight * np.sum(slopes * (x @ y.T)))


def inputs():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(NUM_PAIRS, 8))

    def embed(width, noise):
        rows = common @ rng.normal(size=(8, width)) + noise * rng.normal(size=(NUM_PAIRS, width))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    teachers = []
    for number, (width, temperature) in enumerate(zip(WIDTHS, TEMPERATURES, strict=True)):
        teacher = embed(width, 0.3), 3 * embed(width, 0.5)  # lengths are arbitrary
        teacher[number][MISSING[number]] = 0
        teachers.append(TeacherEmbeddings(*teacher, temperature))
    return embed(16, 1.0), embed(16, 1.0), SCALE, teachers


def on_mesh(shape):
    mesh = Mesh(np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "fsdp"))
    rows, whole = PartitionSpec(("data", "fsdp")), PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(affinity_loss, axis_name=("data", "fsdp")),
        mesh=mesh,
        in_specs=(rows, rows, whole, [TeacherEmbeddings(rows, rows, whole)] * len(WIDTHS)),
        out_specs=whole,
    )
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), inputs())
    return jax.jit(jax.value_and_grad(mapped, argnums=(0, 1, 2)))(*arrays)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_any_mesh_gives_the_formula_in_float64(shape, monkeypatch):
    """Each device has six rows, in chunks of two."""
    monkeypatch.setattr(affinity, "_MOST_SIMILARITIES", 2 * NUM_PAIRS)
    with jax.enable_x64(True):
        value, grads = on_mesh(shape)
    expected, expected_grads = truth(*inputs())
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for grad, right in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, right, rtol=0, atol=1e-12 * np.abs(right).max())
    assert not np.any(np.asarray(grads[:2])[:, MISSING])


def test_without_any_pair_that_counts_the_loss_is_zero():
    image_emb, text_emb, *_ = map(jnp.float32, inputs()[:3])
    nothing = TeacherEmbeddings(jnp.zeros_like(image_emb), text_emb, 1 / 20)
    loss = jax.jit(jax.value_and_grad(affinity_loss))
    value, grad = loss(image_emb, text_emb, 20.0, [nothing])
    assert value == 0 and not np.any(grad)


def test_memory_grows_with_the_batch_and_not_with_its_square():
    mesh = Mesh(np.asarray(jax.devices()).reshape(8, 1), ("data", "fsdp"))
    by_example = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def temporaries(num_pairs):
        rows = jax.ShapeDtypeStruct((num_pairs, 32), np.float32, sharding=by_example)

        def loss(image_emb, text_emb, teacher_image, teacher_text):
            teachers = [TeacherEmbeddings(teacher_image, teacher_text, 0.01)]
            return sharded_affinity_loss(image_emb, text_emb, 50.0, teachers, mesh=mesh)

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return step.lower(*[rows] * 4).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(65536) < 2.5 * temporaries(32768)
