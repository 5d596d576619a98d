"""Training steps with caption and affinity terms: their formulas, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diht_jax.extras.captioning import DECODER, merge_decoder
from diht_jax.input.transforms import normalize
from diht_jax.models.parameters import merge_model
from tests.contributing.tiny_runs import BATCH_SIZE, draw_batch, tiny_config, train_steps
from tests.extras.test_affinity import TEMPERATURES, WIDTHS, truth

TERMS = {
    **{"loss.weight": 0.25, "captioning.weight": 2.0, "captioning.layers": 2},
    **{"affinity.weight": 3.0, "affinity.widths": WIDTHS, "affinity.temperatures": TEMPERATURES},
}
END = 63


def batch():
    """Returns captions of 1 to 6 tokens without padding; no teacher has embedded one pair."""
    rng, found = np.random.default_rng(0), draw_batch()
    tokens = rng.integers(1, END, (BATCH_SIZE, 8)).astype(np.int32)
    tokens[:, 0] = 62
    tokens[np.arange(BATCH_SIZE), 1 + np.arange(BATCH_SIZE) % 7] = END
    found["tokens"] = tokens
    for name in ("teacher_image_emb", "teacher_text_emb"):
        numbers = rng.integers(-127, 128, (BATCH_SIZE, sum(WIDTHS)))
        found[name] = numbers.astype(np.float16)
        found[name][5] = 0
    return found


def captioning_formula(program, params, image_tokens):
    """Returns the mean negative log-likelihood of all tokens but the first, ends included."""
    decoder = merge_decoder(params[DECODER], program.arch, dtype=jnp.float32)
    tokens = batch()["tokens"]
    features = np.float64(jax.jit(decoder.__call__)(tokens[:, :-1], image_tokens))
    logits = features @ np.float64(params[DECODER]["token_embedding"]["embedding"]).T
    total, count = 0.0, 0
    for row, caption in zip(logits, tokens, strict=True):
        for position, token in enumerate(caption[1:]):
            total += np.log(np.exp(row[position]).sum()) - row[position, token]
            count += 1
            if token == END:
                break
    return total / count


def affinity_formula(image_emb, text_emb, scale):
    ends = np.cumsum(WIDTHS)[:-1]
    images, texts = (
        np.split(np.float64(batch()[f"teacher_{kind}_emb"]), ends, axis=1)
        for kind in ("image", "text")
    )
    return truth(image_emb, text_emb, scale, list(zip(images, texts, TEMPERATURES, strict=True)))[0]


@pytest.fixture(scope="module")
def alone():
    """Runs a step on one device."""
    one = {"mesh.data": 1, "mesh.fsdp": 1, "captioning.chunk_tokens": 7}
    return train_steps(tiny_config(TERMS | one), batch(), 1, jax.devices()[:1])


def test_a_step_is_the_formulas_and_trains_both_sides(alone):
    program, (params, after), (metrics,) = alone

    @jax.jit
    def embed(params):
        model = merge_model(program.definition, params)
        images = normalize(batch()["images"], np.float32)
        image_emb, text_emb = model.encode_image(images), model.encode_text(batch()["tokens"])
        return image_emb, text_emb, model.vision.tokens(images), model.vision.features(images)

    image_emb, text_emb, image_tokens, features = embed(params)
    np.testing.assert_allclose(image_tokens[:, 0], features, atol=1e-6)
    expected = captioning_formula(program, params, image_tokens)
    np.testing.assert_allclose(metrics["captioning_loss"], expected, rtol=1e-5)
    scale = np.exp(params["log_logit_scale"])
    expected = affinity_formula(np.float64(image_emb), np.float64(text_emb), scale)
    np.testing.assert_allclose(metrics["affinity_loss"], expected, rtol=1e-5)
    total = 0.25 * metrics["contrastive_loss"]
    total += 2 * metrics["captioning_loss"] + 3 * metrics["affinity_loss"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), params, after)
    assert min(jax.tree.leaves(moved[DECODER]["blocks"])) > 0


def test_a_step_is_the_same_on_any_mesh(alone):
    """Also with micro-batches, scanned layers and rematerialisation."""
    _, (_, expected), (expected_metrics,) = alone
    split = {"mesh.data": 2, "mesh.fsdp": 4, "micro_batch": 8}
    remat = {"captioning.remat": "full", "model.scan_layers": True}
    _, (_, found), (metrics,) = train_steps(tiny_config(TERMS | split | remat), batch(), 1)
    for name in ("captioning_loss", "affinity_loss"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), expected[DECODER], found[DECODER]
    )
