"""Held-out records; changes that a data set's fingerprint detects, and the cost of keeping it."""

import os
import shutil
import types

import numpy as np
import pytest

from diht_jax.data.index import update_index
from diht_jax.records.formats import TFRecordSource, open_source
from diht_jax.records.train_data import (
    Fingerprint,
    describe_changes,
    fingerprint_records,
    held_out_records,
)
from tests import make
from tests.make import tiny_config


def write(path, sizes, fill=b"a"):
    make.write_shard(path, (fill * size for size in sizes))


@pytest.fixture
def folder(tmp_path):
    for shard in range(4):
        write(tmp_path / f"part-{shard}.tfrecord", (9000, 10 + shard, 9000))
    return tmp_path


def look(paths):
    return fingerprint_records(TFRecordSource(paths))


@pytest.mark.parametrize("name", [b"caf\xe9.tfrecord", "two\u2028lines.tfrecord".encode()])
def test_any_name_of_a_file_can_be_that_of_a_shard(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    write(path, range(50))
    found = look(tmp_path)
    assert Fingerprint.unpack(found.pack()) == found
    data = tiny_config(data__validation_share=0.5).data
    assert len(held_out_records(TFRecordSource(tmp_path), data, seed=0))
    update_index(tmp_path)
    assert look(tmp_path) == found


@pytest.mark.parametrize("suffix", ["tfrecord", "array_record"])
def test_a_shard_that_was_copied_over_another_is_named(tmp_path, suffix, caplog):
    paths = [str(tmp_path / f"part-{number}.{suffix}") for number in range(3)]
    for number, path in enumerate(paths):
        make.write_shard(path, [bytes([number]) * 20])
    fingerprint_records(open_source(paths))
    assert not caplog.records
    shutil.copy(paths[0], paths[2])
    fingerprint_records(open_source(paths))
    (record,) = caplog.records
    assert paths[0] in record.getMessage() and paths[2] in record.getMessage()


@pytest.mark.parametrize(
    "change, expected",
    [
        # Equal lengths with different ends.
        (
            lambda f: write(f / "part-1.tfrecord", (9000, 11, 9000), b"b"),
            ["1 changed (part-1.tfrecord)"],
        ),
        # Two records swapped: same size, same ends.
        (lambda f: write(f / "part-1.tfrecord", (9000, 9000, 11)), ["1 changed (part-1.tfrecord)"]),
        (
            lambda f: (f / "part-3.tfrecord").rename(f / "part-4.tfrecord"),
            ["1 added (part-4.tfrecord)", "1 removed (part-3.tfrecord)"],
        ),
    ],
)
def test_changes_are_named(folder, change, expected):
    before = look(folder)
    change(folder)
    for index in folder.glob("*.idx"):
        index.unlink()
    now = look(folder)
    assert now.digest != before.digest and describe_changes(before, now) == expected


def test_another_order_and_equal_names_are_reported(folder, tmp_path_factory):
    paths = sorted(folder.glob("*.tfrecord"))
    before, now = look(paths), look(paths[::-1])
    assert describe_changes(before, now) == ["the same shards in another order"]
    other = tmp_path_factory.mktemp("other")
    write(other / "part-0.tfrecord", (5,))
    both = look([*paths, other])
    assert describe_changes(before, both) == ["1 added (part-0.tfrecord (2))"]


def held_out(shards, share=0.1, seed=0):
    """Returns the names and indices of held-out records for shards `name -> length`."""
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
