"""Readers of pairs: every form of source, and a counted reason for whatever is no pair."""

import csv
import gzip
import io
import json
import os
import pathlib
import tarfile

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diht_jax.data.readers.base import SOURCE_REASONS, clean_text, pick_captions
from diht_jax.data.readers.registry import (
    FORMATS,
    Skipped,
    list_shards,
    open_source,
    read_pairs,
)
from diht_jax.data.records.schema import Pair, encode_record
from diht_jax.data.records.tfrecord import TFRecordWriter


def _image(name: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, name)
    return buffer.getvalue()


_PNG, _JPEG = _image(), _image("JPEG")


def _write_tar(path: pathlib.Path, members: list[tuple[str, bytes]], mode: str = "w") -> str:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def _entries(spec, **options) -> list[Pair | Skipped]:
    return [entry for shard in list_shards(spec, **options) for entry in read_pairs(shard)]


def _reasons(entries) -> dict[str, str]:
    return {entry.key: entry.reason for entry in entries if isinstance(entry, Skipped)}


def test_tar_as_img2dataset_writes_it(tmp_path):
    first = {"key": "000", "caption": "from json", "url": "http://x", "status": "success"}
    path = _write_tar(
        tmp_path / "00000.tar",
        [
            ("000.jpg", _JPEG),
            ("000.txt", b"from txt\n"),
            ("000.json", json.dumps(first).encode()),
            ("dir/001.webp", _image("WEBP")),
            ("dir/001.json", b'{"caption": " only json ", "label": 4}'),
            ("dir/002.PNG", _PNG),
            ("dir/002.txt", "\ufeffcafé".encode()),
            ("003.jpeg", _JPEG),
            ("003.json", b'{"captions": ["a", "b", "a"], "similarity": NaN, "x": 1e999}'),
        ],
    )
    pairs = list(open_source(path))
    assert [(p.key, p.caption) for p in pairs] == [
        ("000", "from txt"),
        ("dir/001", "only json"),
        ("dir/002", "café"),
        ("003", "a"),
    ]
    assert [p.image for p in pairs] == [_JPEG, _image("WEBP"), _PNG, _JPEG]
    assert pairs[0].metadata == {"url": "http://x", "status": "success"}
    assert pairs[1].metadata == {"label": 4}
    assert pairs[3].metadata == {"captions": ["a", "b"], "similarity": None, "x": None}
    for pair in pairs:
        encode_record(pair)  # whatever a reader gives can be written


def test_tar_counts_what_is_no_pair(tmp_path):
    path = _write_tar(
        tmp_path / "a.tar",
        [
            ("good.png", _PNG),
            ("good.txt", b"ok"),
            ("no_caption.png", _PNG),
            ("empty_caption.png", _PNG),
            ("empty_caption.txt", b" \n"),
            ("no_image.txt", b"text"),
            ("two_images.png", _PNG),
            ("two_images.jpg", _JPEG),
            ("two_images.txt", b"text"),
            ("twice.png", _PNG),
            ("twice.txt", b"one"),
            ("twice.txt", b"two"),
            ("bad_json.png", _PNG),
            ("bad_json.txt", b"text"),
            ("bad_json.json", b"{"),
            ("deep.png", _PNG),
            ("deep.json", b"[" * 100_000),
            ("mask.seg.png", _PNG),
            ("mask.txt", b"the image has another kind of name"),
            ("good.png", _PNG),
            ("good.txt", b"the key again"),
            ("readme", b"no extension"),
            (".hidden.png", _PNG),
            ("other.mp4", b"not ours"),
        ],
    )
    source = open_source(path)
    assert [pair.key for pair in source] == ["good"]
    assert _reasons(_entries(path)) == {
        "no_caption": "no_caption",
        "empty_caption": "no_caption",
        "no_image": "no_image",
        "two_images": "duplicate",
        "twice": "duplicate",
        "bad_json": "bad_json",
        "deep": "bad_json",
        "mask": "no_image",
        "good": "duplicate",
    }
    assert source.skipped == {"no_caption": 2, "no_image": 2, "duplicate": 3, "bad_json": 2}
    assert set(source.skipped) <= set(SOURCE_REASONS)


def test_tar_never_writes_to_disk(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = _write_tar(
        inside / "a.tar",
        [
            ("../escape.png", _PNG),
            ("../escape.txt", b"up"),
            (f"{tmp_path}/absolute.png", _PNG),
            (f"{tmp_path}/absolute.txt", b"root"),
        ],
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        text = tarfile.TarInfo("link.txt")
        text.size = 4
        tar.addfile(text, io.BytesIO(b"text"))
    monkeypatch.chdir(inside)
    entries = _entries(path)
    assert [e.key for e in entries if isinstance(e, Pair)] == [
        "../escape",
        f"{tmp_path}/absolute",
    ]
    assert _reasons(entries) == {"link": "no_image"}
    assert sorted(os.listdir(tmp_path)) == ["inside"]
    assert os.listdir(inside) == ["a.tar"]


def test_names_that_are_no_utf8(tmp_path):
    path = _write_tar(tmp_path / "a.tar", [("k\udce9.png", _PNG), ("k\udce9.txt", b"text \xe9")])
    folder = tmp_path / "classes" / "cl\udce9"
    folder.mkdir(parents=True)
    (folder / "x\udce9.png").write_bytes(_PNG)
    pairs = [*open_source(path), *open_source(str(tmp_path / "classes"))]
    assert [(p.key, p.caption) for p in pairs] == [
        ("k\ufffd", "text \ufffd"),
        ("cl\ufffd/x\ufffd.png", "cl\ufffd"),
    ]
    for pair in pairs:
        encode_record(pair)


def test_sparse_member_does_not_fill_the_memory(tmp_path):
    header = tarfile.TarInfo("huge.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"00000000000\0", b"00000000000\0"
    block[483:495] = b"77777777777\0"  # real size: 8 GiB of zeros
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    good = _write_tar(tmp_path / "good.tar", [("b.png", _PNG), ("b.txt", b"text")])
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(block) + pathlib.Path(good).read_bytes())
    source = open_source(str(path))
    assert [pair.key for pair in source] == ["b"]
    assert source.skipped == {"too_large": 1}


def test_compressed_tar(tmp_path):
    path = _write_tar(tmp_path / "a.tar.gz", [("k.png", _PNG), ("k.txt", b"text")], "w:gz")
    assert [pair.caption for pair in open_source(path)] == ["text"]
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.tar\.gz: the tar archive cannot be read"):
        list(open_source(path))
    pathlib.Path(path).write_bytes(gzip.compress(gzip.decompress(data)[:-10000]))
    with pytest.raises(ValueError, match=r"a\.tar\.gz: the tar archive cannot be read"):
        list(open_source(path))


def test_every_truncation_of_a_tar_is_an_error(tmp_path):
    path = pathlib.Path(
        _write_tar(
            tmp_path / "a.tar",
            [
                (f"{i}.{kind}", data)
                for i in range(3)
                for kind, data in (("png", _PNG), ("txt", b"t"))
            ],
        )
    )
    data = path.read_bytes()
    contents_end = 6 * 1024  # six members of a header and a block each; then zeros
    assert any(data[contents_end - 512 : contents_end]) and not any(data[contents_end:])
    for size in [0, 100, *range(512, contents_end + 1, 256)]:
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"a\.tar: the tar archive cannot be read"):
            list(open_source(str(path)))
    path.write_bytes(data[: contents_end + 512])
    assert len(list(open_source(str(path)))) == 3


def test_damaged_member_header_is_an_error_and_not_the_end(tmp_path):
    path = pathlib.Path(
        _write_tar(tmp_path / "a.tar", [("0.png", _PNG), ("0.txt", b"t"), ("1.png", _PNG)])
    )
    data = bytearray(path.read_bytes())
    data[2048] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar: .*damaged member header at byte 2048"):
        list(open_source(str(path)))


def test_tar_that_begins_with_a_hole_of_zeros(tmp_path):
    """Python's `tarfile` tries to decompress it, as the old format of lzma begins with zeros."""
    path = pathlib.Path(_write_tar(tmp_path / "a.tar", [("0.png", _PNG), ("0.txt", b"t")]))
    path.write_bytes(bytes(512) + path.read_bytes()[512:])
    with pytest.raises(ValueError, match=r"a\.tar: the tar archive cannot be read"):
        list(open_source(str(path)))


def test_not_a_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"a\.tar: the tar archive cannot be read"):
        list(open_source(str(tmp_path / "a.tar")))


def _image_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(_PNG)
    (folder / "sub" / "b.jpg").write_bytes(_JPEG)
    (tmp_path / "secret.png").write_bytes(_PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


def test_jsonl(tmp_path):
    folder = _image_folder(tmp_path)
    rows = [
        {"image": "a.png", "caption": "one", "year": 1999},
        {"image": "sub/b.jpg", "caption": ["first", "", "second"]},
        {"image": str(folder / "a.png"), "caption": "an absolute path in the folder"},
        {"image": "../secret.png", "caption": "up"},
        {"image": "/etc/hostname", "caption": "root"},
        {"image": "link.png", "caption": "through a link"},
        {"image": "nul\0.png", "caption": "x"},
        {"image": "missing.png", "caption": "x"},
        {"image": "sub", "caption": "a folder"},
        {"image": "http://x/a.png", "caption": "x"},
        {"image": 3, "caption": "x"},
        {"image": "a.png", "caption": None},
        {"image": "a.png"},
        {"image": "a.png", "caption": "lone \ud83d surrogate"},
    ]
    lines = [json.dumps(row) for row in rows] + ["not json", "[1, 2]"]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]))
    entries = _entries(str(path), image_root=str(folder))
    pairs = [entry for entry in entries if isinstance(entry, Pair)]
    assert [(p.key, p.caption) for p in pairs] == [
        ("t-00000000", "one"),
        ("t-00000001", "first"),
        ("t-00000002", "an absolute path in the folder"),
        ("t-00000013", "lone \ufffd surrogate"),
    ]
    assert pairs[0].metadata == {"year": 1999}
    assert pairs[1].metadata == {"captions": ["first", "second"]}
    assert pairs[1].image == _JPEG
    assert list(_reasons(entries).values()) == (
        ["refused_path"] * 4 + ["no_image"] * 4 + ["no_caption"] * 2 + ["bad_row"] * 2
    )


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("rows_per_shard", [1, 2, 100])
def test_csv_in_parts(tmp_path, suffix, delimiter, rows_per_shard):
    folder = _image_folder(tmp_path)
    rows = [
        ["k1", "a.png", "plain"],
        ["k2", "a.png", 'a "quoted", delimited\nand two-line caption'],
        ["k3", "sub/b.jpg", "ünïcode \u2028 and an odd separator"],
        ["k4", "../secret.png", "up"],
        ["k5", "a.png", ""],
    ]
    path = tmp_path / f"t{suffix}"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "file", "title"])
        writer.writerows(rows)
        file.write(delimiter.join(["too", "few"]) + "\r\n")
    options = {
        "image_column": "file",
        "caption_column": "title",
        "key_column": "id",
        "image_root": str(folder),
    }
    shards = list_shards(str(path), rows_per_shard=rows_per_shard, **options)
    assert len(shards) == -(-6 // rows_per_shard)
    entries = [entry for shard in shards for entry in read_pairs(shard)]
    assert [(e.key, e.caption) for e in entries[:3]] == [(row[0], row[2]) for row in rows[:3]]
    assert [e.image for e in entries[:3]] == [_PNG, _PNG, _JPEG]
    assert _reasons(entries) == {"k4": "refused_path", "k5": "no_caption", "t-00000005": "bad_row"}


def test_parts_of_a_jsonl_cover_it_once(tmp_path):
    folder = _image_folder(tmp_path)
    path = tmp_path / "t.jsonl"
    rows = [
        json.dumps({"image": "a.png", "caption": f"é {i}"}, ensure_ascii=False) for i in range(23)
    ]
    path.write_text("\r\n".join(rows) + "\n", encoding="utf-8")
    whole = _entries(str(path), image_root=str(folder))
    for rows_per_shard in (1, 5, 23):
        options = {"image_root": str(folder), "rows_per_shard": rows_per_shard}
        assert _entries(str(path), **options) == whole
    assert [pair.caption for pair in whole] == [f"é {i}" for i in range(23)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "image,text\na.png,x\n",
            {},
            r"t\.csv: no column 'caption'; the header has 'image', 'text'",
        ),
        ("", {}, r"t\.csv: no column 'image', 'caption'; the header has nothing"),
        ("image,caption\n", {}, r"t\.csv: the table has no rows"),
        ('image,caption\na.png,"never closed\n', {}, r"t\.csv: .*unexpected end"),
        ("image,caption\na.png,x\n", {"image_root": "/absent"}, "no image folder '/absent'"),
        ("image,caption\na.png,x\n", {"rows_per_shard": 0}, "rows_per_shard=0"),
        ("image,caption\na.png,x\n", {"image_colum": "x"}, "did you mean 'image_column'"),
    ],
)
def test_wrong_tables(tmp_path, text, options, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(open_source(str(tmp_path / "t.csv"), **options))


def test_class_folders(tmp_path):
    for name in ("b/2.png", "b/1.jpg", "b/deep/3.PNG", "a_c/x.webp", ".cache/z.png", "b/.y.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_PNG)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    shards = list_shards(str(tmp_path))
    assert len(shards) == 3
    pairs = [pair for shard in shards for pair in read_pairs(shard)]
    assert [(p.key, p.caption, p.metadata["label"]) for p in pairs] == [
        ("a_c/x.webp", "a c", 0),
        ("b/1.jpg", "b", 1),
        ("b/2.png", "b", 1),
        ("b/deep/3.PNG", "b", 1),
    ]
    assert pairs[0].metadata["class_name"] == "a_c"


def test_own_records_and_lists_of_sources(tmp_path):
    expected = []
    for shard in range(2):
        with TFRecordWriter(tmp_path / f"p-train-{shard:05d}.tfrecord") as writer:
            for i in range(3):
                pair = Pair(f"{shard}/{i}", _PNG, f"caption {i}", {"label": i})
                writer.write(encode_record(pair))
                expected.append((pair.key, pair.image, pair.caption, pair.metadata))
    for spec in (str(tmp_path), str(tmp_path / "*.tfrecord"), str(tmp_path / "p-*")):
        pairs = list(open_source(spec))
        assert [(p.key, p.image, p.caption, p.metadata) for p in pairs] == expected
    tar = _write_tar(tmp_path / "x.tar", [("k.png", _PNG), ("k.txt", b"text")])
    one = str(tmp_path / "p-train-00001.tfrecord")
    assert [p.key for p in open_source([tar, one])] == ["k", "1/0", "1/1", "1/2"]


def test_parquet_with_images(tmp_path):
    rows = [
        {"key": "a", "jpg": _JPEG, "txt": "one", "width": 4},
        {"key": "b", "jpg": None, "txt": "two", "width": None},
        {"key": "c", "jpg": _PNG, "txt": " ", "width": 4},
        {"key": "a", "jpg": _JPEG, "txt": "again", "width": 4},
    ]
    path = tmp_path / "00000.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    expected = [
        Pair("a", _JPEG, "one", {"width": 4}),
        Skipped("b", "no_image", "nothing in the column"),
        Skipped("c", "no_caption", "nothing in column 'txt'"),
        Skipped("a", "duplicate", "the key was there before"),
    ]
    for spec in (str(path), str(tmp_path), str(tmp_path / "*.parquet")):
        assert _entries(spec) == expected
    assert FORMATS["parquet"].count(list_shards(str(path))[0]) == 4
    # Beside tars, such files hold the metadata of the tars' pairs.
    tar = _write_tar(tmp_path / "00000.tar", [("k.png", _PNG), ("k.txt", b"text")])
    for spec in (str(tmp_path), str(tmp_path / "0*")):
        assert [shard.path for shard in list_shards(spec)] == [tar]


def test_own_records_in_an_object_store(tmp_path):
    with TFRecordWriter(tmp_path / "a.tfrecord") as writer:
        for i in range(3):
            writer.write(encode_record(Pair(f"k{i}", _PNG, f"caption {i}")))
    system, url = fsspec.filesystem("memory"), "memory://test_readers"
    system.pipe_file("/test_readers/a.tfrecord", (tmp_path / "a.tfrecord").read_bytes())
    system.pipe_file("/test_readers/b.tar", b"")
    source = open_source(url)
    assert [pair.key for pair in source] == ["k0", "k1", "k2"]
    (shard,) = source.shards
    assert FORMATS["tfrecord"].count(shard) == 3
    identity = shard.identity()
    assert identity["path"] == "memory:///test_readers/a.tfrecord"
    assert identity["size_bytes"] == (tmp_path / "a.tfrecord").stat().st_size
    with pytest.raises(ValueError, match="no TFRecord shards at 'memory://test_readers/b.tar'"):
        open_source(f"{url}/b.tar")


def test_foreign_record_names_file_and_record(tmp_path):
    with TFRecordWriter(tmp_path / "a.tfrecord") as writer:
        writer.write(encode_record(Pair("k", _PNG, "c")))
        writer.write(b"\xff not an example")
    with pytest.raises(ValueError, match=r"a\.tfrecord: record 1: .*no tf.train.Example"):
        list(open_source(str(tmp_path / "a.tfrecord")))


def test_nothing_or_too_much_found(tmp_path):
    with pytest.raises(ValueError, match="nothing at"):
        open_source(str(tmp_path / "*.tar"))
    with pytest.raises(ValueError, match="holds neither"):
        open_source(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt: not a source of pairs"):
        open_source(str(tmp_path / "notes.txt"))
    _write_tar(tmp_path / "a.tar", [])
    (tmp_path / "t.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="several kinds of source"):
        open_source(str(tmp_path))


def test_identity_changes_with_the_input(tmp_path):
    path = _write_tar(tmp_path / "a.tar", [("k.png", _PNG), ("k.txt", b"text")])
    shard = list_shards(path)[0]
    before = shard.identity()
    assert before == list_shards(path)[0].identity()
    os.utime(path, ns=(0, 1))
    assert shard.identity() != before
    folder = tmp_path / "classes"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.png").write_bytes(_PNG)
    shard = list_shards(str(folder))[0]
    before = shard.identity()
    (folder / "a" / "2.png").write_bytes(_PNG)
    assert shard.identity() != before


def test_texts_are_cleaned():
    assert clean_text("  \ud83d\ude00 ok \ud83d ") == "\N{GRINNING FACE} ok \ufffd"
    assert pick_captions(["a", 3, None, " a ", "", "b"]) == ["a", "b"]
    assert pick_captions({"a": 1}) == []


def test_real_tars(shared_data):
    source = open_source(str(shared_data / "emoji_*.tar"))
    pairs = list(source)
    assert len(pairs) == 2 * 3786
    assert not source.skipped
    assert {p.key for p in pairs[:3786]} == {p.key for p in pairs[3786:]}
    cifar = list(open_source(str(shared_data / "cifar10_test.tar")))
    assert len({p.metadata["label"] for p in cifar}) == 10
