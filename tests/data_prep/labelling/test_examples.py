"""Which images the heads learn from."""

import hashlib

import numpy as np
import pytest

from data_prep.labelling.embeddings import ShardEmbeddings, key_ranks, load_embeddings
from data_prep.labelling.examples import Examples, is_held_out, warn_of_few_mentions
from data_prep.labelling.vocabulary import make_targets
from diht_jax.records.tfrecord import TFRecordWriter


def test_split_by_keys_is_fair_and_independent():
    hashes = np.array(
        [
            int.from_bytes(hashlib.blake2b(str(i).encode(), digest_size=8).digest(), "little")
            for i in range(20_000)
        ],
        np.uint64,
    )
    ranks = [key_ranks(hashes, seed) for seed in (0, 1)]
    for rank in ranks:
        assert 0 <= rank.min() < rank.max() < 1
        np.testing.assert_allclose(np.histogram(rank, 10, (0, 1))[0], 2000, atol=200)
    assert abs(np.corrcoef(*ranks)[0, 1]) < 0.03
    assert is_held_out(hashes, 0.1, 0).mean() == pytest.approx(0.1, abs=0.01)
    assert is_held_out(hashes[5:], 0.1, 0).tolist() == is_held_out(hashes, 0.1, 0)[5:].tolist()


def test_few_mentions_are_warned_of(caplog):
    def examples(*counts):
        targets = make_targets(np.array(counts), np.zeros(sum(counts), np.int64))
        none = np.zeros((len(counts), 0), np.int32)
        return Examples(np.zeros((len(counts), 1)), {"objects": targets, "attributes": none})

    with caplog.at_level("WARNING"):
        warn_of_few_mentions(examples(1, 0, 1), examples(1))
        assert not caplog.records
        warn_of_few_mentions(examples(2, 0, 0, 0), examples(1, 0))
    assert "only 2 of 6 images name a concept" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_are_read_as_they_were_written(tmp_path, dtype):
    rows = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    made = ShardEmbeddings(["a", "b", "c", "d"], [rows[0], "image_empty", *rows[1:]], dtype)
    with TFRecordWriter(tmp_path / "e.tfrecord") as writer:
        for data in made.encode():
            writer.write(data)
    found = load_embeddings(str(tmp_path / "e.tfrecord"))
    assert (found.keys, found.rows.tolist()) == (["a", "b", "c", "d"], [0, 2, 3])
    assert found.count_missing() == {"image_empty": 1}
    assert found.embeddings.dtype == dtype
    np.testing.assert_array_equal(found.embeddings, rows)
