"""Equal captions, doubted pairs, capped weights and schedules in real runs, and their settings."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from diht_jax.config import default_config, validate_config
from diht_jax.input.examples import DecodeExample
from diht_jax.records.schema import Record, decode_record, encode_record
from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.objective import checked_loss, needs_pair_ids, scheduled_settings

SCHEDULE = ((1, 0.0), (3, 0.5))


@pytest.fixture
def repeated(squares, tmp_path):
    """The squares with four captions, written in many ways; of every other one the class counts."""
    records = map(decode_record, TFRecordSource(sorted(squares.glob("*.tfrecord"))))
    with TFRecordWriter(tmp_path / "repeated-0.tfrecord") as writer:
        for index, record in enumerate(records):
            metadata = {"kind": index % 3} if index % 2 else {}
            caption = f"{('a', 'The')[index % 8 // 4]} square of shade {index % 4}" + index * "!"
            changed = {"caption": caption, "metadata": metadata}
            writer.write(encode_record(dataclasses.replace(record, **changed)))
    return tmp_path / "repeated-0.tfrecord"


def test_a_run_in_micro_batches_knows_equal_pairs_and_follows_the_schedule(
    config, repeated, tmp_path
):
    config.data.train = str(repeated)
    config.data.class_key, config.data.near_equal = "kind", True
    config.total_steps, config.optimizer.warmup_steps = 4, 1
    config.micro_batch = 8
    config.loss.update(
        equal_pairs="positive", beta_schedule=SCHEDULE, max_weight=1.05, noise_share=0.3
    )
    train(config, tmp_path / "run", devices=jax.devices()[:1])
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["beta"] for row in rows] == [0.0, 0.0, 0.25, 0.5]
    # 16 examples of at most seven kinds: hardly one is alone.
    assert all(row["equal_pairs"] > 0.75 and row["skipped"] == 0 for row in rows)
    assert all(0 <= row["doubted_pairs"] <= 1 for row in rows)


def test_ids_are_equal_for_equal_tokens_or_equal_classes(squares):
    image = decode_record(TFRecordSource(squares / "squares-0.tfrecord")[0]).image

    def pair_id(caption, class_key="kind", near_equal=False, **metadata):
        keys = {"pair_ids": True, "class_key": class_key, "near_equal": near_equal}
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
    # Or the words, where that is asked for, as long as there are some.
    near = functools.partial(pair_id, near_equal=True)
    assert near("A dog, on the grass!") == near("the dog on Grass") != near("grass on the dog")
    assert pair_id("a dog") != pair_id("the dog") and near("An") != near("the") != near("!")
    assert near("a dog", kind=3) == near("cats", kind=3) == pair_id("a dog", kind=3)


def test_schedules_are_lines_between_points():
    section = default_config().loss
    assert scheduled_settings(section, 3) == {}
    section.beta_schedule = ((100, 0.0), (300, 0.5), (400, 0.25))
    section.alpha_schedule = ((0, 0.9),)
    at = jax.jit(lambda step: scheduled_settings(section, step))
    betas = [float(at(step)["beta"]) for step in (0, 100, 200, 300, 350, 10_000)]
    np.testing.assert_allclose(betas, [0, 0, 0.25, 0.5, 0.375, 0.25], rtol=1e-6)
    assert float(at(7)["alpha"]) == np.float32(0.9)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"equal_pairs": "masked"}, "config.loss.equal_pairs: expected one of 'negative'"),
        ({"noise_share": 0.7}, "config.loss.noise_share: expected a number in"),
        ({"max_weight": 0.5, "beta": 0.5}, "config.loss.max_weight: expected a number above 1"),
        ({"beta_schedule": ((0, 1.0), (9, -1.0))}, "config.loss.beta_schedule: beta: .* got -1.0"),
        ({"alpha_schedule": ((9, 1.0), (0, 0.9))}, "config.loss.alpha_schedule=.* of rising steps"),
        ({"beta_schedule": (0.5,)}, r"config.loss.beta_schedule=\(0.5,\): expected points"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    config = default_config()
    config.loss.update(settings)
    validate_config(config, default_config())
    with pytest.raises(ValueError, match=message):
        checked_loss(config.loss)


def test_equal_pairs_that_nothing_asks_for_are_refused():
    config = default_config()
    assert not needs_pair_ids(config)
    config.data.class_key = "label"
    with pytest.raises(ValueError, match="config.data.class_key='label' .* 'mask' or 'positive'"):
        needs_pair_ids(config)
    config.data.update(class_key=None, near_equal=True)
    with pytest.raises(ValueError, match="config.data.near_equal=True says which pairs are equal"):
        needs_pair_ids(config)
    config.loss.equal_pairs = "mask"
    assert needs_pair_ids(config)
