"""Labels in separate shards give the batches of merged records, bit for bit, or an error.

The ground truth is the same labels merged into the records.
"""

import dataclasses
import functools
import os
import pickle
import shutil

import fsspec
import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from diht_jax.config import default_config
from diht_jax.data.index import update_index
from diht_jax.input.examples import DecodeExample
from diht_jax.input.mixing import open_mixture
from diht_jax.records.labels.clip_embeddings import (
    ClipEmbeddings,
    ClipFacts,
    ClipTeacher,
    Crops,
)
from diht_jax.records.labels.shards import (
    NO_CONCEPTS,
    Label,
    decode_label,
    encode_label,
    id_dtype,
    open_labels,
    seal,
)
from diht_jax.records.schema import CONCEPT_FIELDS
from diht_jax.records.shard_files import read_records as read_tfrecords
from diht_jax.records.train_data import (
    find_inputs,
    open_records,
    parse_train,
    relative_input,
    resolve_source,
)
from diht_jax.records.vocabulary import (
    ConceptList,
    Vocabulary,
    find_train_vocabulary,
    write_vocabulary,
)
from diht_jax.storage.stores import open_system
from tests import make
from tests.make import write_records
from tests.records.labels import write_clip_embeddings, write_labels
from tests.training.conftest import colored_square

LENGTHS = (9, 1, 9)
VOCABULARY = Vocabulary(
    ConceptList("objects", tuple(f"o{i}" for i in range(300)), (1,) * 300),
    ConceptList("attributes", ("bright", "dull", "red"), (1, 1, 1)),
)
SIZES = (5, 3)
FACTS = ClipFacts((ClipTeacher("clip", "f", 6, 16, 100.0),), Crops(0, (0.9, 1.0), 0), "int8")
NAMES = [name for names in CONCEPT_FIELDS for name in names]


def draw_labels(seed):
    """Returns objects and attributes of each record; two records of each longer shard have none."""
    rng = np.random.default_rng(seed)
    labels = []
    for length in LENGTHS:
        for number in range(length):
            concepts = [
                (rng.permutation(len(part))[:k], rng.dirichlet(np.ones(k)).astype(np.float32))
                for k, part in zip(SIZES, VOCABULARY, strict=True)
            ]
            labels.append([NO_CONCEPTS, NO_CONCEPTS] if number in (3, 5) else concepts)
    return labels


def write_folders(folder, suffix=".tfrecord", seed=0):
    """Writes `plain`, its `labels` and, if the format can hold labels, `merged`."""
    labels, first = draw_labels(seed), 0
    for name in ("plain", "merged"):
        (folder / name).mkdir(parents=True)
    for number, count in enumerate(LENGTHS):
        numbers = range(first, first + count)
        records = [colored_square(index) for index in numbers]
        merged = [
            dataclasses.replace(
                record,
                **dict(zip(NAMES, [a for pair in labels[i] for a in pair], strict=True)),
            )
            for record, i in zip(records, numbers, strict=True)
        ]
        for name, written in (("plain", records), ("merged", merged)):
            if name == "merged" and suffix == ".tar":
                continue
            make.write_shard(folder / name / f"squares-{number:05d}{suffix}", written)
        first += count
    if suffix == ".tfrecord":
        for name in ("plain", "merged"):
            update_index(str(folder / name))
    write_vocabulary(folder / "merged", VOCABULARY)
    write_labels(folder / "labels", folder / "plain", labels, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    yield write_folders(tmp_path_factory.mktemp("labels"))
    fsspec.filesystem("memory").store.clear()


def mixture(train, labels=None, num_concepts=4, **values):
    config = default_config()
    config.data.update({"batch_size": 8, "block_records": 4, "window_blocks": 2, "num_streams": 4})
    config.data.update({"train": train, "labels": labels, "order": "global", **values})
    sizes = tuple(map(len, VOCABULARY)) if num_concepts else None
    return open_mixture(
        config.data,
        seed=3,
        make_decoder=functools.partial(
            DecodeExample, 16, 8, (0.5, 1.0), num_concepts=num_concepts, vocabulary_sizes=sizes
        ),
    )


def batches(source, count=7, **options):
    iterator = make.train_iterator(source, batch_size=8, seed=3, num_workers=0, **options)
    return make.take_batches(iterator, count), iterator.skipped_records


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and "object_probs" in one
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_batches_are_those_of_merged_records(folders, order):
    expected, _ = batches(mixture(str(folders / "merged"), order=order))
    assert any(batch["object_ids"].max() > 2**8 for batch in expected)
    assert any((batch["object_probs"] == 0).all(1).any() for batch in expected)  # no labels
    plain, labels = str(folders / "plain"), str(folders / "labels")
    assert_same(batches(mixture(plain, labels, order=order))[0], expected)
    # The folder of the labels knows its records.
    assert_same(batches(mixture(labels, order=order))[0], expected)
    assert not mixture(plain, labels, num_concepts=0).sources[0].labels


@pytest.mark.parametrize(("suffix", "order"), [(".array_record", "global"), (".tar", "blocks")])
def test_array_records_and_tars(folders, tmp_path, suffix, order):
    expected, _ = batches(mixture(str(folders / "merged"), order=order))
    other = write_folders(tmp_path, suffix)
    joined = mixture(str(other / "plain"), str(other / "labels"), order=order)
    assert_same(batches(joined)[0], expected)


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
    expected, _ = batches(mixture(sources("merged"), **options))
    joined = mixture(sources("plain", labels=str(other / "labels")), url, **options)
    assert_same(batches(joined)[0], expected)
    # Each shard was copied once, under a name that identifies its contents.
    assert len(list((tmp_path / "cache").glob("*-squares-*.tfrecord"))) == len(LENGTHS)
    assert find_train_vocabulary(sources("plain", labels=str(other / "labels")), url) == VOCABULARY
    in_worker = pickle.loads(pickle.dumps(joined))
    for position in range(50):
        (_, found), (_, expected) = in_worker.read(position), joined.read(position)
        assert found.key == expected.key
        np.testing.assert_array_equal(found.object_ids, expected.object_ids)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_index_of_labels_that_is_made_again_knows_their_vocabulary(tmp_path, overwrite):
    labels = write_folders(tmp_path) / "labels"
    (labels / "labels/squares-00000.tfrecord").unlink()
    assert update_index(labels / "labels", overwrite=overwrite).num_shards == len(LENGTHS) - 1
    assert find_train_vocabulary(str(labels)) == VOCABULARY


def test_records_with_labels_but_no_vocabulary_are_no_source_of_a_mixture(folders, tmp_path):
    shutil.copytree(folders / "merged", tmp_path / "copied")
    sources = {
        "labelled": {"path": str(folders / "labels"), "weight": 1},
        "other": {"path": str(folders / "plain"), "weight": 1},
    }
    assert find_train_vocabulary(sources) == VOCABULARY
    # Copied records alone: their ids could mean anything.
    for path in (tmp_path / "copied").iterdir():
        if path.suffix != ".tfrecord":
            path.unlink()
    sources["other"]["path"] = str(tmp_path / "copied")
    with pytest.raises(ValueError, match=r"copied/squares-00000\.tfrecord: .*vocabulary"):
        find_train_vocabulary(sources)


def test_labels_are_messages_of_tensorflow(folders):
    """Decoded by protobuf; tests/readers/test_tfds.py has TensorFlow read the framing."""
    expected = [label for label in draw_labels(0) if len(label[0][0])]
    paths = sorted(map(str, (folders / "labels/labels").glob("*.tfrecord")))
    found = []
    for data in (data for path in paths for data in read_tfrecords(path)):
        example = tf_example_pb2.Example.FromString(data)
        (label,) = example.features.feature["labels"].bytes_list.value
        if len(label) > 6:
            numbers = np.frombuffer(label, "<u2", offset=6)
            found.append(np.split(numbers, 2))
    assert len(found) == len(expected)
    for (ids, probs), label in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ids, np.concatenate([part[0] for part in label]))
        right = np.concatenate([part[1] for part in label]).astype(np.float16)
        np.testing.assert_array_equal(probs.view(np.float16), right)


@pytest.mark.parametrize(("size", "num_bytes"), [(65_536, 120), (65_537, 164)])
def test_ten_of_each_kind_take_120_bytes(tmp_path, size, num_bytes):
    ids_type = id_dtype({"objects": {"size": size}, "attributes": {"size": 2_000}})
    ids = np.array([*range(9), size - 1])
    probs = np.full(10, 0.1, np.float16)
    path = tmp_path / "labels.tfrecord"
    make.write_shard(
        path, (encode_label(number, [(ids, probs)] * 2, ids_type) for number in range(100))
    )
    assert path.stat().st_size == 100 * num_bytes
    shard = ("train-00000.tfrecord", 1, 2, "0" * 16)
    data = encode_label(seal(shard, 0, "k"), [(ids, probs), NO_CONCEPTS], ids_type)
    found = decode_label(Label(data, "labels.tfrecord", shard, 0), "k")
    assert found[0][0].tolist() == ids.tolist() and found[1][0].size == 0


def test_a_damaged_label_is_an_error_or_a_record_that_is_skipped(folders, tmp_path):
    folder = shutil.copytree(folders / "labels", tmp_path / "labels")
    path = folder / "labels/squares-00001.tfrecord"  # a shard of one record
    data = path.read_bytes()
    path.write_bytes(data[:-6] + bytes([data[-6] ^ 1]) + data[-5:])
    source = mixture(str(folders / "plain"), str(folder))
    with pytest.raises(ValueError, match=r"squares-00001.tfrecord: record 0 is damaged"):
        batches(source)
    found, skipped = batches(source, count=sum(LENGTHS), on_bad_record="skip")
    assert skipped == 8  # once per epoch


@pytest.fixture(scope="module")
def equal_keys(tmp_path_factory):
    """Two shards whose records all have the same key, with their labels and CLIP embeddings."""
    folder = tmp_path_factory.mktemp("equal_keys")
    records = [dataclasses.replace(colored_square(i), key="same") for i in range(8)]
    write_records(folder / "plain", records, (4, 4))
    ids = [(np.array([number]), np.ones(1, np.float32)) for number in range(8)]
    write_labels(folder / "labels", folder / "plain", [[i, NO_CONCEPTS] for i in ids], VOCABULARY)
    rows = np.random.default_rng(0).normal(size=(8, 2, 6))
    write_clip_embeddings(folder / "labels", folder / "plain", FACTS, rows)
    return folder


def read_both(folder):
    """Yields each record with its concepts, then with its embeddings."""
    records = open_records(str(folder / "plain"))
    labels = open_labels(str(folder / "labels"), records, "labels")
    clips = ClipEmbeddings.open(str(folder / "labels"), records)
    assert len(records) == len(labels) == len(clips)
    for index in range(len(records)):
        yield labels.join(records.decode(records[index]), index)
        yield clips.join(records.decode(records[index]), index)


@pytest.mark.parametrize("kind", ["labels", "clip_embeddings"])
@pytest.mark.parametrize("change", ["exchange shards", "exchange records"])
def test_labels_of_other_records_are_noticed(equal_keys, tmp_path, kind, change):
    """Sizes, checksums and keys are valid, and the index is that of the changed shards."""
    folder = shutil.copytree(equal_keys, tmp_path / "changed")
    assert len(list(read_both(folder))) == 16
    first, last = (folder / f"labels/{kind}/train-0000{n}.tfrecord" for n in (0, 1))
    assert first.stat().st_size == last.stat().st_size
    if change == "exchange shards":
        data = first.read_bytes()
        first.write_bytes(last.read_bytes())
        last.write_bytes(data)
    else:
        data = list(read_tfrecords(first))
        make.write_shard(first, (data[number] for number in (1, 0, 2, 3)))
    update_index(str(first.parent), overwrite=True)
    with pytest.raises(ValueError, match=rf"{kind}/train-00000.tfrecord: record 0: the label bel"):
        list(read_both(folder))


def test_wrong_labels_are_an_error_at_the_start(folders, tmp_path):
    plain = str(folders / "plain")
    folder = shutil.copytree(folders / "labels", tmp_path / "changed")
    path = folder / "labels/squares-00002.tfrecord"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"config.data.labels=.*1 changed \(squares-00002.tf"):
        mixture(plain, str(folder))
    # A valid shard that is shorter than the record shard, with an updated index.
    make.write_shard(path, [b""])
    update_index(str(folder / "labels"))
    with pytest.raises(ValueError, match=r"00002.tfrecord has 1 records, and the shard .* has 9"):
        mixture(plain, str(folder))
    (folder / "labels/dataset.index").unlink()
    with pytest.raises(ValueError, match=r"labels/dataset.index is missing; expected the output"):
        mixture(plain, str(folder))


def test_labels_of_other_records_are_an_error_at_the_start(folders, tmp_path):
    """The same names and numbers of records, but other records."""
    other = tmp_path / "other"
    other.mkdir()
    for number, count in enumerate(LENGTHS):
        make.write_shard(
            other / f"squares-{number:05d}.tfrecord",
            (colored_square(index + 100) for index in range(count)),
        )
    labels = str(folders / "labels")
    train = {"one": {"path": str(other), "weight": 1, "labels": labels}}
    with pytest.raises(ValueError, match=r"data.train.one.labels=.*belongs to another shard than"):
        mixture(train)
    new = str(shutil.copy(other / "squares-00000.tfrecord", tmp_path / "new-00000.tfrecord"))
    with pytest.raises(ValueError, match=r"no labels of the shard .*new-00000.tfrecord; label"):
        mixture(new, labels)


def test_a_checkpoint_knows_the_labels(folders, tmp_path):
    other = write_folders(tmp_path / "other", seed=50)  # the same records
    joined = [mixture(str(folders / "plain"), str(f / "labels")) for f in (folders, other)]
    found = [set(each.fingerprint().shards) for each in joined]
    assert len(found[0]) == 2 * len(LENGTHS) and len(found[0] & found[1]) == len(LENGTHS)


def test_labels_find_their_records_when_both_were_moved(folders, tmp_path):
    assert relative_input("s3://x/a/kept", "s3://x/labels") == "../a/kept"
    assert relative_input("gs://x/kept", "/labels") == "gs://x/kept"
    assert relative_input("kept", "gs://x/labels") == os.path.abspath("kept")
    shutil.copytree(folders, tmp_path / "run[3]")
    (source,) = parse_train(str(tmp_path / "run[3]/labels"))
    assert resolve_source(source).path == [str(tmp_path / "run[3]/plain")]
    assert find_inputs(str(folders / "plain")) is None
