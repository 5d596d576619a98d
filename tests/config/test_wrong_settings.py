"""Settings that make no sense are named when the program of a run is made, before any training."""

import pytest

from diht_jax.training.program import TrainProgram
from tests import make

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
