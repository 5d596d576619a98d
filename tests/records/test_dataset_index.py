"""The bytes of `dataset.index`, read by hand."""

import json
import pathlib
import struct

import google_crc32c
import numpy as np
import pytest

from diht_jax.data.index import update_index
from diht_jax.records.formats import TFRecordSource
from diht_jax.records.train_data import fingerprint_records
from tests import make

LENGTHS = (130, 0, 64, 1, 200)


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for number, count in enumerate(LENGTHS):
        make.write_shard(
            tmp_path / f"part-{number}.tfrecord",
            (random.bytes(int(random.integers(0, 90))) for _ in range(count)),
        )
    update_index(tmp_path)
    return tmp_path


def offsets_of(path: pathlib.Path) -> list[int]:
    """Where the frames of a shard begin, by their lengths."""
    data, found, position = path.read_bytes(), [], 0
    while position < len(data):
        found.append(position)
        position += 16 + struct.unpack_from("<Q", data, position)[0]
    return found


def test_the_file_is_as_its_format_is_described(folder):
    data = (folder / "dataset.index").read_bytes()
    magic, head_bytes, checksum, zero = struct.unpack_from("<8sQII", data)
    head = data[24 : 24 + head_bytes]
    assert (magic, checksum, zero) == (b"DIHTSET1", google_crc32c.value(head), 0)
    (json_bytes,) = struct.unpack_from("<Q", head)
    facts = json.loads(head[8 : 8 + json_bytes])
    shards, anchors = len(LENGTHS), 3 + 0 + 1 + 1 + 4
    names = b"".join(b"part-%d.tfrecord\0" % number for number in range(shards))
    assert facts == {
        **{"shards": shards, "records": sum(LENGTHS), "anchors": anchors},
        **{"names_bytes": len(names), "kinds": ["tfrecord"]},
    }
    position = -(-(8 + json_bytes) // 8) * 8
    words = struct.unpack_from(f"<{3 * shards + anchors}Q", head, position)
    paths = [folder / f"part-{number}.tfrecord" for number in range(shards)]
    assert words[:shards] == LENGTHS
    assert words[shards : 2 * shards] == tuple(path.stat().st_size for path in paths)
    rows = fingerprint_records(TFRecordSource(list(map(str, paths)))).shards
    assert words[2 * shards : 3 * shards] == tuple(int(row[3], 16) for row in rows)
    offsets = [offsets_of(path) for path in paths]
    assert words[3 * shards :] == tuple(at for each in offsets for at in each[::64])
    rest = head[position + 8 * len(words) :]
    assert rest[:shards] == bytes(shards) and rest[shards:].rstrip(b"\0") + b"\0" == names
    assert len(head) % 8 == 0
    every = struct.unpack_from(f"<{sum(LENGTHS)}Q", data, 24 + head_bytes)
    assert every == tuple(at for each in offsets for at in each)
    assert len(data) == 24 + head_bytes + 8 * sum(LENGTHS)
