"""Which records are held out."""

import types

import numpy as np
import pytest

from diht_jax.records.train_data import held_out_records
from tests.make import tiny_config


def held_out(shards, share=0.1, seed=0):
    """Names of shards and places there, of shards `name -> length`."""
    records = types.SimpleNamespace(paths=list(shards), shard_lengths=np.array([*shards.values()]))
    data = tiny_config(data__validation_share=share).data
    numbers = held_out_records(records, data, seed)
    assert numbers.dtype == np.int64 and (np.diff(numbers) > 0).all()
    places = [(path.rpartition("/")[2], i) for path, n in shards.items() for i in range(n)]
    return {places[number] for number in numbers}


def test_a_record_is_held_out_whatever_shards_there_are():
    before = held_out({"a/x.tfrecord": 500, "a/y.tfrecord": 300})
    after = held_out({"b/w.tfrecord": 70, "b/y.tfrecord": 400, "b/x.tfrecord": 500})
    assert before == {place for place in after if place[0][0] in "xy" and place[1] < 500} - {
        ("y.tfrecord", i) for i in range(300, 400)
    }
    assert before != held_out({"a/x.tfrecord": 500, "a/y.tfrecord": 300}, seed=1)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5])
def test_about_the_share_is_held_out(share):
    n = 200_000
    found = len(held_out({"x.tfrecord": n}, share))
    assert abs(found - share * n) < 5 * np.sqrt(share * n)


def test_the_same_records_of_a_larger_share():
    assert held_out({"x.tfrecord": 2000}, 0.05) < held_out({"x.tfrecord": 2000}, 0.1)


@pytest.mark.parametrize(("share", "number"), [(1e-9, 0), (0.999999, 10)])
def test_a_share_that_leaves_nothing_is_refused(share, number):
    with pytest.raises(ValueError, match=f"validation_share={share} holds out {number} of the 10"):
        held_out({"x.tfrecord": 10}, share)
