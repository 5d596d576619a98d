"""Which checkpoints stay, and what is said when there is none."""

import jax
import numpy as np
import pytest

from diht_jax import sharding
from diht_jax.loading import load_model
from diht_jax.training.checkpoint import Checkpointer
from diht_jax.training.state import TrainState


class Place:
    """A data iterator that only knows its place."""

    def __init__(self, next_example):
        self.next_example = next_example

    def get_state(self):
        return {"next_example": self.next_example}

    def set_state(self, state):
        self.next_example = state["next_example"]


def state_of(step, value=0.0):
    place = sharding.replicated(sharding.create_mesh(8, 1))
    tree = TrainState(
        step=np.int32(step),
        params={"w": np.full((4, 2), value, np.float32)},
        opt_state={"mu": np.zeros(3, np.float32)},
        key_data=np.array([1, 2], np.uint32),
    )
    return jax.tree.map(lambda leaf: jax.device_put(leaf, place), tree)


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_the_last_ones_and_the_best_one_stay(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2, best_metric="val/top1")
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: None, 5: 0.2, 6: None}
    for step, score in scores.items():
        measured = None if score is None else {"val/top1": score, "val/top5": 1.0}
        checkpointer.save(state_of(step), Place(step * 10), measured)
    checkpointer.close()
    assert steps_in(tmp_path) == [2, 5, 6]


def test_state_and_place_come_back(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=1, best_metric=None)
    assert checkpointer.latest_step is None
    checkpointer.save(state_of(3, value=1.5), Place(77))
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path, keep_last=1, best_metric=None)
    place = Place(0)
    restored = checkpointer.restore(state_of(0), place)
    checkpointer.close()
    assert place.next_example == 77
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(3, value=1.5))


def test_a_relative_work_directory_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpointer = Checkpointer("run", keep_last=1, best_metric=None)
    checkpointer.save(state_of(2), Place(5))
    checkpointer.close()
    assert steps_in(tmp_path / "run") == [2]


def test_an_unknown_best_metric_names_the_known_ones(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=1, best_metric="val/top1")
    with pytest.raises(ValueError, match="'val/top1' is not among .*: cifar10/top1"):
        checkpointer.save(state_of(1), Place(0), {"cifar10/top1": 0.5})
    checkpointer.close()


def test_load_model_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no such work directory"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="config.json is missing"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ValueError, match="config.json: expected JSON"):
        load_model(tmp_path)
