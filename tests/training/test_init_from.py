"""`config.model.init_from` sets the run's architecture, except for what the user has set."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from diht_jax import command_line
from diht_jax.loading import load_model
from diht_jax.models.zoo import Architecture, get_architecture
from diht_jax.train import main
from diht_jax.training import loop
from diht_jax.training.initial_parameters import bind_architecture
from diht_jax.training.loop import train
from diht_jax.training.recipe import default_config
from diht_jax.training.workdir.saved_run import write_config
from tests import make
from tests.docs.commands import parse_command
from tests.training.conftest import SIGLIP, assert_bitwise_equal, write_weights

OTHER = make.small_architecture(
    image_size=24,
    vision_width=48,
    vision_heads=3,
    text_width=32,
    text_heads=4,
    context_length=26,
    activation="quick_gelu",
    layer_norm_epsilon=1e-06,
    vision_mlp_width=64,
)


def architecture_of(config) -> Architecture:
    return get_architecture(config.model.name, config.model.overrides.to_dict())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weight directory of `OTHER`, and its parameters."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    return folder, write_weights(folder, OTHER)


@pytest.fixture
def recipe(config, weights):
    """A recipe whose architecture differs in every field; the user has set none of it."""
    config.model.init_from = str(weights[0])
    config.model.patch_dropout = 0.0
    return config


def test_a_run_starts_as_the_model_and_goes_on_without_it(recipe, weights, tmp_path):
    source = shutil.copytree(weights[0], tmp_path / "model")
    recipe.model.init_from = str(source)
    recipe.optimizer.update(learning_rate=0.0, warmup_steps=0)
    options = {"set_keys": ("data.train",), "devices": jax.devices()[:1]}
    first = train(recipe, tmp_path / "run", stop_after_steps=1, **options)
    assert_bitwise_equal(first.params, weights[1])
    shutil.rmtree(source)
    second = train(recipe, tmp_path / "run", **options)
    assert int(second.step) == 6
    assert_bitwise_equal(second.params, weights[1])


def test_adapters_on_the_texts_of_siglip_leave_its_images_and_begin_at_its_bias(config, tmp_path):
    sizes = {"embed_dim": 48, "vocab_size": 600, "vision_pool_heads": 3}
    arch = dataclasses.replace(OTHER, **SIGLIP, **sizes)
    write_weights(tmp_path / "siglip", arch, "huggingface", loss_scalars={"logit_bias": -7.5})
    config.model.init_from = str(tmp_path / "siglip")
    config.model.patch_dropout = 0.0
    config.loss.update(kind="sigmoid", beta=0.0)
    config.lora.update(rank=2, towers=("text",))
    config.optimizer.update(learning_rate=0.01, warmup_steps=0)
    devices = jax.devices()[:1]
    train(config, tmp_path / "run", stop_after_steps=2, set_keys=("data.train",), devices=devices)
    before, after = (
        load_model(tmp_path / name, dtype="float32", devices=devices) for name in ("siglip", "run")
    )
    assert_bitwise_equal(after._params["vision"], before._params["vision"])
    changed = jax.tree.map(
        lambda x, y: np.any(x != y), after._params["text"], before._params["text"]
    )
    assert any(jax.tree.leaves(changed))
    assert before.logit_bias == -7.5 != after.logit_bias
    assert after.logit_bias == pytest.approx(-7.5, abs=0.1)


def test_the_command_takes_the_architecture_save_what_is_typed(weights, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(loop, "train", lambda *given, **options: begun.append((*given, options)))
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: None)  # that of this process
    arguments = ["--config=configs/cifar10_finetune.py", f"--workdir={tmp_path}"]
    arguments += [f"--config.model.init_from={weights[0]}", "--config.data.train=unused"]
    arguments.append("--config.model.overrides.context_length=30")
    parse_command("diht_jax.train", arguments, lambda _: main())
    ((config, workdir, options),) = begun
    bound = bind_architecture(config, workdir, options["set_keys"])
    assert architecture_of(bound) == dataclasses.replace(OTHER, context_length=30)


def test_a_recipe_of_the_same_model_keeps_its_sizes_of_images_and_texts(weights):
    recipe = default_config()
    same = {field: value for field, value in vars(OTHER).items() if value is not None}
    recipe.model.overrides.update({**same, "image_size": 40, "context_length": 50})
    # The same model in a different notation.
    recipe.model.overrides.update(text_mlp_width=4 * OTHER.text_width, end_of_text_id=49407)
    recipe.model.init_from = str(weights[0])
    bound = architecture_of(bind_architecture(recipe, set_keys=()))
    assert (bound.image_size, bound.context_length) == (40, 50)


def test_a_run_that_goes_on_has_the_config_that_it_began_with(recipe, weights, tmp_path):
    """Also if the config states the model's architecture by a name, or in full."""
    same = {name: value for name, value in vars(OTHER).items() if value is not None}
    own = {"patch_size": 8, "context_length": 40}
    recipe.model.overrides.update({**same, **own})
    set_keys = [f"model.overrides.{field}" for field in own]
    for init_from in (str(weights[0]), "diht_vitb16_224px"):
        recipe.model.init_from = init_from
        first = bind_architecture(recipe, tmp_path, set_keys)
        write_config(tmp_path, first)
        (tmp_path / "checkpoints" / "1").mkdir(parents=True)
        again = bind_architecture(recipe, epath.Path(tmp_path), set_keys)
        assert again.to_dict() == first.to_dict()
        shutil.rmtree(tmp_path / "checkpoints")


def test_a_name_that_the_user_sets_stays(recipe):
    before = architecture_of(recipe)
    assert architecture_of(bind_architecture(recipe, set_keys=("model.name",))) == before


def test_another_cleaning_of_texts_leaves_the_models_tokenizer(tmp_path):
    write_config(tmp_path, make.tiny_config(model__tokenizer="moved", model__text_cleaning="none"))
    config = make.tiny_config(model__init_from=str(tmp_path), model__text_cleaning="lower")
    bound = bind_architecture(config, set_keys=("model.text_cleaning",)).model
    assert (bound.tokenizer, bound.text_cleaning) == (str(tmp_path / "tokenizer"), "lower")


def test_a_model_that_differs_in_the_end_of_its_texts_alone_keeps_it(tmp_path):
    write_config(tmp_path, make.tiny_config(model__overrides__end_of_text_id=1))
    config = make.tiny_config(model__init_from=str(tmp_path))
    bound = bind_architecture(config, set_keys=())
    assert architecture_of(bound).end_of_text_id == 1


def test_a_config_made_in_python_keeps_what_differs_from_the_defaults(weights):
    config = default_config()
    config.model.init_from = str(weights[0])
    assert architecture_of(bind_architecture(config)) == OTHER
    config.model.overrides.embed_dim = 8
    assert architecture_of(bind_architecture(config)).embed_dim == 8


def test_an_empty_name_is_no_model(recipe, tmp_path):
    recipe.model.init_from = ""
    with pytest.raises(ValueError, match="^config.model.init_from=: '': no such work directory"):
        train(recipe, tmp_path / "run")


def test_a_setting_that_does_not_fit_is_named_with_the_models_value(recipe, tmp_path):
    recipe.model.overrides.embed_dim = 8
    message = r"config\.model\.overrides\.embed_dim=16 \(the run has 8\)\. Leave"
    with pytest.raises(ValueError, match=message):
        train(recipe, tmp_path / "run", set_keys=("model.overrides.embed_dim",))
