"""Runs with low-rank adapters: which parameters are trained, stored, and loaded."""

import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import diht_jax
from diht_jax.models.parameters import ModelDefinition, lora_of
from diht_jax.models.zoo import get_architecture
from diht_jax.training.loop import train
from diht_jax.training.program import TrainProgram
from diht_jax.weights.inference import LoadedModel
from diht_jax.weights.source import ModelFiles
from tests.training.conftest import write_weights


def flat(tree):
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}


@pytest.fixture(scope="module")
def weights(make_config, tmp_path_factory):
    """A weight directory of the runs' architecture, and its parameters."""
    model = make_config().model
    arch = get_architecture(model.name, model.overrides.to_dict())
    folder = tmp_path_factory.mktemp("weights") / "model"
    return folder, write_weights(folder, arch)


@pytest.fixture(scope="module")
def tuned(make_config, weights, tmp_path_factory):
    """A resumed run with adapters in the image tower, and its last state."""
    config = make_config()
    config.model.init_from = str(weights[0])
    config.lora.update(rank=2, alpha=4.0, towers=("vision",), matrices=("in_proj", "fc_out"))
    config.mesh.update(data=1, fsdp=2)
    devices = jax.devices()[:2]
    config.total_steps = 4
    config.checkpoint.every_steps = 2
    config.optimizer.warmup_steps = 0
    config.optimizer.learning_rate = 0.05
    config.optimizer.max_logit_scale = 2.0  # below the scale e of the weights
    folder = tmp_path_factory.mktemp("tuned")
    straight = train(config, folder / "run", devices=devices)
    shutil.rmtree(folder / "run" / "checkpoints" / "4")  # as if stopped after step 2
    resumed = train(config, folder / "run", devices=devices)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), straight, resumed)
    return config, folder / "run", resumed


def test_adapters_alone_are_trained_and_have_moments(tuned, weights):
    _, _, state = tuned
    params, before = flat(state.params), flat(weights[1])
    adapters = params.keys() - before.keys()
    prefix = "vision/blocks/0/"
    assert adapters == {
        f"{prefix}{layer}/{part}"
        for layer in ("attention/in_proj", "mlp/fc_out")
        for part in ("lora_a", "lora_b")
    }
    for name, value in before.items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)
    assert [name for name in adapters if not np.any(params[name])] == []
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sorted(x.shape for x in moments) == sorted(2 * [params[name].shape for name in adapters])


def test_model_of_the_run_is_the_one_with_adapters(tuned, weights):
    config, run, state = tuned
    program = TrainProgram(config, 4, jax.devices()[:2])
    files = ModelFiles(program.arch, state.params, "run", config=config)
    unmerged = LoadedModel(program.definition, files, program.mesh, batch_size=8)
    loaded = diht_jax.load_model(run, devices=jax.devices()[:1], batch_size=8)
    assert flat(loaded._params).keys() == flat(weights[1]).keys()
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    found = loaded.encode_image(images)
    np.testing.assert_allclose(found, unmerged.encode_image(images), atol=2e-6)


def test_a_new_run_with_adapters_needs_a_model_to_adapt(config, tmp_path):
    config.lora.rank = 2
    with pytest.raises(ValueError, match="config.lora.rank=2: adapters alone .* config.model.init"):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()


def test_model_begins_as_it_was_and_without_adapters_nothing_changes(config):
    config.model.overrides.vocab_size = 64
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    draw = jax.random.key(0)
    plain = ModelDefinition(arch, "float32", "float32")
    assert TrainProgram(config, 5).definition == plain and lora_of(config.lora) is None
    config.lora.rank = 2
    adapted = TrainProgram(config, 5).definition
    before, after = (flat(jax.jit(d.init_params)(draw)) for d in (plain, adapted))
    for name, value in before.items():
        np.testing.assert_array_equal(after.pop(name), value)
    assert len(after) == 2 * 4 * 2
    assert [(name, v) for name, v in after.items() if np.any(v) != name.endswith("lora_a")] == []
