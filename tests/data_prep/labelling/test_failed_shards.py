"""Shards that cannot be labelled, pictures that kill their worker, and changed inputs."""

import collections
import json
import pathlib
import shutil

import pytest

from data_prep.jobs.failures import with_output
from data_prep.jobs.workers import ProcessDeath
from data_prep.label import run_label
from data_prep.labelling import embeddings
from data_prep.labelling import job as label_job
from data_prep.teachers.precomputed import EmbeddingTable
from diht_jax.records.formats import TFRecordWriter, open_source
from diht_jax.records.labels.shards import decode_features, open_labels
from diht_jax.records.schema import decode_record, encode_record
from diht_jax.records.shard_files import read_records
from tests.data_prep.labelling.pictures import NUM_IMAGES, label_config, write_embeddings


@pytest.fixture
def job(work, tmp_path, monkeypatch):
    """A config for a copy of the filtered shards, and how often each shard was read."""
    reads = collections.Counter()
    real = embeddings.read_shard

    def read_shard(source):
        reads[source.path[-14:-9]] += 1
        return real(source)

    monkeypatch.setattr(embeddings, "read_shard", read_shard)
    kept = shutil.copytree(work / "kept", tmp_path / "kept")
    teacher = write_embeddings(tmp_path / "e.npz", _keys(kept))
    changes = {"merge": False, "report_images": 0, "heads__steps": 10, **teacher}
    return label_config(kept, tmp_path / "out", **changes), reads


def _keys(kept):
    records = open_source(kept)
    return [records.decode(records[i]).key for i in range(len(records))]


def _labelled(config):
    """Counts the records of each shard that have labels, joined like in training."""
    records = open_source(config.input)
    rows = open_labels(config.output, records, "labels")
    flags = [_is_labelled(rows[i]) for i in range(len(records))]
    return [sum(flags[start : start + 30]) for start in range(0, NUM_IMAGES, 30)]


def _is_labelled(label):
    return len(decode_features(label.data).get("labels", b"")) > 6


def _times(config, pattern):
    return {p.name: p.stat().st_mtime_ns for p in sorted(pathlib.Path(config.output).glob(pattern))}


def test_the_rest_is_labelled_and_a_later_run_picks_up_what_failed(job, tmp_path):
    config, reads = job
    path = tmp_path / "kept" / "pairs-train-00001.tfrecord"
    good = path.read_bytes()
    path.write_bytes(good[:40] + b"?" + good[41:])
    config.max_failed_shards = 0
    failures = run_label(config)
    assert list(failures) == [str(path)] and failures.exit_status == 1
    assert not (tmp_path / "out" / "labels/dataset.index").exists()

    config.max_failed_shards = 1
    failures = run_label(config)
    assert list(failures) == [str(path)] and failures.exit_status == 3
    (note,) = json.loads((tmp_path / "out" / "stats.json").read_text())["failed"]
    assert note["source"] == str(path) and "damaged" in note["error"]
    # Training can use the folder: records of the failed shard have no labels.
    assert _labelled(config) == [30, 0, 30]
    before = _times(config, "*/*.tfrecord")

    path.write_bytes(good)
    reads.clear()
    assert run_label(config) == {}
    assert reads == {"00001": 1}
    assert _labelled(config) == [30, 30, 30]
    now = _times(config, "*/*.tfrecord")
    assert {name for name in before if now[name] != before[name]} == {path.name}
    assert "failed" not in json.loads((tmp_path / "out" / "stats.json").read_text())
    assert not list((tmp_path / "out").rglob("*.failed.json"))


def test_embeddings_of_clips_without_a_failed_shard_are_no_labels_yet(job, monkeypatch):
    config, _ = job
    config.clip_teachers.models = "a model"
    failed = with_output({}, [{"source": "a shard", "error": "damaged"}])
    monkeypatch.setattr(label_job._Job, "embed_by_clips", lambda _: (failed, True))
    failures = run_label(config, 0, 2)  # another job has a shard that trains the heads
    assert list(failures) == ["a shard"] and failures.exit_status == 1


def test_every_picture_is_read_once_also_those_the_heads_learn_from(job, tmp_path):
    config, reads = job
    config.heads.update({"max_examples": 20, "max_held_out": 5})
    assert run_label(config) == {}
    assert reads == {"00000": 1, "00001": 1, "00002": 1}
    before, trained = _times(config, "*/*.tfrecord"), _times(config, "heads.npz")
    # A rewritten shard is labelled again; the heads are kept while few shards change.
    config.heads.max_changed_shards = 1
    _write_again(tmp_path / "kept" / "pairs-train-00002.tfrecord")
    reads.clear()
    assert run_label(config) == {}
    assert reads == {"00002": 1} and _times(config, "heads.npz") == trained
    now = _times(config, "*/*.tfrecord")
    assert {name for name in now if now[name] != before[name]} == {"pairs-train-00002.tfrecord"}
    config.heads.max_changed_shards = 0
    _write_again(tmp_path / "kept" / "pairs-train-00001.tfrecord")
    assert run_label(config) == {}
    assert _times(config, "heads.npz") != trained


def _write_again(path):
    """Rewrites a shard with other metadata in its first record."""
    records = [decode_record(data) for data in read_records(path)]
    records[0].metadata["again"] = True
    with TFRecordWriter(path) as writer:
        for record in records:
            writer.write(encode_record(record))
    path.with_name("dataset.index").unlink(missing_ok=True)


def test_files_of_shards_that_are_gone_are_removed_while_they_are_few(job, caplog):
    config, _ = job
    config.heads.max_changed_shards = 3
    assert run_label(config) == {}
    out, kept = pathlib.Path(config.output), pathlib.Path(config.input)
    (out / "labels" / "mine.txt").write_bytes(b"of somebody else")
    for path in (*kept.glob("*-00001.tfrecord*"), kept / "dataset.index"):
        path.unlink()
    config.max_changed_shards = 0
    with caplog.at_level("WARNING"):
        assert run_label(config) == {}
    assert "holds files of 1 shards that config.input no longer names" in caplog.text
    assert len(list(out.glob("*/*-00001.tfrecord"))) == 2
    config.max_changed_shards = 1
    assert run_label(config) == {}
    for name in ("labels", "embeddings"):
        left = {path.name[:17] for path in (out / name).iterdir()} - {"mine.txt", "dataset.index"}
        assert left == {"pairs-train-00000", "pairs-train-00002"}
    assert (out / "labels" / "mine.txt").exists()


def test_pictures_that_kill_their_worker_are_found_and_stay_without_labels(
    job, tmp_path, monkeypatch
):
    config, _ = job
    keys, embed = _keys(config.input), EmbeddingTable.embed

    def embed_or_die(teacher, records):
        def watch():
            for record in records:
                if record.key in (keys[3], keys[40]):
                    raise ProcessDeath("a model actor died")
                yield record

        return embed(teacher, watch())

    monkeypatch.setattr(EmbeddingTable, "embed", embed_or_die)
    # First while embedding the heads' shards, then in the pass that embeds and labels.
    for examples in (2000, 5):
        config.heads.update({"max_examples": examples, "max_held_out": examples})
        config.output = str(tmp_path / str(examples))
        assert run_label(config) == {}
        summary = json.loads((tmp_path / str(examples) / "stats.json").read_text())
        assert summary["unlabelled"] == {"crashed": 2} and summary["labelled"] == NUM_IMAGES - 2
        rows = open_labels(config.output, open_source(config.input), "labels")
        assert [i for i in range(NUM_IMAGES) if not _is_labelled(rows[i])] == [3, 40]
        assert not [p for p in (tmp_path / str(examples)).rglob("*") if p.name.endswith(".tmp")]
