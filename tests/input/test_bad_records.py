"""Bad records in the training input are skipped, counted and named, also by workers."""

import errno
import os
import pathlib

import numpy as np
import pytest
from absl import logging

from diht_jax.config import default_config
from diht_jax.input.examples import DecodeExample
from diht_jax.input.order import make_order
from diht_jax.input.sub_batches import MAX_IN_A_ROW
from diht_jax.records.formats import TFRecordSource
from diht_jax.records.shard_files import TFRecordError
from diht_jax.records.train_data import open_records
from diht_jax.storage import stores
from diht_jax.storage.stores import StorageError
from tests import make
from tests.make import encoded, plain

DECODE = DecodeExample(4, 8, (0.9, 1.0), "{caption}")
BAD = {3: b"no picture", 11: b"", 17: b"\xff\xd8\xff"}


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> pathlib.Path:
    """24 records; image i has grey value i, and three records are bad in different ways."""
    path = tmp_path_factory.mktemp("records") / "pairs-train-00000.tfrecord"
    images = [BAD.get(n, encoded(plain((n,) * 3, (6, 5)))) for n in range(24)]
    records = [make.record(n, key=f"key{n}", image=image) for n, image in enumerate(images)]
    return make.write_shard(path, [record if record.image else b"no record" for record in records])


def read(shard, mode, num_workers=0, order="global"):
    source = open_records(str(shard))
    data = default_config().data
    data.update(batch_size=8, block_records=3, window_blocks=2)
    iterator = make.train_iterator(
        make.one_source(source, DECODE, order=make_order(source, order, data, seed=1)),
        batch_size=8,
        seed=1,
        num_workers=num_workers,
        on_bad_record=mode,
    )
    batches = make.take_batches(iterator, 3)
    return np.array([batch["images"][:, 0, 0, 0] for batch in batches]), iterator.skipped_records


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_skipping_is_counted_and_the_same_with_worker_processes(shard, monkeypatch, order):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    values, skipped_records = read(shard, "skip", order=order)
    assert values.shape == (3, 8)
    assert set(values.flatten().tolist()) == set(range(24)) - BAD.keys()
    assert skipped_records >= len(BAD)
    for number in BAD:
        assert any(f"{shard}: record {number}: " in text for text in said)
    assert any("'key3'" in text for text in said)
    if order == "blocks":
        return  # workers use the same function for the rows
    in_workers, counted = read(shard, "skip", num_workers=2)
    np.testing.assert_array_equal(in_workers, values)
    assert counted == skipped_records


def test_by_default_a_bad_record_is_an_error_that_names_it(shard):
    with pytest.raises(ValueError, match=rf"{shard}: record (3|11|17): "):
        read(shard, "error", num_workers=1)


def test_a_broken_shard_is_never_skipped(shard, monkeypatch):
    def refuse(*_):
        raise TFRecordError("the index is another's")

    monkeypatch.setattr(TFRecordSource, "__getitem__", refuse)
    with pytest.raises(TFRecordError, match="index"):
        read(shard, "skip")


def test_the_search_for_a_good_record_ends(tmp_path):
    records = [make.record(number, image=b"no picture") for number in range(24)]
    folder = make.write_records(tmp_path / "records", records)
    with pytest.raises(ValueError, match=f"{MAX_IN_A_ROW} records in a row are bad"):
        read(folder, "skip")


def test_a_disk_that_fails_for_a_moment_changes_no_batch(shard, monkeypatch):
    undisturbed = read(shard, "skip")
    really_read, failures, slept = os.pread, [], []
    failing_at = {}

    def failing(descriptor, size, offset):
        # Threads read concurrently: one record must fail three times, not three records once.
        if offset == failing_at.setdefault("offset", offset) and len(failures) < 3:
            failures.append(descriptor)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return really_read(descriptor, size, offset)

    monkeypatch.setattr(stores, "sleep", slept.append)
    monkeypatch.setattr(os, "pread", failing)
    values, skipped_records = read(shard, "skip")
    np.testing.assert_array_equal(values, undisturbed[0])
    assert skipped_records == undisturbed[1]
    assert slept == list(stores.DELAYS_SECS[:3])
    # The file was reopened for each attempt, since a stale descriptor stays stale.
    assert len(set(failures)) > 1


def test_a_disk_that_goes_on_failing_is_no_bad_record(shard, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(stores, "sleep", lambda secs: None)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StorageError, match=f"{shard}: could not be read in 5 attempts"):
        read(shard, "skip")
