"""Output shards of equal size, and the lists of what was kept."""

import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep.captions.mentions import ConceptLog, concept_path, read_mentions
from data_prep.filtering import kept as kept_keys
from data_prep.filtering import resharding
from data_prep.filtering.decisions import DecisionLog, decisions_path, pack_uid
from data_prep.jobs import shards
from diht_jax.readers.registry import SourceShard
from diht_jax.records.dataset_info import write_dataset_info
from diht_jax.records.schema import Pair, decode_record, encode_record
from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter

_DROPPED = "0123456789abcdef" * 2
_UIDS = ["ffffffffffffffff0000000000000001", "00000000000000020000000000000003"]


def _keep(log: DecisionLog, key: str, uid: str | None, image_format: str | None) -> None:
    values = {"key": key, "uid": pack_uid(uid), "format": image_format}
    log.add(None, values | {"outcome": "kept"})


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
            log, concepts = DecisionLog(), ConceptLog()
            for n in range(first, first + count):
                writer.write(encode_record(Pair(f"k{n}", b"image", f"caption {n}")))
                log.add(None, {"key": "dropped", "outcome": "image", "reason": "empty"})
                _keep(log, f"k{n}", _UIDS[n] if n < 2 else None, "PNG" if n % 2 else "JPEG")
                concepts.add({"objects": frozenset({f"o{n}", "all"}), "attributes": frozenset()})
            log.write(decisions_path(str(writer.path)))
            concepts.write(concept_path(writer.path))
            return {}

        stats = shards.run_task(task, process, beside=(".decisions.parquet", ".concepts.npz"))
        parts.append((task, stats))
        number += count
    return parts


def _plan(parts, folder: pathlib.Path, examples: int) -> list[resharding.BalancedShard]:
    return resharding.plan_shards(
        parts, str(folder), dataset="pairs", split="train", examples_per_shard=examples
    )


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


def _write_old(path: pathlib.Path, rows) -> None:
    """The list of a part from before decisions were recorded."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_lists_of_keys_and_uids(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    uids = ["".join(rng.choice(list("0123456789abcdef"), 32)) for _ in range(300)] + _UIDS
    outputs, paths = [], []
    for i in range(3):
        rows = [
            (f"key {n}", uids[n].upper() if n % 2 else uids[n], "PNG")
            for n in range(i, len(uids), 3)
        ]
        rows += [("repeated", uids[0], None), ("without\na uid", "no uid", None)]
        outputs.append(str(tmp_path / f"{i}.tfrecord"))
        if i == 2:
            paths.append(tmp_path / "2.tfrecord.kept.json")
            _write_old(paths[-1], [(k, u.lower() if " " not in u else None, f) for k, u, f in rows])
            continue
        log = DecisionLog()
        for row in rows:
            log.add(None, {"key": "dropped", "outcome": "caption", "uid": pack_uid(_DROPPED)})
            _keep(log, *row)
        paths.append(pathlib.Path(decisions_path(outputs[-1])))
        log.write(str(paths[-1]))
    for most in (2**24, 40):  # sorted in one go, and range by range
        monkeypatch.setattr(kept_keys, "_MAX_SORTED", most)
        kept_keys.write_lists(str(tmp_path), kept_keys.read_kept(outputs))
        found = np.load(tmp_path / "kept_uids.npy")
        # As DataComp's own tools make the file.
        expected = np.array(
            sorted({(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids}), np.dtype("u8,u8")
        )
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    keys = (tmp_path / "kept_keys.txt").read_text().splitlines()
    assert keys[:2] == ["key 0", "key 3"]
    assert len(keys) == len(uids) + 6 and keys.count("without a uid") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["kept_keys.txt", "kept_uids.npy", *(path.name for path in paths)]
    )
    assert kept_keys.read_formats(outputs[0])[-3:] == ["PNG", None, None]
    assert kept_keys.read_formats(outputs[2])[-3:] == ["PNG", None, None]


def test_without_uids_there_is_no_array(tmp_path):
    _write_old(tmp_path / "x.kept.json", [("a", None, "PNG")])
    (tmp_path / "kept_uids.npy").write_bytes(b"old")
    kept_keys.write_lists(str(tmp_path), kept_keys.read_kept([str(tmp_path / "x")]))
    assert not (tmp_path / "kept_uids.npy").exists()
    assert (tmp_path / "kept_keys.txt").read_text() == "a\n"
