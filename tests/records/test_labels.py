"""Labels in files of their own: batches are those of merged records, to the bit, or an error.

The truth is the same labels written into the records themselves.
"""

import dataclasses
import functools
import json
import pickle
import shutil

import fsspec
import numpy as np
import pytest

from diht_jax.config import default_config
from diht_jax.data.index import update_index
from diht_jax.input.examples import DecodeExample
from diht_jax.input.mixing import open_mixture
from diht_jax.input.pipeline import TrainIterator, open_records
from diht_jax.records.fingerprint import fingerprint_records
from diht_jax.records.formats.registry import open_writer
from diht_jax.records.labels import files, rows
from diht_jax.records.labels.files import Manifest, encode_labels
from diht_jax.records.labels.rows import LabelRows, open_labels
from diht_jax.records.schema import encode_record
from diht_jax.records.vocabulary import (
    ConceptList,
    Vocabulary,
    find_train_vocabulary,
    train_vocabulary_sizes,
    write_vocabulary,
)
from diht_jax.storage.stores import open_system
from tests.training.conftest import colored_square

LENGTHS = (9, 1, 14)
VOCABULARY = Vocabulary(
    ConceptList("objects", tuple(f"o{i}" for i in range(300)), (1,) * 300),
    ConceptList("attributes", ("bright", "dull", "red"), (1, 1, 1)),
)
SIZES = (5, 3)


def labels_of(count, seed):
    """Rows that are labelled, and ids and probabilities of both kinds."""
    rng = np.random.default_rng(seed)
    labelled = np.flatnonzero(rng.random(count) < 0.8)
    predicted = []
    for k, part in zip(SIZES, VOCABULARY, strict=True):
        ids = np.array([rng.permutation(len(part))[:k] for _ in labelled]).reshape(-1, k)
        probs = rng.dirichlet(np.ones(k), len(labelled)).reshape(-1, k)
        predicted.append((ids.astype(np.int32), probs.astype(np.float32)))
    return labelled, predicted


def write_folders(folder, suffix=".tfrecord", seed=0):
    """`plain`, `labels` of it, and where the format can hold them `merged`."""
    merges = suffix != ".tar"
    for name in ("plain", "labels", *(["merged"] if merges else [])):
        (folder / name).mkdir(parents=True)
    (folder / "labels" / files.FOLDER).mkdir()
    first, predictions = 0, []
    for number, count in enumerate(LENGTHS):
        labelled, predicted = labels_of(count, seed + number)
        predictions.append((labelled, predicted))
        name = f"squares-{number:05d}{suffix}"
        with open_writer(folder / "plain" / name) as writer:
            for index in range(first, first + count):
                writer.write(encode_record(colored_square(index)))
        if merges:
            with open_writer(folder / "merged" / name) as writer:
                for row in range(count):
                    values = {n: np.zeros(0, np.int32) for n in _names()}
                    if row in labelled:
                        at = list(labelled).index(row)
                        arrays = [array[at] for pair in predicted for array in pair]
                        values = dict(zip(_names(), arrays, strict=True))
                    record = dataclasses.replace(colored_square(first + row), **values)
                    writer.write(encode_record(record))
        first += count
    for name in ("plain", "merged"):
        if suffix == ".tfrecord":
            update_index(str(folder / name))
    shards = fingerprint_records(open_records(str(folder / "plain"))).shards
    stated = []
    for shard, (labelled, predicted) in zip(shards, predictions, strict=True):
        name = f"{shard[0]}.npz"
        data, file = encode_labels(name, shard, VOCABULARY.describe(), SIZES, labelled, predicted)
        (folder / "labels" / files.FOLDER / name).write_bytes(data)
        stated.append(file)
    manifest = Manifest(("../plain",), VOCABULARY.describe(), SIZES, tuple(stated))
    (folder / "labels" / files.MANIFEST).write_bytes(manifest.encode())
    write_vocabulary(folder / "labels", VOCABULARY)
    if merges:
        write_vocabulary(folder / "merged", VOCABULARY)
    return folder


def _names():
    return ("object_ids", "object_probs", "attribute_ids", "attribute_probs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("labels"))


def mixture(train, labels=None, num_concepts=4, **values):
    config = default_config()
    config.data.update({"batch_size": 8, "block_records": 4, "window_blocks": 2, "num_streams": 4})
    config.data.update({"train": train, "labels": labels, "order": "global", **values})
    sizes = train_vocabulary_sizes(config.data.train, labels) if num_concepts else None
    return open_mixture(
        config.data,
        seed=3,
        open_source=open_records,
        make_decoder=functools.partial(
            DecodeExample, 16, 8, (0.5, 1.0), num_concepts=num_concepts, vocabulary_sizes=sizes
        ),
    )


def batches(source, count=7):
    iterator = TrainIterator(source, batch_size=8, seed=3, num_workers=0)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and "object_probs" in one
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_batches_are_those_of_merged_records(folders, order):
    expected = batches(mixture(str(folders / "merged"), order=order))
    assert any(batch["object_ids"].max() > 2**8 for batch in expected)
    assert any((batch["object_probs"] == 0).all(1).any() for batch in expected)  # no labels
    plain, labels = str(folders / "plain"), str(folders / "labels")
    assert_same(batches(mixture(plain, labels, order=order)), expected)
    # The folder of the labels knows its records.
    assert_same(batches(mixture(labels, order=order)), expected)


def test_array_records_and_tars(folders, tmp_path):
    expected = batches(mixture(str(folders / "merged")))
    for suffix in (".array_record", ".tar"):
        other = write_folders(tmp_path / suffix[1:], suffix)
        assert_same(batches(mixture(str(other / "plain"), str(other / "labels"))), expected)


def test_a_mixture_partly_in_a_store(folders, tmp_path):
    other = write_folders(tmp_path / "other", seed=50)
    system, _ = open_system("memory://x")
    system.put(str(folders), "/label_tests", recursive=True)

    def sources(name, **labels):
        return {
            "first": {"path": str(other / name), "weight": 1, "order": "global"} | labels,
            "second": {"path": f"memory://label_tests/{name}", "weight": 2, "order": "blocks"},
        }

    url = "memory://label_tests/labels"
    options = {"cache_dir": str(tmp_path / "cache")}
    expected = batches(mixture(sources("merged"), **options))
    joined = mixture(sources("plain", labels=str(other / "labels")), url, **options)
    assert_same(batches(joined), expected)
    # Copied once, under names that stand for their contents.
    assert len(list((tmp_path / "cache").glob("*-squares-*.npz"))) == len(LENGTHS)
    assert find_train_vocabulary(sources("plain", labels=str(other / "labels")), url) == VOCABULARY
    in_worker = pickle.loads(pickle.dumps(joined))
    assert all(in_worker[position] == joined[position] for position in range(50))


def test_files_are_opened_when_their_records_are_read(folders, monkeypatch):
    opened = []

    class Opened(rows.LocalFile):
        def __init__(self, path):
            opened.append(path.rpartition("-")[2])
            super().__init__(path)

    monkeypatch.setattr(rows, "LocalFile", Opened)
    records = open_records(str(folders / "plain"))
    labels = open_labels(str(folders / "labels"), records)
    assert opened == [] and len(labels) == sum(LENGTHS)
    for index in (9, 8, 9, 0):
        _ = labels[index]
    assert opened == ["00001.tfrecord.npz", "00000.tfrecord.npz"]
    again = pickle.loads(pickle.dumps(labels))
    with np.load(folders / "labels/labels/squares-00002.tfrecord.npz") as file:
        for row, expected in enumerate(file["labels"]):
            assert again[10 + row] == expected
        assert json.loads(file["identity"].item())["shard"][1] == LENGTHS[2]
    assert not mixture(str(folders / "plain"), str(folders), num_concepts=0).sources[0].labels


@pytest.mark.parametrize(
    ("path", "folder", "stated", "moved", "found"),
    [
        ("/a/kept", "/a/b/labels", "../../kept", "s3://x/b/labels", "s3://x/kept"),
        ("s3://x/a/kept", "s3://x/labels", "../a/kept", "/mnt/labels", "/mnt/a/kept"),
        ("gs://x/kept", "/labels", "gs://x/kept", "/mnt/labels", "gs://x/kept"),
    ],
)
def test_where_the_records_of_labels_lie(path, folder, stated, moved, found):
    assert files.relative_input(path, folder) == stated
    assert files.find_input(stated, folder) == path
    assert files.find_input(stated, moved) == found


def test_ten_of_each_kind_take_81_bytes():
    sizes = {"objects": {"size": 10_000}, "attributes": {"size": 2_000}}
    assert files.row_dtype(sizes, (10, 10)).itemsize == 81
    assert files.row_dtype({**sizes, "objects": {"size": 65_537}}, (10, 10)).itemsize == 121


def test_labels_without_one_kind():
    shard = ("a.tfrecord", 4, 1, "d")
    described = {"objects": {"size": 70_000}, "attributes": {"size": 0}}
    ids, probs = np.array([[7], [69_999]]), np.array([[1.0], [1.0]])
    nothing = (np.zeros((2, 0), np.int32), np.zeros((2, 0), np.float32))
    data, file = encode_labels("a", shard, described, (1, 0), [1, 3], [(ids, probs), nothing])
    found = np.frombuffer(data, files.row_dtype(described, (1, 0)), 4, file.rows_at)
    assert found["object_ids"].tolist() == [[0], [7], [0], [69_999]]
    assert found["labelled"].tolist() == [0, 1, 0, 1] and found["attribute_ids"].shape == (4, 0)
    assert encode_labels("a", shard, described, (1, 0), [], [nothing, nothing])[1].records == 4


def test_wrong_labels_are_an_error_at_the_start(folders, tmp_path):
    plain = str(folders / "plain")

    def changed(name):
        return shutil.copytree(folders / "labels", tmp_path / name)

    folder = changed("missing")
    (folder / "labels/squares-00001.tfrecord.npz").unlink()
    with pytest.raises(ValueError, match=r"config.data.labels=.*1 of 3 files.*00001.*is missing"):
        mixture(plain, str(folder))
    folder = changed("cut")
    path = folder / "labels/squares-00002.tfrecord.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00002.tfrecord.npz, which has \d+ bytes \(expected"):
        mixture(plain, str(folder))
    folder = changed("unfinished")
    (folder / "labels.json").unlink()
    with pytest.raises(ValueError, match=r"labels.json is missing; expected the output folder"):
        mixture(plain, str(folder))
    (folder / "labels.json").write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match=r"labels.json: not a list of labels"):
        mixture(plain, str(folder))
    # As many records of the same names, but others.
    other = write_folders(tmp_path / "other", seed=7)
    for shard in (other / "plain").glob("*"):
        shard.unlink()
    for number, count in enumerate(LENGTHS):
        with open_writer(other / "plain" / f"squares-{number:05d}.tfrecord") as writer:
            for index in range(count):
                writer.write(encode_record(colored_square(index + 100)))
    train = {"one": {"path": str(other / "plain"), "weight": 1, "labels": str(other / "labels")}}
    with pytest.raises(ValueError, match=r"data.train.one.labels=.*belongs to another shard than"):
        mixture(train)
    shutil.copy(other / "plain/squares-00000.tfrecord", tmp_path / "new-00000.tfrecord")
    with pytest.raises(ValueError, match=r"no labels of the shard .*new-00000.tfrecord; label"):
        mixture(str(tmp_path / "new-00000.tfrecord"), str(folders / "labels"))
    with pytest.raises(ValueError, match=r"config.data.train.one.labels=3: expected a folder"):
        mixture({"one": {"path": plain, "weight": 1, "labels": 3}})


def test_a_file_that_changes_during_the_run(folders, tmp_path):
    folder = shutil.copytree(folders / "labels", tmp_path / "labels")
    labels = open_labels(str(folder), open_records(str(folders / "plain")))
    (folder / "labels/squares-00000.tfrecord.npz").write_bytes(b"other")
    with pytest.raises(ValueError, match="is not the file that labels.json describes"):
        _ = labels[0]
    assert isinstance(labels, LabelRows) and labels[9]["labelled"] in (0, 1)


def test_a_checkpoint_knows_the_labels(folders, tmp_path):
    other = write_folders(tmp_path / "other", seed=50)  # the same records
    joined = [mixture(str(folders / "plain"), str(f / "labels")) for f in (folders, other)]
    found = [set(each.fingerprint().shards) for each in joined]
    assert len(found[0]) == 2 * len(LENGTHS) and len(found[0] & found[1]) == len(LENGTHS)


@pytest.fixture(autouse=True, scope="module")
def _empty_store():
    yield
    fsspec.filesystem("memory").store.clear()
