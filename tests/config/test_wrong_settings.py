"""Settings that make no sense are named when the program of a run is made, before any training."""

import pytest

from diht_jax.training.program import TrainProgram
from tests import make

LOCKED = {"optimizer.frozen": ("^vision/",)}
AFFINITY = {"affinity.weight": 1.0, "affinity.widths": (6, 10)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.batch_size": 12}, "batch_size=12 is no multiple of the 8 devices"),
        ({"mesh.fsdp": 3}, "makes 6 devices, but there are 8"),
        ({"evaluation.use_ema": True}, "use_ema needs config.ema.decay"),
        ({"micro_batch": 12}, "config.micro_batch=12: expected a multiple of the 8 devices"),
        ({"model.remat": "some"}, "config.model.remat='some': expected one of none, full"),
        ({"model.texts_per_row": 3}, "config.model.texts_per_row=3: expected a divisor of the 2"),
        ({"loss.kind": "triplet"}, "config.loss.kind='triplet': expected 'softmax'"),
        ({"loss.alpha": 1.5}, r"config.loss.alpha: expected a number in \[0, 1\], got 1.5"),
        ({"loss.weight": 0.0}, "config.loss.weight=0: nothing is left to learn from; expected"),
        ({"concepts.feature": "hidden"}, "config.concepts.feature='hidden'"),
        ({"affinity.weight": 1.0}, "config.affinity.widths is not set: expected those of"),
        ({**AFFINITY, "affinity.temperatures": (0.1,) * 3}, "one for each of the 2 teachers"),
        ({"matryoshka.sizes": (8, 4)}, r"sizes=\(8, 4\): expected rising whole numbers from 1"),
        ({"matryoshka.sizes": (4,), "matryoshka.weights": (1.0, 2.0)}, "of at least 0 for each"),
        ({"data.class_key": "label"}, "config.data.class_key='label' .* 'mask' or 'positive'"),
        ({"lora.rank": 2, "lora.towers": ("image",)}, "lora.towers=.*: expected some of vision, t"),
        ({"optimizer.frozen": ("^visoin/",)}, "'.visoin/' is found in no parameter's name"),
        ({"optimizer.frozen": ("(",)}, "frozen: expected a regular expression"),
        ({"optimizer.frozen": ("",)}, "freezes every parameter"),
        ({**LOCKED, "optimizer.multipliers": (("text", 0.1),)}, "expected entries .*got .'text'"),
        ({**LOCKED, "optimizer.multipliers": (("text", -1, 1.0),)}, "at least 0, got .'text', -1"),
        ({"optimizer.kind": "lion"}, "kind='lion': expected one of adamw, muon"),
        ({"optimizer.warmup_steps": 20}, "expected less than the 20 steps"),
        ({"optimizer.schedule": "linear"}, "schedule='linear': expected one of cosine, wsd"),
        ({"optimizer.decay_steps": 5}, "decay_steps=5 is of config.optimizer.schedule='wsd'"),
        ({"optimizer.schedule": "wsd", "optimizer.decay_steps": 21}, "21: expected at most 20"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    config = make.tiny_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        program = TrainProgram(config, 20)
        program.step(program.abstract_state())
