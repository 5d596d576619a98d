"""Output shards of equal size, and the lists of what was kept."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep.captions.mentions import ConceptLog, concept_path, read_mentions
from data_prep.decisions.table import DecisionWriter, decisions_path
from data_prep.filtering import resharding
from data_prep.filtering.config import default_config
from data_prep.jobs import shards
from diht_jax.readers.registry import SourceShard
from diht_jax.records.dataset_info import write_dataset_info
from diht_jax.records.schema import Pair, decode_record, encode_record
from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter


def _make_parts(folder: pathlib.Path, counts, offset: int = 0) -> list:
    """Parts with so many records each, numbered through; every record names its number."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    parts, number = [], offset
    for i, count in enumerate(counts):
        path = folder / f"source{i}.tfrecord"
        with TFRecordWriter(path) as writer:
            writer.write(encode_record(Pair(f"s{count}", b"x", "x")))
        task = shards.ShardTask(
            SourceShard("tfrecord", str(path)), str(folder / "parts" / f"p{i}.tfrecord"), "c"
        )

        def process(source, writer, first=number, count=count):
            log, concepts = DecisionWriter(), ConceptLog()
            for n in range(first, first + count):
                writer.write(encode_record(Pair(f"k{n}", b"image", f"caption {n}")))
                log.add(2 * n, {"key": "dropped", "outcome": "image", "reason": "empty"})
                kept = {"key": f"k{n}", "outcome": "kept", "format": "PNG" if n % 2 else "JPEG"}
                log.add(2 * n + 1, kept)
                concepts.add({"objects": frozenset({f"o{n}", "all"}), "attributes": frozenset()})
            log.write(decisions_path(str(writer.path)))
            concepts.write(concept_path(writer.path))
            return {}

        stats = shards.run_task(task, process, companions=(".decisions.parquet", ".concepts.npz"))
        parts.append((task, stats))
        number += count
    return parts


def _plan(parts, folder: pathlib.Path, examples: int) -> list[resharding.BalancedShard]:
    config = default_config()
    config.examples_per_shard = examples
    return resharding.plan_shards(parts, str(folder), config)


@pytest.mark.parametrize(
    ("counts", "examples", "sizes"),
    [
        ([5, 0, 7, 1], 4, [3, 3, 3, 4]),
        ([5, 0, 7, 1], 13, [13]),
        ([5, 0, 7, 1], 1, [1] * 13),
        ([0, 0], 4, [0]),
        ([3], 2, [1, 2]),
    ],
)
def test_plan_covers_every_record_once_in_order(tmp_path, counts, examples, sizes):
    parts = _make_parts(tmp_path, counts)
    planned = _plan(parts, tmp_path, examples)
    assert [sum(s.stop - s.start for s in shard.slices) for shard in planned] == sizes
    starts = dict(zip([t.output for t, _ in parts], np.cumsum([0, *counts]), strict=False))
    covered = [
        int(starts[s.path]) + n
        for shard in planned
        for s in shard.slices
        for n in range(s.start, s.stop)
    ]
    assert covered == list(range(sum(counts)))
    assert len({shard.plan_hash for shard in planned}) == len(planned)


def test_shards_hold_the_records_with_what_belongs_to_them(tmp_path):
    parts = _make_parts(tmp_path, [5, 0, 7, 1])
    planned = _plan(parts, tmp_path, 4)
    done = []
    stats = [resharding.write_shard(shard, done.append) for shard in planned]
    assert sum(done) == 13
    keys = [decode_record(data).key for data in TFRecordSource(tmp_path / "pairs-train-*.tfrecord")]
    assert keys == [f"k{n}" for n in range(13)]
    assert [s["counts"]["image_formats"] for s in stats[:2]] == [
        {"JPEG": 2, "PNG": 1}, {"JPEG": 1, "PNG": 2}
    ]  # fmt: skip
    names, lengths, ids = read_mentions(planned[1].output, "objects")
    assert (names, lengths.tolist()) == (["all", "o3", "o4", "o5"], [2, 2, 2])
    assert ids.tolist() == [0, 1, 0, 2, 0, 3]
    assert stats[1]["counts"]["concepts"]["objects"] == {"all": 3, "o3": 1, "o4": 1, "o5": 1}
    assert None not in resharding.load_written(planned)

    write_dataset_info(
        tmp_path,
        dataset="pairs",
        split="train",
        shard_lengths=[s["output"]["records"] for s in stats],
        num_bytes=1,
        image_formats=["PNG"],
    )
    builder = tfds.builder_from_directory(tmp_path)
    dataset = builder.as_dataset(
        split="train", decoders={"image": tfds.decode.SkipDecoding()}, shuffle_files=False
    )
    assert sorted(example["key"].decode() for example in tfds.as_numpy(dataset)) == sorted(keys)

    # Other records, or another part of them, are another plan.
    changed = _plan(_make_parts(tmp_path / "other", [5, 0, 8, 1]), tmp_path, 4)
    assert list(resharding.load_written(changed))[-2:] == [None, None]
    resharding.remove_stale_shards(str(tmp_path), planned[:3])
    left = sorted(path.name for path in tmp_path.glob("pairs-train-*.tfrecord"))
    assert left == [f"pairs-train-{i:05d}.tfrecord" for i in range(3)]
    assert not list(tmp_path.glob("pairs-train-00003*"))


def test_foreign_shards_are_found(tmp_path):
    assert resharding.find_foreign(str(tmp_path)) == []
    with TFRecordWriter(tmp_path / "pairs-train-00000.tfrecord"):
        pass
    assert resharding.find_foreign(str(tmp_path)) == ["pairs-train-00000.tfrecord"]
