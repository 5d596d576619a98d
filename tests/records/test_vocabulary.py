"""Vocabulary files and their hashes: round trips, and errors that name the mismatch."""

import hashlib
import json

import google_crc32c
import pytest

from diht_jax.records.schema import Pair
from diht_jax.records.vocabulary import (
    ConceptList,
    Vocabulary,
    check_vocabulary,
    find_vocabulary,
    read_vocabulary,
    write_vocabulary,
)
from tests import make


def _vocabulary(objects=("dog", "polar bear", "café"), attributes=("black",)) -> Vocabulary:
    return Vocabulary(
        ConceptList("objects", tuple(objects), tuple(range(100, 100 - len(objects), -1))),
        ConceptList("attributes", tuple(attributes), (7,) * len(attributes)),
    )


def _write_shard(path, label) -> None:
    make.write_shard(path, [Pair("k", b"i", "c")])
    stats = {"counts": {"vocabulary": label}}
    (path.parent / f"{path.name}.stats.json").write_text(json.dumps(stats))


def _labelled_folder(folder, vocabulary, names=("a", "b")):
    folder.mkdir()
    write_vocabulary(folder, vocabulary)
    for name in names:
        _write_shard(folder / f"{name}.tfrecord", vocabulary.describe())
    return folder


def test_file_is_readable(tmp_path):
    vocabulary = _vocabulary()
    write_vocabulary(tmp_path, vocabulary)
    digest = hashlib.sha256("objects\ndog\npolar bear\ncafé".encode()).hexdigest()[:16]
    table = "id\tconcept\tcount\n0\tdog\t100\n1\tpolar bear\t99\n2\tcafé\t98\n"
    checksum = f"{google_crc32c.value(table.encode()):08x}"
    found = (tmp_path / "vocabulary_objects.tsv").read_text(encoding="utf-8")
    assert found == f"# objects {digest} 3 concepts {checksum}\n{table}"
    assert read_vocabulary(tmp_path) == vocabulary
    assert vocabulary.describe()["objects"] == {"size": 3, "hash": digest}


def test_hash_is_of_the_meaning_of_ids():
    first = _vocabulary().objects
    assert ConceptList("objects", first.names, (1, 1, 1)).hash == first.hash
    others = [
        ConceptList("objects", ("polar bear", "dog", "café"), first.counts),
        ConceptList("objects", ("dog", "polar bear"), (1, 1)),
        ConceptList("attributes", first.names, first.counts),
    ]
    assert len({first.hash, *(other.hash for other in others)}) == 4


@pytest.mark.parametrize("name", ["a\tb", ""])
def test_names_that_would_break_the_file(name, tmp_path):
    with pytest.raises(ValueError, match="cannot be kept as a concept"):
        write_vocabulary(tmp_path, _vocabulary(objects=(name,)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\tdog\t", "\tcat\t", "changed after it was written"),
        ("dog\t100", "dog", "not a vocabulary"),
    ],
)
def test_changed_files(old, new, message, tmp_path):
    write_vocabulary(tmp_path, _vocabulary())
    path = tmp_path / "vocabulary_objects.tsv"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_vocabulary(tmp_path)
    assert str(path) in str(error.value)


def test_mismatch_says_which(tmp_path):
    first = _labelled_folder(tmp_path / "first", _vocabulary())
    other = _vocabulary(attributes=("black", "white"))
    second = _labelled_folder(tmp_path / "second", other)
    with pytest.raises(ValueError, match="vocabularies differ") as error:
        find_vocabulary([first, second])
    for text in (str(first), str(second), "the attributes of", other.attributes.hash):
        assert text in str(error.value)
    assert "the objects of" not in str(error.value)
    _write_shard(first / "b.tfrecord", other.describe())
    with pytest.raises(
        ValueError, match=r"the attributes of '.*first/b\.tfrecord\.stats\.json' are 2 with"
    ):
        find_vocabulary(first)
    with pytest.raises(ValueError, match="the attributes of 'data' are absent"):
        check_vocabulary({}, _vocabulary().describe(), "data", "checkpoint")


def test_files_that_were_not_copied(tmp_path):
    folder = _labelled_folder(tmp_path / "first", _vocabulary())
    (folder / "b.tfrecord.stats.json").unlink()
    with pytest.raises(ValueError, match=r"b\.tfrecord\.stats\.json: names no vocabulary"):
        find_vocabulary(folder)
