"""The label command end to end: output, resume, reproducible bytes, and rejected inputs."""

import collections
import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest

from data_prep.label import run_label
from data_prep.labelling import job as label_job
from data_prep.labelling.embeddings import embed_shard, hash_embeddings
from data_prep.labelling.examples import count_concepts, gather_examples
from data_prep.labelling.tasks import find_inputs, identify_inputs, plan_outputs
from data_prep.teachers.registry import describe_teacher
from diht_jax.records.formats import TFRecordWriter
from diht_jax.records.shard_files import read_records as read_tfrecords
from diht_jax.records.vocabulary import read_vocabulary, write_vocabulary
from tests.data_prep.filtering.jobs import read_records
from tests.data_prep.labelling.pictures import (
    COLORS,
    NUM_IMAGES,
    label_config,
    snapshot,
    write_embeddings,
)

_NAME_THEIR_FOLDER = {"report.html", "stats.json"}


def test_labels_are_what_the_teacher_sees(work):
    vocabulary = read_vocabulary(work / "labelled")
    assert sorted(vocabulary.objects.names) == ["car", "house", "rain"]
    assert sorted(vocabulary.attributes.names) == sorted(COLORS)
    hits = collections.Counter()
    records = read_records(work / "labelled")
    for record in records[:-1]:
        _, color, name, *_ = record.caption.split()
        assert record.object_ids.dtype == np.int32
        assert (len(record.object_ids), len(record.attribute_ids)) == (3, 3)  # all that exist
        assert np.all(np.diff(record.object_probs) <= 0)
        np.testing.assert_allclose(record.object_probs.sum(), 1, atol=2e-3)
        best = [vocabulary.objects.names[i] for i in record.object_ids[:2]]
        hits["object"] += set(best) == {name, "rain"}
        hits["attribute"] += vocabulary.attributes.names[record.attribute_ids[0]] == color
    assert min(hits.values()) >= 0.97 * (len(records) - 1)


def test_run_again_does_only_what_is_missing(work, tmp_path):
    folder = tmp_path / "out"
    config = label_config(work / "kept", folder, heads__steps=10)
    run_label(config)
    before = snapshot(folder)
    made = [*folder.glob("*.tfrecord"), *folder.glob("embeddings/*.tfrecord")]
    files = [*made, folder / "heads.npz"]
    labelled, embedded, heads = files[:3], files[3:6], files[6:]

    def changed() -> list[pathlib.Path]:
        new = {path: path.stat().st_mtime_ns for path in files}
        result = [path for path in files if new[path] != times[path]]
        times.update(new)
        return result

    times = {path: path.stat().st_mtime_ns for path in files}
    assert len(files) == 7
    run_label(config)
    assert changed() == [] and snapshot(folder) == before
    pathlib.Path(f"{labelled[1]}.stats.json").unlink()
    (folder / "report.html").unlink()
    run_label(config)
    assert changed() == [labelled[1]] and snapshot(folder) == before
    for path in (labelled[0], embedded[0]):
        pathlib.Path(f"{path}.stats.json").unlink()
    run_label(config)
    assert changed() == [labelled[0], embedded[0]] and snapshot(folder) == before
    config.top_k = 2
    run_label(config)
    assert set(changed()) == set(labelled)
    config.vocabulary.stop_objects = ("rain",)
    run_label(config)
    assert set(changed()) == {*labelled, *heads}
    assert "rain" not in read_vocabulary(folder).objects.names
    config.teacher.torch.image_size = 20
    run_label(config)
    assert set(changed()) == set(files)


def test_jobs_of_an_array_with_more_workers_make_the_same_folder(work, tmp_path):
    expected = snapshot(work / "labelled")  # made by one job in this process
    config = label_config(work / "kept", tmp_path / "out", num_workers=2)
    run_label(config, 0, 2)
    config.num_workers = 0
    assert not list((tmp_path / "out").glob("*.tfrecord"))
    run_label(config, 1, 2)
    assert not (tmp_path / "out" / "dataset_info.json").exists()
    run_label(config, 0, 2)
    found = snapshot(tmp_path / "out")
    assert found.keys() == expected.keys()
    different = {name for name in expected if found[name] != expected[name]}
    assert different <= _NAME_THEIR_FOLDER


def test_images_without_embedding_stay_without_labels(work, tmp_path):
    records = read_records(work / "kept")
    absent = {records[3].key, records[70].key}
    keys = [record.key for record in records if record.key not in absent]
    np.random.default_rng(0).shuffle(keys)
    files = write_embeddings(tmp_path / "e.npz", keys)
    config = label_config(work / "kept", tmp_path / "out", **files)
    assert run_label(config) == {}
    labelled = read_records(tmp_path / "out")
    empty = {record.key for record in labelled if not len(record.object_ids)}
    assert empty == absent
    summary = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert (summary["labelled"], summary["unlabelled"]) == (NUM_IMAGES - 2, {"no_embedding": 2})
    # Loaded heads also work with embeddings from another file, as for another data set.
    os.rename(tmp_path / "e.npz", tmp_path / "f.npz")
    files["teacher__precomputed__files"] = str(tmp_path / "f.npz")
    loaded = {"heads__load": str(tmp_path / "out")}
    # In a worker, which the time limit can stop.
    loaded |= {"shard_timeout_secs": 600.0, "num_workers": 1}
    assert run_label(label_config(work / "kept", tmp_path / "again", **files, **loaded)) == {}
    for one, other in zip(labelled, read_records(tmp_path / "again"), strict=True):
        np.testing.assert_array_equal(one.object_probs, other.object_probs)


def test_no_key_is_found(work, tmp_path):
    files = write_embeddings(tmp_path / "e.npz", ["000", "001", "002"])
    message = (
        f"0 of {NUM_IMAGES} keys found in config.teacher.precomputed; theirs look like "
        "'000', '001', yours like 't-00000000', 't-00000001'"
    )
    for _ in range(2):  # the second run also checks stored embeddings
        with pytest.raises(ValueError, match=message):
            run_label(label_config(work / "kept", tmp_path / "out", **files))


def test_heads_of_another_folder(work, tmp_path):
    stopped = {"vocabulary__stop_objects": ("car",)}
    config = label_config(
        work / "kept", tmp_path / "out", heads__load=str(work / "labelled"), **stopped
    )
    run_label(config)
    assert read_vocabulary(tmp_path / "out") == read_vocabulary(work / "labelled")
    for one, other in zip(
        read_records(tmp_path / "out"), read_records(work / "labelled"), strict=True
    ):
        np.testing.assert_array_equal(one.object_ids, other.object_ids)
        np.testing.assert_array_equal(one.object_probs, other.object_probs)
    other_teacher = {"heads__load": str(work / "labelled"), "teacher__torch__image_size": 20}
    with pytest.raises(ValueError, match="its heads belong to the teacher .*'image_size': 24"):
        run_label(label_config(work / "kept", tmp_path / "other", **other_teacher))
    assert not list((tmp_path / "other").glob("vocabulary_*"))
    with pytest.raises(ValueError, match=r"vocabulary_objects\.tsv is missing"):
        run_label(label_config(work / "kept", tmp_path / "none", heads__load=str(tmp_path)))


def test_a_vocabulary_of_heads_that_a_killed_run_did_not_make_is_replaced(work, tmp_path):
    folder = shutil.copytree(work / "labelled", tmp_path / "out")
    before = snapshot(folder)
    found = read_vocabulary(folder)
    names = tuple(reversed(found.objects.names))
    other = dataclasses.replace(found.objects, names=names)
    write_vocabulary(folder, dataclasses.replace(found, objects=other))
    assert run_label(label_config(work / "kept", folder)) == {}
    after = snapshot(folder)
    assert {name for name in before if before[name] != after.get(name)} <= _NAME_THEIR_FOLDER


def test_held_out_images_are_never_trained_on(work):
    config = label_config(work / "kept", work / "labelled")
    config_hash = hash_embeddings(describe_teacher(config.teacher).identity, "float16")
    inputs = find_inputs(config.input)
    embedded = plan_outputs(
        inputs, str(work / "labelled/embeddings"), config_hash, identify_inputs(inputs)
    )
    train, held_out = gather_examples(config, read_vocabulary(work / "labelled"), embedded)
    rows = [set(map(bytes, part.embeddings)) for part in (train, held_out)]
    assert not rows[0] & rows[1]
    assert len(train.embeddings) + len(held_out.embeddings) == NUM_IMAGES
    assert 0.1 < len(held_out.embeddings) / NUM_IMAGES < 0.4
    counts = count_concepts(train.of_kind("attributes").targets, 3)
    assert counts.sum() == len(train.of_kind("attributes").embeddings)
    config.heads.update({"max_examples": 20, "max_held_out": 10})
    fewer = gather_examples(config, read_vocabulary(work / "labelled"), embedded)
    assert 10 < len(fewer[0].embeddings) < 32 and 3 < len(fewer[1].embeddings) < 18
    assert set(map(bytes, fewer[1].embeddings)) <= rows[1]


def test_a_teacher_without_torch_says_what_to_install(work, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="torch is not installed; run: pip install torch"):
        run_label(label_config(work / "kept", tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_embeddings_in_another_order_are_refused(work, tmp_path):
    folder = shutil.copytree(work / "labelled", tmp_path / "out")
    for path in folder.glob("pairs*"):
        path.unlink()
    path = sorted(folder.glob("embeddings/*.tfrecord"))[0]
    records = list(read_tfrecords(path))
    with TFRecordWriter(path) as writer:
        for data in reversed(records):
            writer.write(data)
    (failure,) = run_label(label_config(work / "kept", folder)).values()
    assert str(path) in failure


@pytest.mark.parametrize("change", ["replaced", "gone"])
def test_an_input_that_changes_while_it_is_labelled(work, tmp_path, monkeypatch, change):
    kept = shutil.copytree(work / "kept", tmp_path / "kept")
    (kept / "dataset.index").unlink()
    shard = sorted(kept.glob("*.tfrecord"))[0]

    def change_input(task, report, **options):
        embed_shard(task, report, **options)
        if task.source.path != str(shard):
            return
        shard.unlink()
        if change == "replaced":
            records = list(read_tfrecords(sorted(kept.glob("*.tfrecord"))[0]))
            with TFRecordWriter(shard) as writer:
                for data in records:
                    writer.write(data)

    monkeypatch.setattr(label_job.embeddings, "embed_shard", change_input)
    with pytest.raises(ValueError, match=f"{shard.name} has changed"):
        run_label(label_config(kept, tmp_path / "out", merge=False))
    assert not (tmp_path / "out" / "labels" / "dataset.index").exists()


def test_damaged_metrics_of_heads_are_made_again(work, tmp_path):
    folder = shutil.copytree(work / "labelled", tmp_path / "out")
    path = folder / "heads.json"
    data = path.read_bytes()
    path.write_bytes(re.sub(rb'"recall_at_1": [01]\.\d', b'"recall_at_1": 0.7', data))
    assert path.read_bytes() != data
    assert run_label(label_config(work / "kept", folder)) == {}
    assert path.read_bytes() == data
