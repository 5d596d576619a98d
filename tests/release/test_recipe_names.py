"""Recipes are found by name from any folder, with arguments and overrides."""

import collections

import pytest

from diht_jax.config import find_recipe, list_recipes, load_recipe
from tests import make
from tests.docs.commands import parse_command, parsed_flags

RECIPES = list_recipes()


def test_every_recipe_has_a_name():
    files = {*make.RECIPES, *make.PREP_RECIPES.glob("*.py")}
    assert set(RECIPES.values()) == files
    assert {name: make.REPOSITORY / "configs" / f"{name}.py" for name in RECIPES} == RECIPES


def test_the_last_part_of_a_name_is_enough():
    parts = collections.Counter(name.rpartition("/")[2] for name in RECIPES)
    assert {part for part, count in parts.items() if count > 1} == set()
    assert find_recipe("cat") == find_recipe("prep/cat") == RECIPES["prep/cat"]


@pytest.mark.parametrize(
    "flag, recipe",
    [(["--config", "{}"], "demo"), (["--config={}"], "{repository}/configs/demo.py")],
)
def test_names_and_paths_take_arguments_and_overrides(flag, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe.format(repository=make.REPOSITORY)
    expected = load_recipe(make.REPOSITORY / "configs" / "demo.py", "debug=True")
    expected.seed = 123
    given = [text.format(f"{recipe}:debug=True") for text in flag]
    given += ["--config.seed=123", "--workdir=x"]
    (found,) = parsed_flags("diht_jax.train", given, "config")
    assert found.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    "command, name, meant",
    [("diht_jax.train", "dith_vitb16", "diht_vitb16"), ("data_prep.filter", "cta", "prep/cat")],
)
def test_an_unknown_name_is_refused_with_those_like_it_and_all(command, name, meant, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command(command, [f"--config={name}:debug=True"], lambda options: None)
    error = capsys.readouterr().err
    suggested, _, listed = error.partition("Recipes: ")
    assert caught.value.code == 2
    assert f"--config={name}: " in suggested and f"'{meant}'" in suggested
    assert set(listed.partition(";")[0].split(", ")) == set(RECIPES)


def test_a_path_that_is_missing_is_never_another_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"configs/prep/cat\.py: no such .*'prep/cat'"):
        find_recipe("configs/prep/cat.py")
