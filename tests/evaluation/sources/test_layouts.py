"""Layouts of evaluation sets: local, in a store, as parquet, and CLIP_benchmark's."""

import json

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from diht_jax.evaluation.protocols.retrieval import captions_of
from diht_jax.evaluation.sources.labels import VOC_CLASSES
from diht_jax.evaluation.sources.registry import open_units
from diht_jax.evaluation.task_parsing import parse_tasks
from tests import make

_FEATURES = {"label": {"names": ["ant", "hot_dog"], "_type": "ClassLabel"}}


@pytest.fixture(scope="module")
def sets(tmp_path_factory, photos):
    """Returns a folder with a small set in each layout."""
    root = tmp_path_factory.mktemp("sets")

    def write(name, data):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    for number, photo in enumerate(photos):
        write(f"pictures/{number}.png", photo)
        write(f"voc/JPEGImages/{number}.jpg", photo)
        write(f"birds/images/Blue_Jay/{number}.jpg", photo)
    for name in ("ant/1.png", "ant/2.PNG", "ant/z.jpg", "wasp/3.png", "wasp/drawn.svg"):
        write(f"classes/{name}", photos[len(name) % 5])
    for name in ("bee_fly/notes.txt", ".hidden/4.png", "wasp/.5.png", "readme.md"):
        write(f"classes/{name}", b"no picture of a class")
    write("splits/train/ant/0.png", photos[0])
    write("splits/test/bee/1.png", photos[1])
    rows = [{"image": f"{i}.png", "caption": f"text {i}"} for i in (0, 1, 2, 9)]
    write("captions.json", json.dumps(rows))
    example = {"id": 0, "image_0": "0", "image_1": "1", "caption_0": "a b", "caption_1": "b a"}
    write("examples.jsonl", json.dumps(example))
    write("birds/test_images.txt", "path\nBlue_Jay/3.jpg\nBlue_Jay/7.jpg\nGadwall/1.jpg\n")
    for name in VOC_CLASSES:
        states = "".join(f"{i} {(i + len(name)) % 3 - 1:2d}\n" for i in range(5))
        write(f"voc/ImageSets/Main/{name}_test.txt", states)
    words = {"classnames.txt": "one\ntwo\n", "zeroshot_classification_templates.txt": "{c}\n"}
    make.write_benchmark_folder(root / "evalsets/wds_mnist_test", [], words)
    files = {"dataset_type.txt": "multilabel", "classnames.txt": "ant\nbee\n"}
    entries = [{"png": photos[i], "npy": make.npy([i, -1])} for i in (0, 1)]
    make.write_benchmark_folder(root / "multi", entries, files, num_shards=2)
    row = {"filename": "0.png", "caption": "a", "negative_caption": "b"}
    write("add_att.json", json.dumps({"0": row, "1": row | {"filename": "none.png"}}))
    row = {"image_path": "1.png", "true_caption": "a", "false_caption": "b", "relation_name": "in"}
    boxes = [{"bbox_x": 0, "bbox_y": 0, "bbox_w": w, "bbox_h": 2} for w in (2, 3)]
    write("relations.json", json.dumps([row | box for box in boxes]))
    write("table.csv", "image,caption\npictures/0.png,a\npictures/1.png,b\n")
    pictures = [{"bytes": photo, "path": f"{i}.png"} for i, photo in enumerate(photos)]
    table = pyarrow.table({"image": pictures, "label": [1, 0, 1, 0, 1]})
    described = json.dumps({"info": {"features": _FEATURES}})
    table = table.replace_schema_metadata({"huggingface": described})
    pyarrow.parquet.write_table(table, root / "test-00000-of-00001.parquet")
    return root


# Source, where "{}" is the folder or its URL; its options; its pairs and skipped entries.
_SOURCES = {
    "annotations": ("annotations:{}/captions.json", {"image_root": "{}/pictures"}, 3, 1),
    "winoground": ("winoground:{}/examples.jsonl", {"image_root": "{}/pictures"}, 2, 0),
    "list": ("list:{}/birds/test_images.txt", {"image_root": "{}/birds/images"}, 1, 2),
    "voc": ("voc:{}/voc", {}, 5, 0),
    "clip_benchmark": ("clip_benchmark:{}/multi", {}, 2, 0),
    "clip_benchmark, split": ("clip_benchmark:{}/multi:test", {}, 2, 0),
    "classes": ("{}/classes", {}, 4, 1),
    "classes of a split": ("{}/splits", {"split": "test"}, 1, 0),
    "sugarcrepe": ("sugarcrepe:{}/add_att.json", {"image_root": "{}/pictures"}, 1, 1),
    "aro": ("aro:{}/relations.json", {"image_root": "{}/pictures"}, 2, 0),
    "table": ("{}/table.csv", {}, 2, 0),
    "parquet": ("{}/test-00000-of-00001.parquet", {}, 5, 0),
}


def test_entries_of_a_store_are_those_of_the_folder(sets):
    url = "memory://evaluation"
    fsspec.filesystem("memory").put(str(sets), url, recursive=True)
    for source, options, pairs, skipped in _SOURCES.values():
        found = []
        for root in (str(sets), url):
            given = {name: value.format(root) for name, value in options.items()}
            count = open_units(source.format(root), given).count_entries()
            found.append(list(open_units(source.format(root), given).entries()))
            assert count in (None, pairs + skipped), (source, root)
        strange = [getattr(entry, "reason", None) for entry in found[0]]
        assert strange.count(None) == pairs and len(strange) == pairs + skipped, source
        if source.startswith(("annotations", "list", "sugarcrepe")):
            # The message names the file's full path.
            found = [[(e.key, getattr(e, "image", None)) for e in entries] for entries in found]
        assert found[0] == found[1], source
    wasps = [pair for pair in open_units(f"{url}/classes/", {}).entries() if "wasp" in pair.key]
    assert wasps[0].metadata == {"label": 2, "class_name": "wasp"}
    with pytest.raises(ValueError, match="has no option 'image_column'; it has none"):
        open_units(f"{url}/classes", {"image_column": "image"})
    with pytest.raises(ValueError, match=r"test/bee/1\.png.*split=test"):
        open_units(f"{url}/splits", {})
    (task,) = parse_tasks(f"datacomp:{url}/evalsets")
    assert (task.name, task.class_names) == ("mnist", ("one", "two"))
    assert task.source == f"clip_benchmark:{url}/evalsets/wds_mnist_test"
    (task,) = parse_tasks(f"clip_benchmark:{url}/multi:test")
    assert (task.kind, task.class_names) == ("multilabel", ("ant", "bee"))
    for missing in ("voc:{}/none", "clip_benchmark:{}/none", "list:{}/none.txt"):
        with pytest.raises(ValueError, match="none"):
            open_units(missing.format(url), {})
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.mark.parametrize(
    ("source", "files", "message"),
    [
        ("list:{}/a.txt", {"a.txt": "no_folder.jpg"}, "expected one picture a line"),
        ("list:{}/a.txt", {"a.txt": "./no_folder.jpg"}, "expected one picture a line"),
        ("list:{}/a.txt", {"a.txt": "/bee/0.jpg"}, "expected one picture a line"),
        ("voc:{}", {"ImageSets/Main/aeroplane_test.txt": "000001 2"}, "'IMAGE -1'"),
        (
            "sugarcrepe:{}/a.json",
            {"a.json": '{"7": {"filename": "a"}}'},
            "row 7: expected texts",
        ),
        ("annotations:{}/a.json", {"a.json": '[{"picture": "0"}]'}, "row 0 has no field 'image'"),
        ("winoground:{}/a.jsonl", {"a.jsonl": '{"image_0": "0"}'}, "expected texts as image_1"),
    ],
)
def test_other_files_are_named(source, files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        list(open_units(source.format(tmp_path), {}).entries())
    assert str(tmp_path) in str(raised.value)


_WORDS = {
    "classnames.txt": "ant\nhot dog\n",
    "zeroshot_classification_templates.txt": "a {c}.\nthe {c}.\n",
}


def _write(root, notes, photos, files=_WORDS):
    """Writes two shards; `notes` has the (extension, bytes) of each image."""
    entries = [
        {"png": photo, name: note} for photo, (name, note) in zip(photos, notes, strict=False)
    ]
    return make.write_benchmark_folder(root, entries, files, num_shards=2)


def test_arrays_of_objects_are_skipped_and_not_unpickled(tmp_path, photos):
    notes = [("npy", make.npy([1, 0])), ("npy", make.npy([{}, 1]))]
    files = {**_WORDS, "dataset_type.txt": "multilabel\n"}
    units = open_units(_write(tmp_path / "x", notes, photos, files=files), {})
    assert [getattr(entry, "reason", None) for entry in units.entries()] == [None, "bad_row"]


def test_a_caption_that_an_image_has_twice_is_two_queries_as_in_clip_benchmark(tmp_path, photos):
    notes = [("txt", b"a dog\na cat\na dog \n"), ("txt", b"an ant\n")]
    source = _write(tmp_path / "x", notes, photos, files={"dataset_type.txt": "retrieval\n"})
    found = [captions_of(entry) for entry in open_units(source, {}).entries()]
    assert found == [("a dog", "a cat", "a dog"), ("an ant",)]


def test_entries_without_a_usable_note_are_skipped(tmp_path, photos):
    notes = [("cls", b"1"), ("cls", b"first"), ("txt", b"a dog"), ("cls", b"0")]
    source = _write(tmp_path / "insects", notes, photos)
    (task,) = parse_tasks([source])
    assert (task.name, task.kind, task.class_names) == (
        "insects",
        "classification",
        ("ant", "hot dog"),
    )
    assert task.templates == ("a {}.", "the {}.")
    entries = list(open_units(source, {}).entries())
    assert [entry.key for entry in entries] == ["s/0", "s/2", "s/1", "s/3"]
    assert [entries[0].metadata["label"], entries[-1].metadata["label"]] == [1, 0]
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
