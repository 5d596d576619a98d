"""Validation of configs, durations, and the recipes of `configs/`."""

import ast
import pathlib
import subprocess
import sys

import ml_collections
import pytest

from diht_jax.config import default_config, duration_in_steps, load_recipe, validate_config
from diht_jax.models import get_architecture

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (REPOSITORY / "configs").glob("*.py") if path.stem != "common")


@pytest.fixture(autouse=True)
def repository_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))


def test_the_recipes_of_the_project_are_there():
    expected = {"diht_vitb32", "diht_vitb16", "diht_vitl14", "diht_vitl14_336", "clip_vitb32"}
    assert {path.stem for path in RECIPES} >= expected | {"emoji", "demo"}


@pytest.mark.parametrize("arg", ["", "debug=True"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_and_validates(path, arg):
    config = load_recipe(path, arg)
    validate_config(config, default_config())
    get_architecture(config.model.name, config.model.overrides.to_dict())
    steps = duration_in_steps(
        config, "total", batch_size=config.data.batch_size, num_examples=10_000
    )
    assert config.optimizer.warmup_steps < steps
    if arg:
        assert steps <= 4 and config.data.batch_size <= 16


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_header_gives_run_command_and_expectation(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"--config configs/{path.stem}.py" in docstring
    assert "Expected:" in docstring


def test_recipe_refuses_another_argument():
    with pytest.raises(ValueError, match="debug=Tru'"):
        load_recipe(REPOSITORY / "configs" / "diht_vitb32.py", "debug=Tru")


def test_missing_recipe_is_named():
    with pytest.raises(ValueError, match="configs/nothing.py: no such config file"):
        load_recipe("configs/nothing.py")


def unlocked_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.unlock()
    for section in (config.loss, config.optimizer, config.model, config.model.overrides):
        section.unlock()
    return config


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("loss", "betta", 0.5, "unknown config key 'loss.betta'; did you mean 'loss.beta'"),
        ("", "optimzer", 1, "unknown config key 'optimzer'; did you mean 'optimizer'"),
        ("", "learning_rate", 1.0, "did you mean 'optimizer.learning_rate'"),
        ("model.overrides", "text_layer", 2, "did you mean 'model.overrides.text_layers'"),
        ("optimizer", "xyzzy", 1, "known keys: .*optimizer.b1"),
    ],
)
def test_unknown_key_names_the_nearest(section, key, value, message):
    config = unlocked_config()
    target = config
    for name in filter(None, section.split(".")):
        target = target[name]
    target[key] = value
    with pytest.raises(ValueError, match=message):
        validate_config(config, default_config())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("seed", "zero", "'seed': expected int .*got str 'zero'"),
        ("loss", 3, "'loss': expected ConfigDict"),
    ],
)
def test_wrong_type_is_named(name, value, message):
    values = default_config().to_dict()
    values[name] = value
    with pytest.raises(ValueError, match=message):
        validate_config(ml_collections.ConfigDict(values), default_config())


def test_int_is_fine_for_float_but_bool_is_not():
    values = default_config().to_dict()
    values["loss"]["beta"] = 1
    validate_config(ml_collections.ConfigDict(values), default_config())
    values["loss"]["beta"] = True
    with pytest.raises(ValueError, match="'loss.beta': expected float"):
        validate_config(ml_collections.ConfigDict(values), default_config())


@pytest.mark.parametrize(
    "name, value, steps",
    [("total_steps", 7, 7), ("total_examples", 640, 10), ("total_epochs", 2.5, 39)],
)
def test_durations(name, value, steps):
    config = default_config()
    config[name] = value
    assert duration_in_steps(config, "total", batch_size=64, num_examples=1000) == steps


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "set exactly one of"),
        ({"total_steps": 3, "total_epochs": 1.0}, "set exactly one of"),
        ({"total_examples": 10}, "at least one step"),
    ],
)
def test_wrong_durations(values, message):
    config = default_config()
    config.update(values)
    with pytest.raises(ValueError, match=message):
        duration_in_steps(config, "total", batch_size=64, num_examples=1000)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.loss.betta=0.5"], 'Did you mean "beta"'),
        (["--config.loss.beta=much"], "--config.loss.beta=much"),
        (["--workdri=/tmp/x"], "Did you mean: workdir"),
        (["stray"], "unexpected arguments: stray"),
    ],
)
def test_command_line_slips_end_in_one_clear_line(arguments, message):
    command = [sys.executable, "-m", "diht_jax.train", "--config=configs/diht_vitb32.py"]
    done = subprocess.run(
        [*command, "--workdir=/nonexistent/never", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
