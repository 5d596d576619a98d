"""The bytes of `dataset.index`, against bytes assembled from its specification."""

import numpy as np

from diht_jax.data.index import update_index
from diht_jax.records.formats import TFRecordSource
from diht_jax.records.train_data import fingerprint_records
from tests import make
from tests.fuzz import framing

LENGTHS = (130, 0, 64, 1, 200)


def test_the_file_is_as_its_format_is_described(tmp_path):
    random, frames = np.random.default_rng(0), {}
    for number, count in enumerate(LENGTHS):
        records = [random.bytes(int(random.integers(0, 90))) for _ in range(count)]
        path = make.write_shard(tmp_path / f"part-{number}.tfrecord", records)
        frames[path.name] = list(map(framing.frame, records))
    rows = fingerprint_records(TFRecordSource(tmp_path)).shards  # from the shards themselves
    update_index(tmp_path)
    head, offsets = framing.dataset_index(frames, [int(digest, 16) for *_, digest in rows])
    assert (tmp_path / "dataset.index").read_bytes() == framing.with_preamble(head) + offsets
