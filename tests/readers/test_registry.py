"""The registry picks a reader for every source, and counts a reason for each skipped entry."""

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from PIL import features

from diht_jax.input.transforms import decode_rgb
from diht_jax.readers import image_folder
from diht_jax.readers.registry import FORMATS, Skipped, list_shards, open_source, read_pairs
from diht_jax.records.schema import Pair
from tests.readers.inputs import JPEG, PNG, encoded_image, read_entries, skip_reasons, write_tar


def _write(folder, *names, data=PNG):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_class_folders(tmp_path):
    _write(tmp_path, "b/2.png", "b/1.jpg", "b/3.PNG", "a_c/x.webp", ".cache/z.png", "b/.y.png")
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    shards = list_shards(str(tmp_path))
    assert len(shards) == 3
    pairs = [pair for shard in shards for pair in read_pairs(shard)]
    assert [(p.key, p.caption, p.metadata["label"]) for p in pairs] == [
        ("a_c/x.webp", "a c", 0),
        ("b/1.jpg", "b", 1),
        ("b/2.png", "b", 1),
        ("b/3.PNG", "b", 1),
    ]
    assert pairs[0].metadata["class_name"] == "a_c"


def test_class_folders_read_what_pillow_reads_and_count_the_rest(tmp_path):
    formats = {"gif": "GIF", "bmp": "BMP", "TIFF": "TIFF", "jfif": "JPEG", "jp2": "JPEG2000"}
    formats |= {"avif": "AVIF"} if features.check("avif") else {}
    for extension, name in formats.items():
        _write(tmp_path, f"dog/a.{extension}", data=encoded_image(name))
    _write(tmp_path, "dog/b.heic", "dog/c.SVG", data=b"another format")
    entries = read_entries(str(tmp_path))
    found = {entry.key: entry for entry in entries if isinstance(entry, Pair)}
    assert found.keys() == {f"dog/a.{extension}" for extension in formats}
    for pair in found.values():
        assert decode_rgb(pair.image).size == (4, 3)
    assert skip_reasons(entries) == dict.fromkeys(("dog/b.heic", "dog/c.SVG"), "unsupported_format")


def test_links_of_class_folders_that_lead_out_are_refused(tmp_path):
    root, outside = tmp_path / "classes", tmp_path / "outside"
    _write(root, "cat/a.png", "dog/a.png")
    _write(outside, "deep/a.png")
    (root / "dog" / "inside.png").symlink_to(root / "cat" / "a.png")
    (root / "dog" / "out.png").symlink_to(outside / "deep" / "a.png")
    (root / "dog" / "out").symlink_to(outside)
    (root / "dog" / "notes.txt").symlink_to("/etc/hostname")
    (root / "fox").symlink_to(outside)
    entries = read_entries(str(root))
    assert [e.key for e in entries if isinstance(e, Pair)] == [
        "cat/a.png",
        "dog/a.png",
        "dog/inside.png",
    ]
    assert skip_reasons(entries) == dict.fromkeys(("dog/out", "dog/out.png", "fox"), "refused_path")


def test_parquet_with_images(tmp_path):
    rows = [
        {"key": "a", "jpg": JPEG, "txt": "one", "width": 4, "mask": {"bytes": PNG, "path": "a"}},
        {"key": "b", "jpg": None, "txt": "two", "width": None},
        {"key": "c", "jpg": PNG, "txt": " ", "width": 4},
        {"key": "a", "jpg": JPEG, "txt": "again", "width": 4},
    ]
    path = tmp_path / "00000.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    expected = [
        Pair("a", JPEG, "one", {"width": 4, "mask": {"bytes": None, "path": "a"}}),
        Skipped("b", "no_image", "nothing in column 'jpg'"),
        Skipped("c", "no_caption", "nothing in column 'txt'"),
        Skipped("a", "duplicate", "the key was there before"),
    ]
    for spec in (str(path), str(tmp_path), str(tmp_path / "*.parquet")):
        assert read_entries(spec) == expected
        source = open_source(spec)  # as evaluation, embed, search and users read it
        assert list(source) == expected[:1]
        assert source.skipped == {"no_image": 1, "no_caption": 1, "duplicate": 1}
    assert FORMATS["parquet"].count(list_shards(str(path))[0]) == 4
    # Next to tars, such files hold the metadata of the tars' pairs.
    tar = write_tar(tmp_path / "00000.tar", [("k.png", PNG), ("k.txt", b"text")])
    for spec in (str(tmp_path), str(tmp_path / "0*")):
        assert [shard.path for shard in list_shards(spec)] == [tar]
    # The filter's file next to a shard is not a table either.
    (tmp_path / "00000.tar.samples.tsv").write_text("kept\t0\t{}\n")
    assert [shard.path for shard in list_shards(str(tmp_path))] == [tar]


def test_nothing_or_too_much_found(tmp_path):
    with pytest.raises(ValueError, match="nothing at"):
        open_source(str(tmp_path / "*.tar"))
    with pytest.raises(ValueError, match="holds neither"):
        open_source(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt: not a source of pairs"):
        open_source(str(tmp_path / "notes.txt"))
    write_tar(tmp_path / "a.tar", [])
    (tmp_path / "t.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="several kinds of source"):
        open_source(str(tmp_path))


def test_each_source_may_have_options_of_its_own(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.csv").write_text("file,title\na.png,one\na.png,two\n")
    (tmp_path / "b.csv").write_text("image,caption,id\na.png,three,k\n")
    first = f"{tmp_path}/a.csv?image_column=file&caption_column=title&rows_per_shard=1"
    shards = list_shards([first, f"{tmp_path}/b.csv"], key_column=None)
    assert [shard.options["rows_per_shard"] for shard in shards] == [1, 1, 10_000]
    source = open_source([first, f"{tmp_path}/b.csv?key_column=id"])
    assert [(p.key, p.caption) for p in source][1:] == [("a-00000001", "two"), ("k", "three")]
    # An option for all sources applies unless a source overrides it.
    source = open_source([f"{tmp_path}/a.csv?caption_column=title"], image_column="file")
    assert [p.caption for p in source] == ["one", "two"]
    tar = write_tar(tmp_path / "x1=a.tar", [("k.png", PNG), ("k.txt", b"text")])
    assert [s.path for s in list_shards(f"{tmp_path}/x?=a.tar")] == [tar]  # a glob
    for spec, message in (
        ("a.csv?image_colum=file", r"a\.csv\?image_colum=file: .*did you mean 'image_column'"),
        ("x1=a.tar?image_column=file", r"\(webdataset\) has no option 'image_column'; it has none"),
    ):
        with pytest.raises(ValueError, match=message):
            list_shards(f"{tmp_path}/{spec}")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/dog/1.png", "val/dog/1.png"), r"train/dog/1\.png.*\?split=train"),
        (("train/1.png", "val/2.png"), r"train, val.*\?split=train"),
        (("animals/dogs/1.png",), r"animals/dogs/1\.png"),
        (("dog/1.png", "dog/deep/2.png"), r"dog/deep/2\.png"),
    ],
)
def test_folders_that_are_no_classes_are_an_error(tmp_path, names, message):
    _write(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        list_shards(str(tmp_path))


def test_captions_in_files_of_a_store_are_refused_with_what_to_do():
    system = fsspec.filesystem("memory")
    system.pipe_file("/captions/1.png", PNG)
    system.pipe_file("/captions/1.txt", b"one")
    with pytest.raises(ValueError, match=r"memory://captions'.*must be copied or mounted"):
        list_shards("memory://captions")


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    _write(tmp_path, "bus/1.png", "train/1.png")
    assert [pair.caption for pair in read_entries(str(tmp_path))] == ["bus", "train"]


def test_a_split_of_a_folder_is_read_alone(tmp_path):
    _write(tmp_path, "train/dog/1.png", "val/cat/1.png")
    expected = ["cat"]
    assert [pair.caption for pair in read_entries(f"{tmp_path}?split=val")] == expected
    assert [pair.caption for pair in read_entries(str(tmp_path), split="val")] == expected
    with pytest.raises(ValueError, match="no sub-folder 'tset'"):
        list_shards(f"{tmp_path}?split=tset")


def test_captions_in_files_give_the_pairs_of_the_packed_tar(tmp_path):
    members = {
        "0/a.jpg": JPEG,
        "0/a.txt": b"one",
        "0/a.json": b'{"width": 4}',
        "0/b.arw": b"the camera's own",
        "0/b.png": PNG,
        "0/b.json": b'{"caption": "two"}',
        "1/c.png": PNG,
        "1/d.txt": b"no picture",
    }
    for name, data in members.items():
        _write(tmp_path / "files", name, data=data)
    # img2dataset's description of a folder, and its counts.
    _write(tmp_path / "files", "0_stats.json", data=b'{"count": 2}')
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "files" / "0.parquet")
    entries = read_entries(str(tmp_path / "files"))
    assert entries == read_entries(write_tar(tmp_path / "a.tar", members))
    assert [entry.key for entry in entries if isinstance(entry, Pair)] == ["0/a", "0/b"]


def test_parts_of_a_folder_of_captions_cover_it_once(tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "_SAMPLES_PER_SHARD", 2)
    for number in range(5):
        _write(tmp_path, f"{number}.PNG")
        _write(tmp_path, f"{number}.txt", data=f"caption {number}".encode())
    assert len(list_shards(str(tmp_path))) == 3
    assert [pair.caption for pair in read_entries(str(tmp_path))] == [
        f"caption {number}" for number in range(5)
    ]


def test_captions_in_files_that_cannot_be_read_are_counted(tmp_path):
    _write(tmp_path, "a.png", "b.png", "c.heic", "d.png", "d.gif", "e.png")
    for name in ("b", "c", "d", "e"):
        _write(tmp_path, f"{name}.txt", data=b"text")
    _write(tmp_path, "b.txt", data="café".encode("latin-1"))
    (tmp_path / "e.png").unlink()
    (tmp_path / "e.png").symlink_to("/etc/hostname")
    assert skip_reasons(read_entries(str(tmp_path))) == {
        "a": "no_caption",
        "b": "bad_row",
        "c": "unsupported_format",
        "d": "duplicate",
        "e": "refused_path",
    }


def test_splits_with_captions_in_files_are_not_read_together(tmp_path):
    for split in ("train", "test"):
        _write(tmp_path, f"{split}/a.png")
        _write(tmp_path, f"{split}/a.txt", data=split.encode())
    with pytest.raises(ValueError, match=r"\?split=test"):
        list_shards(str(tmp_path))
    assert [pair.caption for pair in read_entries(f"{tmp_path}?split=test")] == ["test"]
