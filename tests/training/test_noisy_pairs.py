"""Equal captions and doubted pairs in real runs, and their settings."""

import dataclasses

import jax
import numpy as np
import pytest

from diht_jax.config import default_config
from diht_jax.input.examples import DecodeExample
from diht_jax.records.schema import Record, decode_record, encode_record
from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.objective import needs_pair_ids


@pytest.fixture
def repeated(squares, tmp_path):
    """The squares with four captions; every other one has a class, which counts instead."""
    records = map(decode_record, TFRecordSource(sorted(squares.glob("*.tfrecord"))))
    with TFRecordWriter(tmp_path / "repeated-0.tfrecord") as writer:
        for index, record in enumerate(records):
            metadata = {"kind": index % 3} if index % 2 else {}
            caption = f"a square of shade {index % 4}"
            changed = {"caption": caption, "metadata": metadata}
            writer.write(encode_record(dataclasses.replace(record, **changed)))
    return tmp_path / "repeated-0.tfrecord"


def test_a_run_in_micro_batches_knows_equal_pairs(config, repeated, tmp_path):
    config.data.train = str(repeated)
    config.data.class_key = "kind"
    config.total_steps, config.optimizer.warmup_steps = 4, 1
    config.micro_batch = 8
    config.loss.update(equal_pairs="positive", beta=0.25, noise_share=0.3)
    train(config, tmp_path / "run", devices=jax.devices()[:1])
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    # 16 examples of at most seven kinds: hardly one is alone.
    assert all(row["equal_pairs"] > 0.75 and row["skipped"] == 0 for row in rows)
    assert all(0 <= row["doubted_pairs"] <= 1 for row in rows)


def test_ids_are_equal_for_equal_tokens_or_equal_classes(squares):
    image = decode_record(TFRecordSource(squares / "squares-0.tfrecord")[0]).image

    def pair_id(caption, class_key="kind", **metadata):
        keys = {"pair_ids": True, "class_key": class_key}
        decode = DecodeExample(8, 16, (1, 1), "{caption}", **keys)
        data = encode_record(Record("key", image, caption, metadata))
        found = decode.random_map(data, np.random.default_rng(0))["pair_ids"]
        assert found.dtype == np.uint32 and found.shape == (2,)
        return tuple(found)

    # The tokens decide, which have no capitals and no space at the end.
    assert pair_id("A dog ") == pair_id("a dog") != pair_id("a cat")
    assert pair_id("a dog", kind=3) == pair_id("a cat", kind=3) != pair_id("a dog", kind=4)
    assert pair_id("a dog", kind="3") != pair_id("a dog", kind=3) != pair_id("a dog")
    assert pair_id("a dog", class_key=None, kind=3) == pair_id("a dog")
    ids = {pair_id(f"number {i}")[word] for i in range(500) for word in (0, 1)}
    assert len(ids) == 1000


def test_equal_pairs_that_nothing_asks_for_are_refused():
    config = default_config()
    assert not needs_pair_ids(config)
    config.data.class_key = "label"
    with pytest.raises(ValueError, match="config.data.class_key='label' .* 'mask' or 'positive'"):
        needs_pair_ids(config)
    config.loss.equal_pairs = "mask"
    assert needs_pair_ids(config)
