"""Config keys on the command line: None for optional keys, and durations that replace others."""

import pytest

from data_prep.filtering.config import default_config as filter_config
from data_prep.labelling.config import default_config as label_config
from diht_jax.config import default_config
from diht_jax.config.checks import PathsOrSections, walk
from tests.docs.commands import parsed_flags
from tests.make import REPOSITORY

EMOJI = REPOSITORY / "configs" / "emoji.py"
STAGES = REPOSITORY / "configs" / "stages" / "diht_vitb16_stages.py"
CAT = REPOSITORY / "configs" / "prep" / "cat.py"


def parse(recipe, *arguments, command="diht_jax.train"):
    """Returns the config that a command reads from a command line."""
    needed = ["--workdir=x"] if command == "diht_jax.train" else []
    given = ["--config", str(recipe), *needed, *arguments]
    (config,) = parsed_flags(command, given, "config")
    return config


def durations(config, prefix="total"):
    return [config[f"{prefix}_{unit}"] for unit in ("steps", "examples", "epochs")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [None, None, 40.0]),
        (["--config.total_steps=40"], [40, None, None]),
        (["--config.total_epochs=None", "--config.total_steps=40"], [40, None, None]),
        (["--config.total_steps=40", "--config.total_steps=None"], [None, None, 40.0]),
    ],
)
def test_a_duration_of_the_command_line_replaces_the_recipes(arguments, expected):
    assert durations(parse(EMOJI, *arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.total_steps=40"], 4),
        (["--config.total_steps=51"], 50),  # the recipe's value, which fits
        (["--config.total_steps=40", "--config.optimizer.warmup_steps=45"], 45),  # refused later
    ],
)
def test_the_warm_up_of_a_recipe_fits_into_fewer_steps(arguments, expected):
    assert parse(EMOJI, *arguments).optimizer.warmup_steps == expected


MIXTURE = """
from diht_jax.config import default_config

def get_config():
    config = default_config()
    config.data.train = dict(
        laion=dict(path="/data/laion", weight=0.8), curated=dict(path="/data/curated", weight=0.2)
    )
    return config
"""


def test_training_data_is_a_path_or_sections(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(MIXTURE)
    laion = {"path": "/data/laion", "weight": 0.8}
    for arguments, weight in (([], 0.2), (["--config.data.train.curated.weight=0.5"], 0.5)):
        curated = {"path": "/data/curated", "weight": weight}
        found = parse(recipe, *arguments).data.train.to_dict()
        assert found == {"laion": laion, "curated": curated}
    assert parse(recipe, "--config.data.train=/data/kept").data.train == "/data/kept"


@pytest.mark.parametrize(
    "command, defaults",
    [
        ("diht_jax.train", default_config),
        ("data_prep.filter", filter_config),
        ("data_prep.label", label_config),
    ],
)
def test_none_unsets_every_optional_key(command, defaults, tmp_path):
    optional = {
        key: str if kind is PathsOrSections else kind
        for key, (value, kind) in walk(defaults()).items()
        if value is None
    }
    assert len(optional) > 4 and set(optional.values()) <= {bool, int, float, str, tuple}
    recipe = tmp_path / "recipe.py"
    values = {key: (1,) if kind is tuple else kind(1) for key, kind in optional.items()}
    lines = [f"    config.{key} = {value!r}" for key, value in values.items()]
    recipe.write_text(
        f"from {defaults.__module__} import default_config\n\n"
        "def get_config():\n"
        "    config = default_config()\n" + "\n".join(lines) + "\n    return config\n"
    )
    found = walk(parse(recipe, command=command))
    assert None not in [found[key][0] for key in optional]
    unset = [f"--config.{key}=None" for key in optional]
    found = walk(parse(recipe, *unset, command=command))
    assert {found[key][0] for key in optional} == {None}


# A recipe's path, or what `get_config` returns instead of a config.
@pytest.mark.parametrize(
    ("recipe", "arguments", "named"),
    [
        (EMOJI, ["--config.image_size=3"], "'image_size'; did you mean 'model.overrides.image_si"),
        (EMOJI, ["--config.optimizer.beta=3"], "'optimizer.beta'; did you mean 'loss.beta'"),
        (EMOJI, ["--config.seed=None"], "--config.seed=None: this key cannot be unset"),
        (EMOJI, ["--config.total_step=None"], "did you mean 'total_steps'"),
        (STAGES, ["--config.stage.number=2"], "--config.stage.number"),
        (CAT, [], f"{CAT}: looks like a recipe of another command"),
        (CAT, ["--config.total_steps=5"], f"{CAT}: looks like a recipe of another command"),
        ("3", [], "recipe.py: get_config() must return"),
        ("None", ["--config.total_steps=5"], "recipe.py: get_config() must return"),
        ("{}", ["--config.total_steps=5"], "recipe.py: get_config() must return"),
    ],
)
def test_what_is_wrong_is_named_as_typed(recipe, arguments, named, tmp_path, capsys):
    if isinstance(recipe, str):
        value, recipe = recipe, tmp_path / "recipe.py"
        recipe.write_text(f"def get_config():\n    return {value}\n")
    with pytest.raises(SystemExit) as error:
        parse(recipe, *arguments)
    assert error.value.code == 2
    assert named in capsys.readouterr().err
