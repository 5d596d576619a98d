"""CLIP_benchmark's layout: read by us, and by CLIP_benchmark itself with the same numbers."""

import pytest

from diht_jax.evaluation.sources.registry import open_units, read_source
from diht_jax.evaluation.task_parsing import parse_tasks
from tests import make

_WORDS = {
    "classnames.txt": "ant\nhot dog\n",
    "zeroshot_classification_templates.txt": "a {c}.\nthe {c}.\n",
}


def _write(root, notes, photos, files=_WORDS):
    """Two shards; `notes` are (extension, bytes), one a picture."""
    entries = [
        {"png": photo, name: note} for photo, (name, note) in zip(photos, notes, strict=False)
    ]
    return make.write_benchmark_folder(root, entries, files, num_shards=2)


def test_classification(tmp_path, photos):
    notes = [("cls", str(label).encode()) for label in (1, 0, 1, 1, 0)]
    source = _write(tmp_path / "insects", notes, photos)
    (task,) = parse_tasks([source])
    assert (task.name, task.kind) == ("insects", "classification")
    assert task.class_names == ("ant", "hot dog")
    assert task.templates == ("a {}.", "the {}.")
    pairs = list(read_source(source, {}))
    found = [(pair.key, pair.metadata["label"]) for pair in pairs]
    assert found == [("s/0", 1), ("s/2", 1), ("s/4", 0), ("s/1", 0), ("s/3", 1)]


def test_arrays_of_objects_are_skipped_and_not_unpickled(tmp_path, photos):
    notes = [("npy", make.npy([1, 0])), ("npy", make.npy([{}, 1]))]
    files = {**_WORDS, "dataset_type.txt": "multilabel\n"}
    entries = read_source(_write(tmp_path / "x", notes, photos, files=files), {})
    assert [getattr(entry, "reason", None) for entry in entries] == [None, "bad_row"]


def test_entries_without_a_usable_note_are_skipped(tmp_path, photos):
    notes = [("cls", b"1"), ("cls", b"first"), ("txt", b"a dog"), ("cls", b"0")]
    source = _write(tmp_path / "x", notes, photos)
    entries = list(read_source(source, {}))
    reasons = {entry.key: getattr(entry, "reason", None) for entry in entries}
    assert reasons == {"s/0": None, "s/1": "bad_row", "s/2": "bad_row", "s/3": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test/nshards.txt": None}, "there is no test/nshards.txt"),
        ({"test/nshards.txt": "3"}, "1 of 3 shards are missing: 2.tar"),
        ({"dataset_type.txt": "video"}, "expected one of classification, multilabel, retrieval"),
    ],
)
def test_broken_folders_are_explained(tmp_path, photos, change, message):
    source = _write(tmp_path / "x", [("cls", b"1"), ("cls", b"0")], photos)
    for name, text in change.items():
        path = tmp_path / "x" / name
        path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError) as raised:
        open_units(source, {})
    assert message in str(raised.value)
