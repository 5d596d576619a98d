"""`--help` fits a screen, a command's own flags first, and `--config.help` lists every key."""

import ml_collections
import pytest

from diht_jax import command_line
from diht_jax.command_line import help_text
from diht_jax.command_line.help_text import read_comments
from diht_jax.config.checks import walk
from diht_jax.training.recipe import COMMENT_FILES, default_config


def listed_keys(text):
    names = (line.split("=")[0].strip() for line in text.splitlines() if "=" in line)
    return [name for name in names if name in walk(default_config())]


def test_the_sections_have_every_key_once():
    config, found = default_config(), []
    known = walk(config)
    sections = [
        name
        for name, (value, _) in known.items()
        if isinstance(value, ml_collections.ConfigDict) and len(value)
    ]
    for section in ["", *sections]:
        found += listed_keys(help_text.describe_keys(config, section, {}))
    assert sorted(found) == sorted(set(known) - set(sections))


def answer(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        command_line._help_or_flags(["train", *arguments], False, default_config, COMMENT_FILES)
    captured = capsys.readouterr()
    return caught.value.code, captured.out + captured.err


def test_keys_have_the_values_of_the_recipe(capsys):
    status, text = answer(capsys, "--config=emoji", "--config.help", "optimizer")
    assert status == 0
    assert "optimizer.weight_decay=0.2" in text  # of the recipe; 0.1 by default
    assert read_comments(COMMENT_FILES)["optimizer.weight_decay"] in text


@pytest.mark.parametrize("arguments", [("--config.help=optimiser",), ("--config.help", "optimizr")])
def test_an_unknown_section_is_refused_with_the_nearest(capsys, arguments):
    status, text = answer(capsys, *arguments)
    assert status == 2 and "did you mean 'optimizer'?" in text


def test_help_after_a_double_dash_is_an_argument():
    assert command_line.asks_for_help(["search", "--help"])
    assert not command_line.asks_for_help(["search", "--", "--help"])
