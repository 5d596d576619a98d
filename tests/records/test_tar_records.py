"""Tars as record shards, against the tar reader, webdataset and Python's `tarfile`."""

import bz2
import gzip
import io
import json
import logging as python_logging
import lzma
import pickle
import tarfile

import numpy as np
import pytest
import webdataset

from diht_jax.readers.base import Skipped
from diht_jax.readers.shard_formats import read_tar
from diht_jax.records.schema import Pair, Record
from diht_jax.records.shard_files import TFRecordError
from diht_jax.records.tar_records import TarRecordSource, scan_tar
from diht_jax.records.train_data import fingerprint_records, open_records
from tests import make
from tests.readers.inputs import JPEG, ODD_MEMBERS, PNG, encoded_image, write_tar

# Names with extended headers, contents between those of a pair, and all that is no pair.
LONG_NAME = "f" * 300 + "/" + "k" * 120
MEMBERS = [
    ("__index__.npy", b"not a part of any sample"),
    *ODD_MEMBERS,
    (f"{LONG_NAME}.png", PNG),
    (f"{LONG_NAME}.txt", b"long name"),
    ("caf\u00e9.webp", b"RIFF"),
    ("caf\u00e9.npy", b"in between" * 100),
    ("caf\u00e9.json", b'{"captions": ["a", "b"], "url": "http://x", "key": "0"}'),
    ("last.JPEG", JPEG),
    ("last.txt", b"last"),
]
_KEPT = ["good", LONG_NAME, "caf\u00e9", "last"]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_records_are_what_the_reader_of_tars_gives(tmp_path, tar_format, caplog):
    path = write_tar(tmp_path / "a.tar", MEMBERS[:11], format=tar_format)
    with tarfile.open(path, "a", format=tar_format) as tar:
        tar.add(tmp_path, "folder", recursive=False)
    write_tar(path, MEMBERS[11:], "a", format=tar_format)
    pairs = [entry for entry in read_tar(path) if not isinstance(entry, Skipped)]
    assert [pair.key for pair in pairs] == _KEPT
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        source = TarRecordSource(path)
    assert (
        f"{path}: 9 samples are left out: bad_json 2, duplicate 3, no_caption 2, no_image 2"
        in caplog.text
    )
    records = [source.decode(source[number]) for number in range(len(source))]
    assert [(r.key, r.image, r.caption, r.metadata) for r in records] == [
        (p.key, p.image, p.caption, p.metadata) for p in pairs
    ]
    assert source.locate(3) == (path, 3)
    # The index now exists and agrees; nothing is scanned or logged again.
    caplog.clear()
    again = pickle.loads(pickle.dumps(TarRecordSource(tmp_path)))
    assert [again[number] for number in range(4)] == [source[number] for number in range(4)]
    assert not caplog.text and repr(again) == repr(source)
    assert fingerprint_records(again) == fingerprint_records(source)
    with tarfile.open(path) as tar:
        offsets = {member.name: member.offset for member in tar}
        found = scan_tar(path).tolist()
        # The first header of a sample, and the last header of a repeated key.
        assert found[1:] == [
            offsets[name] for name in (f"{LONG_NAME}.png", "caf\u00e9.webp", "last.JPEG")
        ]


def test_an_extent_is_cut_into_its_elements(tmp_path):
    for number in range(2):
        members = [
            (f"{number}-{i}.{name}", data)
            for i in range(5)
            for name, data in (("png", PNG * (i + 1)), ("txt", b"c"))
        ]
        write_tar(tmp_path / f"{number}.tar", members)
    source = open_records(str(tmp_path / "*.tar"))
    assert isinstance(source, TarRecordSource)
    assert source.shard_lengths.tolist() == [5, 5]
    assert source.block_starts(2).tolist() == [0, 2, 4, 5, 7, 9, 10]
    for first, last in ((0, 3), (3, 5), (6, 7), (5, 10)):
        path, start, end = source.extent(first, last)
        with open(path, "rb") as file:
            data = file.read()[start:end]
        elements = [source[n] for n in range(first, last)]
        assert list(source.split(first, last, data)) == elements
        # As in the read-ahead, one process cuts the pieces and another unpacks them.
        starts = source.cut(first, last, data)
        pieces = [data[i:j] for i, j in zip(starts[:-1], starts[1:], strict=True)]
        assert [source.unpack(first + n, piece) for n, piece in enumerate(pieces)] == elements
    with pytest.raises(IndexError, match="records 4 to 5 .* are not in one shard"):
        source.extent(4, 6)
    with pytest.raises(TFRecordError, match=r"records 0 to 2: \d+ bytes were read, and \d+ exp"):
        list(source.split(0, 3, b"x" * 100))


def write_kept(path):
    """Writes a tar of two records; returns its bytes and both records."""
    records = [Record("a", JPEG, "a red fox", {"n": 1}), Record("b", PNG, "a blue cup", {"n": 2})]
    make.write_shard(path, records)
    return path.read_bytes(), records


@pytest.mark.parametrize("part", [JPEG, b"a red fox", b'"n": 1'])
def test_a_damaged_member_of_our_own_tars_costs_its_record(tmp_path, part):
    path = tmp_path / "a.tar"
    data, records = write_kept(path)
    position = data.index(part) + len(part) - 1
    path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    source = TarRecordSource(path)
    assert source.decode(source[len(source) - 1]) == records[1]
    with pytest.raises(ValueError, match=r"'a': bad row \(the checksum of a\.\w+ is wrong"):
        source.decode(path.read_bytes())
    assert [(entry.key, type(entry)) for entry in read_tar(str(path))] == [
        ("a", Skipped),
        ("b", Pair),
    ]


def test_a_member_that_a_tool_has_replaced_by_another_size_is_read(tmp_path):
    data, records = write_kept(tmp_path / "a.tar")
    edited = tmp_path / "edited.tar"
    with tarfile.open(tmp_path / "a.tar") as before, tarfile.open(edited, "w") as after:
        for member in before:
            contents = before.extractfile(member).read()
            contents = b"a vixen in the snow" if member.name == "a.txt" else contents
            member.size = len(contents)
            after.addfile(member, io.BytesIO(contents))
    captions = [pair.caption for pair in read_tar(str(edited))]
    assert captions == ["a vixen in the snow", records[1].caption]


def test_a_compressed_tar_is_told_by_more_than_the_letters_of_a_name(tmp_path):
    for name in ("BZ001", "BZh9"):
        path = write_tar(tmp_path / "a.tar", [(f"{name}.png", PNG), (f"{name}.txt", b"one")])
        assert [r.key for r in map(TarRecordSource.decode, TarRecordSource(path))] == [name]
        (tmp_path / "a.tar.idx").unlink()
    for pack in (gzip.compress, bz2.compress, lzma.compress):
        (tmp_path / "b.tar").write_bytes(pack((tmp_path / "a.tar").read_bytes()))
        with pytest.raises(TFRecordError, match=r"b\.tar: a tar that is compressed"):
            scan_tar(str(tmp_path / "b.tar"))


def test_webdataset_reads_every_record(tmp_path):
    keys = ["0", "0", "a.b.c", ".hidden", "../../etc", "/root", "x//y", "__meta__", " ", "tab\t"]
    keys += ["k" * 300, "k" * 301, "\u732b", "a~2", "0~2", "d/"]
    metadata = {"label": 3, "captions": ["c", "other"], "x": None}
    records = [Pair(key, PNG if n % 2 else JPEG, "c", metadata) for n, key in enumerate(keys)]
    make.write_shard(tmp_path / "a.tar", records)
    found = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert len({sample["__key__"] for sample in found}) == len(keys)
    for sample, record in zip(found, records, strict=True):
        assert sample.get("jpg", sample.get("png")) == record.image
        assert sample["txt"] == b"c"
        assert json.loads(sample["json"]) == metadata | {"key": record.key}
        parts = sample["__key__"].split("/")
        assert parts[0] and ".." not in parts
    source = TarRecordSource(tmp_path / "a.tar")
    ours = [source.decode(source[number]) for number in range(len(source))]
    assert [record.key for record in ours] == [sample["__key__"] for sample in found]
    assert [record.metadata for record in ours] == [metadata] * len(keys)


def test_captions_that_begin_with_a_byte_order_mark_stay_what_they_are(tmp_path):
    metadata = {"captions": ["\ufeffa fox", "a cup"], "caption_kinds": ["synthetic", "alt"]}
    records = [Record("a", JPEG, "\ufeffa fox", metadata), Record("b", JPEG, "\ufeff", {})]
    source = open_records(str(make.write_shard(tmp_path / "a.tar", records)))
    assert [source.decode(element) for element in source] == records


def test_equal_records_give_equal_bytes(tmp_path):
    records = [Pair(str(number), PNG, "c", {"b": 1, "a": 2}) for number in range(3)]
    one, other = (make.write_shard(tmp_path / f"{n}.tar", records).read_bytes() for n in "ab")
    assert one == other
    with tarfile.open(fileobj=io.BytesIO(one)) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert [m.name for m in members[:3]] == ["0.png", "0.txt", "0.json"]


def test_what_a_tar_has_no_room_for(tmp_path):
    labelled = Record("1", PNG, "c", {}, *(np.int32([0]), np.float32([1])) * 2)
    with pytest.raises(ValueError, match="record '1': its concepts cannot .*array_record"):
        make.write_shard(tmp_path / "a.tar", [labelled])
    with pytest.raises(ValueError, match="record '2': tars hold images in JPEG, PNG and WebP"):
        make.write_shard(
            tmp_path / "a.tar", [Pair("1", PNG, "c"), Pair("2", encoded_image("GIF"), "c")]
        )
    assert not list(tmp_path.iterdir())
