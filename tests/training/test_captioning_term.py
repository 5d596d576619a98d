"""The captioning term in a step: its formula in float64, whatever the mesh and the micro-batch."""

import jax
import jax.numpy as jnp
import numpy as np

import diht_jax
from diht_jax import sharding
from diht_jax.export import export_model
from diht_jax.extras.caption_decoder import merge_decoder
from diht_jax.extras.captioning import DECODER
from diht_jax.input.transforms import normalize
from diht_jax.models.parameters import merge_model
from diht_jax.training.loop import train
from diht_jax.training.program import TrainProgram
from tests.contributing.tiny_runs import BATCH_SIZE, tiny_config

TERM = {"captioning.weight": 2.0, "captioning.layers": 2}
END = 63


def batch():
    """Captions of 1 to 6 tokens; what follows the end is no zeros, to be seen if it counted."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, END, (BATCH_SIZE, 8)).astype(np.int32)
    tokens[:, 0] = 62
    tokens[np.arange(BATCH_SIZE), 1 + np.arange(BATCH_SIZE) % 7] = END
    return {
        "images": rng.integers(0, 256, (BATCH_SIZE, 16, 16, 3)).astype(np.uint8),
        "tokens": tokens,
    }


def one_step(changes, devices=None):
    program = TrainProgram(tiny_config({**TERM, **changes}), total_steps=10, devices=devices)
    state = program.create_state()
    step = program.step(state)
    before = jax.device_get(state.params)
    on_mesh = sharding.put_batch(batch(), sharding.batch_sharding(program.mesh))
    state, metrics = step(state, on_mesh)
    return program, before, jax.device_get(state.params), jax.device_get(metrics)


def expected_loss(program, params, image_tokens):
    """The mean negative log-likelihood of all tokens but the first, ends included."""
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


def test_a_step_is_the_formula_and_trains_both_sides():
    program, params, after, metrics = one_step({"captioning.chunk_tokens": 7})
    images = normalize(batch()["images"], np.float32)
    model = merge_model(program.definition, params)
    image_tokens = jax.jit(model.vision.tokens)(images)
    np.testing.assert_allclose(
        image_tokens[:, 0], jax.jit(model.vision.features)(images), atol=1e-6
    )
    expected = expected_loss(program, params, image_tokens)
    np.testing.assert_allclose(metrics["captioning_loss"], expected, rtol=1e-5)
    total = metrics["contrastive_loss"] + 2 * metrics["captioning_loss"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), params, after)
    assert min(jax.tree.leaves(moved[DECODER]["blocks"])) > 0


def test_equal_whatever_the_mesh():
    """Also in micro-batches, with scanned layers and blocks that are computed again."""
    muon = {"optimizer.kind": "muon"}
    alone = {"mesh.data": 1, "mesh.fsdp": 1, **muon}
    _, _, expected, expected_metrics = one_step(alone, jax.devices()[:1])
    split = {"mesh.data": 2, "mesh.fsdp": 4, "micro_batch": 8}
    remat = {"captioning.remat": "full", "model.scan_layers": True}
    _, _, found, metrics = one_step({**muon, **split, **remat})
    np.testing.assert_allclose(
        metrics["captioning_loss"], expected_metrics["captioning_loss"], rtol=1e-5
    )
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), expected[DECODER], found[DECODER]
    )


def test_a_loaded_run_has_the_decoder_of_its_last_step(config, tmp_path, caplog):
    config.total_steps, config.optimizer.warmup_steps = 2, 0
    config.model.overrides.context_length = 6
    config.captioning.weight, config.captioning.layers = 1.0, 1
    config.mesh.update(data=1, fsdp=2)
    state = train(config, tmp_path / "run", devices=jax.devices()[:2])
    model = diht_jax.load_model(tmp_path / "run", devices=jax.devices()[:1])
    picture = np.zeros((16, 16, 3), np.uint8)
    assert all(model.caption(picture))
    jax.tree.map(np.testing.assert_array_equal, model._decoder, state.params[DECODER])
    with caplog.at_level("WARNING"):
        export_model(str(tmp_path / "run"), "safetensors", tmp_path / "out")
    assert "the caption decoder is left out" in caplog.text
