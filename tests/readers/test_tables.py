"""Tables next to a folder of images: whole, in parts, and invalid ones."""

import csv
import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from diht_jax.readers.registry import list_shards, open_source, read_pairs
from diht_jax.records.samples import clean_text
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
        {"image": "a.png", "caption": "b", "captions": ["a", "b"], "caption_kinds": ["alt", "new"]},
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
        ("t-00000014", "b"),
    ]
    assert pairs[0].metadata == {"year": 1999}
    assert pairs[1].metadata == {"captions": ["first", "second"]}
    assert pairs[1].image == JPEG
    assert pairs[4].metadata == {"captions": ["b", "a"], "caption_kinds": ["new", "alt"]}
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


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "image,words\na.png,x\n",
            {},
            r"t\.csv: .*'image', 'words'; set image_column",
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
    ("suffix", "text"),
    [("jsonl", ""), ("jsonl", "\n"), ("csv", ""), ("csv", "\n\n"), ("csv", "image,caption\n")],
)
def test_a_table_without_rows_does_not_hold_up_the_others(tmp_path, suffix, text):
    _image_folder(tmp_path)
    empty, whole = tmp_path / f"t0.{suffix}", tmp_path / f"t1.{suffix}"
    empty.write_text(text)
    rows = {
        "jsonl": '{"image": "images/a.png", "caption": "x"}',
        "csv": "image,caption\nimages/a.png,x",
    }
    whole.write_text(rows[suffix])
    (entry,) = read_entries(str(tmp_path / f"t?.{suffix}"))
    assert entry.caption == "x"
    with pytest.raises(ValueError, match=r"t0\."):
        list_shards(str(empty))


@pytest.mark.parametrize("rows_per_shard", [1, 100])
def test_blank_lines_of_a_csv_are_left_out(tmp_path, rows_per_shard):
    _image_folder(tmp_path)
    text = "\n\r\nimage,caption\n\nimages/a.png,x\n\nimages/a.png,y\n\n"
    (tmp_path / "t.csv").write_text(text)
    entries = read_entries(str(tmp_path / "t.csv"), rows_per_shard=rows_per_shard)
    assert [entry.caption for entry in entries] == ["x", "y"]


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
    """A picture may have several captions, as in COCO: none of them is a duplicate."""
    _image_folder(tmp_path)
    (tmp_path / "t.csv").write_text("id,image,caption\n7,images/a.png,one\n7,images/a.png,two\n")
    entries = read_entries(str(tmp_path / "t.csv"), key_column="id")
    assert [(pair.key, pair.caption) for pair in entries] == [("7", "one"), ("7", "two")]


_NAMES = [("image", "caption"), ("filepath", "title"), ("File_Name", "TEXT"), ("img", "txt")]


def write_table(path, form, row):
    """Writes a table of one row in a form."""
    if form == "parquet":
        with path.open("wb") as file:  # pyarrow only takes paths in UTF-8
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    elif form in ("csv", "tsv"):
        lines = ({"csv": ",", "tsv": "\t"}[form].join(part) for part in (row, row.values()))
        path.write_text("\n".join(lines))
    else:
        path.write_text(json.dumps([row] if form == "json" else row))


@pytest.mark.parametrize(("image", "caption"), _NAMES)
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_columns_of_all_tables_are_found_by_the_same_names(tmp_path, form, image, caption):
    (tmp_path / "a.png").write_bytes(PNG)
    row = {image: "a.png", caption: "one", "year": "1999"}
    for name in (f"t.{form}", f"T.{form.upper()}", f"\udce9.{form}"):  # the last is not UTF-8
        write_table(tmp_path / name, form, row)
        expected = Pair(f"{clean_text(name[0])}-00000000", PNG, "one", {"year": "1999"})
        assert read_entries(str(tmp_path / name)) == [expected]


@pytest.mark.parametrize("names", [("text", "TEXT"), ("TEXT", "text")])
def test_of_columns_that_differ_in_case_alone_the_usual_one_is_read(tmp_path, names):
    (tmp_path / "a.png").write_bytes(PNG)
    write_table(tmp_path / "t.jsonl", "jsonl", {"image": "a.png"} | {name: name for name in names})
    assert [pair.caption for pair in read_entries(str(tmp_path / "t.jsonl"))] == ["text"]


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_the_header_shows_what_separates_the_fields_of_a_csv(tmp_path, delimiter):
    (tmp_path / "a.png").write_bytes(PNG)
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([["filepath", "title"], ["a.png", "one, two; three\tfour"]])
    (pair,) = read_entries(str(tmp_path / "t.csv"))
    assert pair.caption == clean_text("one, two; three\tfour")


def test_a_byte_order_mark_does_not_hide_the_quotes_of_a_header(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    text = '"image","caption"\n"a.png","one"\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8-sig")
    assert read_entries(str(tmp_path / "t.csv")) == [Pair("t-00000000", PNG, "one")]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_the_imagefolder_of_hugging_face(tmp_path, form):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0001.png").write_bytes(PNG)
    row = {"file_name": "0001.png", "text": "a cat"}
    write_table(tmp_path / "train" / f"metadata.{form}", form, row)
    for spec in (tmp_path / "train", f"{tmp_path}?split=train"):
        (pair,) = read_entries(str(spec))
        assert (pair.image, pair.caption) == (PNG, "a cat")


def test_a_list_in_json_is_read_where_it_is_named_alone(tmp_path):
    rows = [{"image": "dog/a.png", "caption": "one", "size": float("nan")}, 7]
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").write_bytes(PNG)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(rows))
    pair, skipped = read_entries(str(path))
    assert (pair.caption, pair.metadata) == ("one", {"size": None})
    assert skipped.reason == "bad_row"
    # In a folder such a file may have any contents.
    assert [pair.caption for pair in read_entries(str(tmp_path))] == ["dog"]
    path.write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"t\.json: .*list of objects"):
        list_shards(str(path))


def test_a_csv_in_latin_1_loses_the_rows_with_other_letters_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    text = "image,caption,place\na.png,café,x\na.png,tea,x\na.png,tea,Zürich\n"
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    first, pair, last = read_entries(str(tmp_path / "t.csv"))
    assert pair.caption == "tea"
    for entry, column in ((first, "caption"), (last, "place")):
        assert entry.reason == "bad_row"
        assert str(tmp_path / "t.csv") in entry.detail and f"'{column}'" in entry.detail
    (tmp_path / "t.csv").write_bytes("image,caption,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.csv: the header"):
        list_shards(str(tmp_path / "t.csv"))


def test_a_jsonl_in_latin_1_names_the_file_and_how_to_convert_it(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    rows = '{"image": "a.png", "caption": "tea"}\n{"image": "a.png", "caption": "café"}\n'
    (tmp_path / "t.jsonl").write_bytes(rows.encode("cp1252"))
    pair, bad = read_entries(str(tmp_path / "t.jsonl"))
    assert (pair.caption, bad.reason) == ("tea", "bad_row")
    assert str(tmp_path / "t.jsonl") in bad.detail and "iconv -f WINDOWS-1252" in bad.detail


def _not_utf8():
    # Arrow does not validate the bytes of a column that is built from buffers.
    offsets = pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1]
    return pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"a\xe9b")]
    )


_BAD_COLUMNS = {
    "date": lambda: pyarrow.array([0, 2**31 - 1, 1], pyarrow.int32()).cast(pyarrow.date32()),
    "text": _not_utf8,
    "year 0": lambda: pyarrow.array([0, -(10**6) * 62_167_219_200, 1], pyarrow.timestamp("us")),
    "zone": lambda: pyarrow.array([None, 0, None], pyarrow.timestamp("us", "Mars/Phobos")),
}


@pytest.mark.parametrize("column", _BAD_COLUMNS)
def test_a_value_that_python_cannot_hold_costs_its_row_of_parquet(tmp_path, column):
    path = tmp_path / "t.parquet"
    columns = {"png": [PNG] * 3, "txt": ["one", "two", "three"], column: _BAD_COLUMNS[column]()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    first, bad, last = read_entries(str(path))
    assert (first.caption, last.caption) == ("one", "three")
    assert (bad.key, bad.reason) == ("t-00000001", "bad_row")
    assert str(path) in bad.detail and f"'{column}'" in bad.detail


def test_a_parquet_file_whose_names_are_damaged_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"image": [PNG], "caption": ["one"], "source": ["web"]})
    pyarrow.parquet.write_table(table, path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"source", b"\xffource"))
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as parquet"):
        read_entries(str(path))


def test_options_name_the_columns_of_parquet_too(tmp_path):
    rows = [{"picture": PNG, "en": "one", "txt": "eins", "id": number} for number in (0, 7)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    spec = f"{tmp_path}/t.parquet?image_column=picture&caption_column=en&key_column=id"
    assert read_entries(spec) == [Pair(key, PNG, "one", {"txt": "eins"}) for key in ("0", "7")]
