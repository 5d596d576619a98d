"""Records in object stores: S3 on a server in this process (moto), and those of fsspec."""

import math

import fsspec
import numpy as np
import pytest

from diht_jax.records.formats import TFRecordSource, open_source
from diht_jax.records.train_data import fingerprint_records
from diht_jax.storage import stores
from tests import make
from tests.fuzz import framing
from tests.readers.inputs import PNG, write_tar
from tests.records.stores import MeteredStore

RECORDS = [bytes([i]) * (1 + 700 * i) for i in range(20)]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    for shard in range(3):  # the last one is empty
        make.write_shard(folder / f"part-{shard}.tfrecord", RECORDS[shard * 10 : shard * 10 + 10])
    return folder


@pytest.fixture
def folder(local, s3_bucket):
    url, system = f"{s3_bucket}/records", fsspec.filesystem("s3")
    for path in local.iterdir():
        system.pipe_file(f"{url}/{path.name}", path.read_bytes())
    yield url
    system.rm(url, recursive=True)


def test_records_are_those_of_the_local_shards(folder, local):
    source = TFRecordSource(folder)
    assert [source[i] for i in range(len(source))] == RECORDS
    assert repr(source) == repr(TFRecordSource(local))
    assert fingerprint_records(source) == fingerprint_records(TFRecordSource(local))
    assert source.locate(13) == (f"{folder}/part-1.tfrecord", 3)
    path, start, end = source.extent(12, 19)
    data = fsspec.filesystem("s3").cat_file(path, start=start, end=end)
    assert list(source.split(12, 19, data)) == RECORDS[12:19]


def test_a_list_of_urls_may_have_another_form_than_a_listing():
    system = fsspec.filesystem("memory")
    urls = [f"memory://listed/part-{number}.tfrecord" for number in range(2)]
    for url in urls:
        system.pipe_file(url, b"".join(map(framing.frame, RECORDS[:5])))
    assert len(TFRecordSource(urls)) == 10
    system.rm("/listed", recursive=True)


def test_a_missing_index_is_made_and_kept(folder, local):
    system = fsspec.filesystem("s3")
    system.rm_file(f"{folder}/part-1.tfrecord.idx")
    source = TFRecordSource(folder)
    assert source[19] == RECORDS[19]
    kept = system.cat_file(f"{folder}/part-1.tfrecord.idx")
    assert kept == (local / "part-1.tfrecord.idx").read_bytes()


def test_shards_without_index_are_walked_through_by_large_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "BLOCK_BYTES", 2**16)
    image = PNG + np.random.default_rng(0).bytes(20_000)
    write_tar(tmp_path / "a.tar", [(f"{n}.{e}", image) for n in range(40) for e in ("png", "txt")])
    make.write_shard(tmp_path / "a.tfrecord", (image[number:] for number in range(40)))
    for name in ("a.tar", "a.tfrecord"):
        data = (tmp_path / name).read_bytes()
        fsspec.filesystem("metered").pipe_file(f"/walked/{name}", data)
        MeteredStore.requests.clear()
        source = open_source(f"metered:///walked/{name}")
        assert len(source) == len(open_source(tmp_path / name)) == 40
        blocks = math.ceil(len(data) / 2**16)
        assert MeteredStore.requests["get"] <= blocks
        assert MeteredStore.requests["bytes read"] <= len(data)
    MeteredStore.reset()
