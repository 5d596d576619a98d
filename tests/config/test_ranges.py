"""Out-of-range values and contradictory settings are reported at once, with the key's name."""

import dataclasses
import math
import sys

import pytest

from diht_jax.config import default_config
from diht_jax.config.checks import walk
from diht_jax.config.keys import Key, OneOf, Range
from diht_jax.training.program import TrainProgram
from diht_jax.training.recipe import all_keys, check_config
from tests import make

RANGES = {
    name: key.range
    for name, key in all_keys().items()
    if isinstance(key, Key) and isinstance(key.range, Range) and not isinstance(key.default, tuple)
}
NUMBERS = {name: kind for name, (_, kind) in walk(default_config()).items() if kind in (int, float)}
WORDS = [
    name
    for name, key in all_keys().items()
    if isinstance(key, Key) and isinstance(key.range, OneOf)
]


def test_every_number_has_a_range_and_no_other_key_has():
    assert RANGES.keys() == NUMBERS.keys()


@pytest.mark.parametrize("name", sorted(RANGES))
def test_values_beyond_both_ends_are_refused(name):
    def attempt(value):
        config = default_config()
        config.update_from_flattened_dict({name: value})
        check_config(config)

    expected, kind = dataclasses.asdict(RANGES[name]), NUMBERS[name]
    wrong = [kind(expected["low"] - 3)]
    if expected["excludes_low"]:
        wrong.append(kind(expected["low"]))
    else:
        attempt(kind(expected["low"]))
    if expected["high"] < sys.float_info.max:
        wrong.append(kind(expected["high"] + 1))
        if expected["excludes_high"]:
            wrong.append(kind(expected["high"]))
        else:
            attempt(kind(expected["high"]))
    if kind is float and expected["high"] == sys.float_info.max:
        wrong.append(math.inf)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^config\.{name}={value}: expected "):
            attempt(value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("log_every_steps", None, "config.log_every_steps=None: expected at least 1"),
        ("trackers", None, "config.trackers=None: this key cannot be unset; its default is "),
        ("optimizer.frozen", None, "config.optimizer.frozen=None: this key cannot be unset"),
        ("data.crop_scale", (0.9, 0.5), "crop_scale=.*: expected two numbers, the lower first"),
        ("affinity.temperatures", (0.1, -1.0), "temperatures=.*: expected numbers, each more"),
        *((name, "unknown", rf"^config\.{name}=unknown: expected one of ") for name in WORDS),
    ],
)
def test_other_values_are_refused(name, value, message):
    config = default_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=message):
        check_config(config)


LOCKED = {"optimizer.frozen": ("^vision/",)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.batch_size": 12}, "batch_size=12 is no multiple of the 8 devices"),
        ({"mesh.fsdp": 3}, "makes 6 devices, but there are 8"),
        ({"evaluation.use_ema": True}, "use_ema needs config.ema.decay"),
        ({"micro_batch": 12}, "config.micro_batch=12: expected a multiple of the 8 devices"),
        ({"loss.alpha": 1.5}, r"config.loss.alpha: expected a number in \[0, 1\], got 1.5"),
        ({"loss.weight": 0.0}, "config.loss.weight=0: nothing is left to learn from; expected"),
        ({"affinity.weight": 1.0}, "config.affinity.widths is not set: expected those of"),
        ({"matryoshka.sizes": (8, 4)}, r"sizes=\(8, 4\): expected rising whole numbers from 1"),
        ({"data.class_key": "label"}, "config.data.class_key='label' .* 'mask' or 'positive'"),
        ({"lora.rank": 2, "lora.towers": ("image",)}, "lora.towers=.*: expected some of vision, t"),
        ({"optimizer.frozen": ("^visoin/",)}, "'.visoin/' is found in no parameter's name"),
        ({"optimizer.frozen": ("",)}, "freezes every parameter"),
        ({**LOCKED, "optimizer.multipliers": (("text", 0.1),)}, "expected entries .*got .'text'"),
        ({"optimizer.warmup_steps": 20}, "expected less than the 20 steps"),
        ({"optimizer.schedule": "wsd", "optimizer.decay_steps": 21}, "21: expected at most 20"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    config = make.tiny_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        program = TrainProgram(config, 20)
        program.step(program.abstract_state())
