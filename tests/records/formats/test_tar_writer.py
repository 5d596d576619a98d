"""Tars that we write, read by webdataset and by Python's `tarfile`."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset

from diht_jax.records.formats.registry import open_writer
from diht_jax.records.formats.tar_records import TarRecordSource
from diht_jax.records.schema import Pair, Record, encode_record
from tests.readers.inputs import JPEG, PNG, encoded_image


def _write(path, records) -> bytes:
    with open_writer(path) as writer:
        for record in records:
            writer.write(encode_record(record))
    return path.read_bytes()


def test_webdataset_reads_every_record(tmp_path):
    keys = ["0", "0", "a.b.c", ".hidden", "../../etc", "/root", "x//y", "__meta__", " ", "tab\t"]
    keys += ["k" * 300, "k" * 301, "\u732b", "a~2", "0~2", "d/"]
    metadata = {"label": 3, "captions": ["c", "other"], "x": None}
    records = [Pair(key, PNG if n % 2 else JPEG, "c", metadata) for n, key in enumerate(keys)]
    _write(tmp_path / "a.tar", records)
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


def test_equal_records_give_equal_bytes(tmp_path):
    records = [Pair(str(number), PNG, "c", {"b": 1, "a": 2}) for number in range(3)]
    one, other = _write(tmp_path / "a.tar", records), _write(tmp_path / "b.tar", records)
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
        _write(tmp_path / "a.tar", [labelled])
    with pytest.raises(ValueError, match="record '2': tars hold images in JPEG, PNG and WebP"):
        _write(tmp_path / "a.tar", [Pair("1", PNG, "c"), Pair("2", encoded_image("GIF"), "c")])
    assert not list(tmp_path.iterdir())
