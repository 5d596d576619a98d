"""Tables beside a folder of images: whole, in parts, and wrong ones."""

import csv
import json
import pathlib

import pytest

from diht_jax.readers.registry import list_shards, open_source, read_pairs
from diht_jax.records.schema import Pair
from tests.readers.inputs import JPEG, PNG, read_entries, skip_reasons


def _image_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(PNG)
    (folder / "sub" / "b.jpg").write_bytes(JPEG)
    (tmp_path / "secret.png").write_bytes(PNG)
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
    entries = read_entries(str(path), image_root=str(folder))
    pairs = [entry for entry in entries if isinstance(entry, Pair)]
    assert [(p.key, p.caption) for p in pairs] == [
        ("t-00000000", "one"),
        ("t-00000001", "first"),
        ("t-00000002", "an absolute path in the folder"),
        ("t-00000013", "lone \ufffd surrogate"),
    ]
    assert pairs[0].metadata == {"year": 1999}
    assert pairs[1].metadata == {"captions": ["first", "second"]}
    assert pairs[1].image == JPEG
    assert list(skip_reasons(entries).values()) == (
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
    assert [e.image for e in entries[:3]] == [PNG, PNG, JPEG]
    assert skip_reasons(entries) == {
        "k4": "refused_path",
        "k5": "no_caption",
        "t-00000005": "bad_row",
    }


def test_parts_of_a_jsonl_cover_it_once(tmp_path):
    folder = _image_folder(tmp_path)
    path = tmp_path / "t.jsonl"
    rows = [
        json.dumps({"image": "a.png", "caption": f"é {i}"}, ensure_ascii=False) for i in range(23)
    ]
    path.write_text("\r\n".join(rows) + "\n", encoding="utf-8")
    whole = read_entries(str(path), image_root=str(folder))
    for rows_per_shard in (1, 5, 23):
        options = {"image_root": str(folder), "rows_per_shard": rows_per_shard}
        assert read_entries(str(path), **options) == whole
    assert [pair.caption for pair in whole] == [f"é {i}" for i in range(23)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "image,text\na.png,x\n",
            {},
            r"t\.csv: no column 'caption'; the header has 'image', 'text'",
        ),
        ('image,caption\na.png,"never closed\n', {}, r"t\.csv: .*unexpected end"),
        ("image,caption\na.png,x\n", {"image_root": "/absent"}, "no image folder '/absent'"),
    ],
)
def test_wrong_tables(tmp_path, text, options, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(open_source(str(tmp_path / "t.csv"), **options))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"img": "a.png", "caption": "x"}], {}, r"no row has 'image'; the first one has 'img', "),
        ([{"image": "a.png", "caption": "x"}], {"key_column": "uid"}, r"no row has 'uid'"),
    ],
)
def test_a_jsonl_without_a_column_is_refused_as_a_csv_is(tmp_path, rows, options, message):
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=rf"t\.jsonl: {message}.*set image_column"):
        list_shards(str(tmp_path / "t.jsonl"), **options)


def test_a_column_that_some_rows_have_is_enough(tmp_path):
    _image_folder(tmp_path)
    rows = [{"caption": "x"}, {"image": "images/a.png"}, {"image": "images/a.png", "caption": "y"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entries = read_entries(str(tmp_path / "t.jsonl"), rows_per_shard=1)
    assert list(skip_reasons(entries).values()) == ["no_image", "no_caption"]
    assert entries[2].caption == "y"


@pytest.mark.parametrize(
    ("suffix", "encoding"), [("csv", "utf-16"), ("tsv", "utf-32"), ("jsonl", "utf-16-be")]
)
def test_other_encodings_are_named(tmp_path, suffix, encoding):
    text = '{"image": "a.png", "caption": "x"}\n' if suffix == "jsonl" else "image,caption\n"
    path = tmp_path / f"t.{suffix}"
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    path.write_bytes(mark + text.encode(encoding))
    with pytest.raises(ValueError, match=rf"t\.{suffix}: the text is in UTF-16 .*iconv"):
        list_shards(str(path))


def test_rows_of_a_table_may_share_a_key(tmp_path):
    """Several captions of one picture, as in COCO: none of them is a duplicate."""
    _image_folder(tmp_path)
    (tmp_path / "t.csv").write_text("id,image,caption\n7,images/a.png,one\n7,images/a.png,two\n")
    entries = read_entries(str(tmp_path / "t.csv"), key_column="id")
    assert [(pair.key, pair.caption) for pair in entries] == [("7", "one"), ("7", "two")]
