"""The table of update rules against tables made by hand, and the patterns that make no sense."""

import jax
import numpy as np
import pytest

from diht_jax.config import default_config
from diht_jax.training.optimizer import (
    merge_parameters,
    split_parameters,
    update_rules,
)


def section(**changes):
    config = default_config().optimizer
    config.update(changes)
    return config


def nested(shapes):
    tree = {}
    for path, shape in shapes.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.zeros(shape, np.float32)
    return tree


# Two image blocks, three text blocks.
SHAPES = {
    "log_logit_scale": (),
    "text/blocks/0/mlp/fc_in/bias": (16,),
    "text/blocks/0/mlp/fc_in/kernel": (4, 16),
    "text/blocks/1/mlp/fc_in/kernel": (4, 16),
    "text/blocks/2/mlp/fc_in/kernel": (4, 16),
    "text/final_norm/scale": (4,),
    "text/positional_embedding": (7, 4),
    "text/projection/kernel": (4, 5),
    "text/token_embedding/embedding": (9, 4),
    "vision/blocks/0/attention/in_proj/kernel": (6, 18),
    "vision/blocks/1/attention/in_proj/kernel": (6, 18),
    "vision/class_embedding": (6,),
    "vision/patch_embedding/kernel": (2, 2, 3, 6),
    "vision/positional_embedding": (5, 6),
    "vision/post_norm/scale": (6,),
    "vision/pre_norm/scale": (6,),
    "vision/projection/kernel": (6, 5),
}


def table(config):
    rules = update_rules(config, nested(SHAPES))
    return {path: (rule.learning_rate, rule.weight_decay) for path, rule in rules.items()}


def test_without_settings_matrices_decay_and_all_learn_alike():
    decayed = {path for path, (_, decay) in table(section()).items() if decay == 1.0}
    assert decayed == {path for path, shape in SHAPES.items() if len(shape) >= 2}
    assert all(row in ((1.0, 1.0), (1.0, 0.0)) for row in table(section()).values())


def test_layer_decay_counts_each_tower_from_its_top():
    expected = {
        "log_logit_scale": 1.0,
        "text/blocks/0/mlp/fc_in/bias": 0.125,
        "text/blocks/0/mlp/fc_in/kernel": 0.125,
        "text/blocks/1/mlp/fc_in/kernel": 0.25,
        "text/blocks/2/mlp/fc_in/kernel": 0.5,
        "text/final_norm/scale": 1.0,
        "text/positional_embedding": 0.0625,
        "text/projection/kernel": 1.0,
        "text/token_embedding/embedding": 0.0625,
        "vision/blocks/0/attention/in_proj/kernel": 0.25,
        "vision/blocks/1/attention/in_proj/kernel": 0.5,
        "vision/class_embedding": 0.125,
        "vision/patch_embedding/kernel": 0.125,
        "vision/positional_embedding": 0.125,
        "vision/post_norm/scale": 1.0,
        "vision/pre_norm/scale": 0.125,
        "vision/projection/kernel": 1.0,
    }
    rates = {path: rate for path, (rate, _) in table(section(layer_decay=0.5)).items()}
    assert rates == expected


def test_the_first_multiplier_found_counts_and_layer_decay_comes_on_top():
    config = section(
        layer_decay=0.5,
        multipliers=(("^text/.*embedding", 4.0, 0.0), ("^text/", 0.5, 2.0), ("scale", 3.0, 1.0)),
    )
    found = table(config)
    assert found["text/token_embedding/embedding"] == (0.25, 0.0)
    assert found["text/blocks/2/mlp/fc_in/kernel"] == (0.25, 2.0)
    assert found["text/blocks/0/mlp/fc_in/bias"] == (0.0625, 0.0)
    assert found["text/final_norm/scale"] == (0.5, 0.0)
    assert found["log_logit_scale"] == (3.0, 0.0)
    assert found["vision/projection/kernel"] == (1.0, 1.0)


def test_split_takes_every_leaf_once_and_merge_puts_them_back():
    params = nested(SHAPES)
    config = section(frozen=("^vision/", "log_logit_scale"))
    trained, frozen = split_parameters(config, params)
    assert trained.keys() == {"text"} and frozen.keys() == {"vision", "log_logit_scale"}
    merged = merge_parameters(trained, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (merged, params)), strict=True))
    partly, _ = split_parameters(section(frozen=("^vision/blocks/0/",)), params)
    assert partly["vision"]["blocks"].keys() == {"1"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frozen": ("^image/",)}, "frozen: '.image/' is found in no parameter's name"),
        ({"frozen": ("(",)}, "frozen: expected a regular expression"),
        ({"frozen": ("",)}, "freezes every parameter"),
        ({"multipliers": (("embeding", 0.1, 1.0),)}, "'embeding' is found in no"),
        ({"multipliers": (("text", 0.1),)}, "expected entries .*got .'text', 0.1."),
        ({"multipliers": ("text",)}, "expected entries .*got 'text'"),
        ({"multipliers": (("text", -1, 1.0),)}, "at least 0, got .'text', -1"),
        ({"multipliers": (("text", 1, "0"),)}, "at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        update_rules(section(**changes), nested(SHAPES))
