"""Identity of an input: by size and modification time, by its bytes, or by size alone."""

import dataclasses
import json
import os
import pathlib
import shutil

import pytest

from data_prep.jobs import shards
from diht_jax.readers.registry import SourceShard, list_shards
from diht_jax.storage import files

_BIG = 2**20  # bytes


class _Input:
    """An input with its earlier description."""

    def __init__(self, source: SourceShard, folder: pathlib.Path, identity: str = "hash"):
        self.source, self.location_path = source, folder / "place.json"
        self.identity = identity
        self.described = shards.describe_input(source, identity)
        files.write_object(str(self.location_path), self.described.location)

    def is_same(self, source: SourceShard | None = None) -> bool:
        contents, path = self.described.contents, str(self.location_path)
        return shards.is_same_input(source or self.source, contents, path, self.identity)


@pytest.fixture
def big(tmp_path) -> _Input:
    path = tmp_path / "big.tar"
    path.write_bytes(os.urandom(_BIG))
    return _Input(SourceShard("webdataset", str(path)), tmp_path)


def _edit(path: str, offset: int) -> None:
    """Changes one byte; keeps the size and advances the modification time."""
    changed_ns = os.stat(path).st_mtime_ns
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(changed_ns + 1, changed_ns + 1))


def test_a_copy_elsewhere_is_the_same(big, tmp_path):
    copy = shutil.copy(big.source.path, tmp_path / "copy.tar")
    os.utime(copy, ns=(7, 7))
    moved = SourceShard("webdataset", str(copy))
    assert big.is_same(moved)
    assert json.loads(big.location_path.read_text())["path"] == str(copy)
    assert shards.describe_input(moved, "hash").contents == big.described.contents
    big.location_path.unlink()  # as if only the statistics were copied
    assert big.is_same(moved)
    _edit(str(copy), 5)
    assert not big.is_same(moved)
    os.truncate(copy, _BIG - 1)
    assert not big.is_same(moved)
    os.unlink(copy)
    with pytest.raises(FileNotFoundError):
        big.is_same(moved)


@pytest.fixture
def table(tmp_path) -> _Input:
    """A part of a csv next to its images."""
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"{number}.png").write_bytes(b"%d" % number * 100)
    rows = "".join(f"{number}.png,name {number}\n" for number in range(4))
    (tmp_path / "data" / "t.csv").write_text(f"image,caption\n{rows}")
    (shard,) = list_shards(str(tmp_path / "data" / "t.csv"))
    return _Input(shard, tmp_path)


def test_the_images_of_a_table_belong_to_it(table, tmp_path):
    image = tmp_path / "data" / "1.png"
    assert table.is_same()
    os.utime(image, ns=(5, 5))
    assert table.is_same()  # touched: read once, then remembered
    image.write_bytes(b"x" * 100)
    assert not table.is_same()
    image.write_bytes(b"1" * 100)
    assert table.is_same()
    (tmp_path / "data" / "3.png").write_bytes(b"new")  # was missing before
    assert not table.is_same()
    (tmp_path / "data" / "3.png").unlink()
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    (moved,) = list_shards(str(tmp_path / "copy" / "t.csv"), image_root=str(tmp_path / "copy"))
    options = dict(moved.options) | {"image_root": table.source.options["image_root"]}
    assert table.is_same(dataclasses.replace(moved, options=options))
