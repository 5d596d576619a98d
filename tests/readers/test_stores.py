"""Pairs from object stores: the same as from a disk, with few requests."""

import errno
import json
import math

import fsspec
import numpy as np
import pytest

from diht_jax.readers import parquet
from diht_jax.readers.registry import FORMATS, list_shards, open_source
from diht_jax.records.schema import Pair
from diht_jax.storage import stores
from tests.readers.inputs import PNG, read_entries, skip_reasons, write_source
from tests.records.stores import MeteredStore

_KEYS = [f"k{number:03d}" for number in range(40)]
_RANDOM = np.random.default_rng(0)
# Random bytes after an image make it incompressible; 400 kB in total.
_IMAGES = {key: PNG + _RANDOM.bytes(int(_RANDOM.integers(1_000, 20_000))) for key in _KEYS}


_FORMS = ("tar", "tar.gz", "parquet", "parquet of many groups", "jsonl", "tfrecord", "array_record")


@pytest.fixture(scope="module", params=_FORMS)
def local(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    form, _, many = request.param.partition(" ")
    write_source(folder, form, _IMAGES, rows_per_group=2 if many else len(_KEYS))
    return folder


def _upload(local, url):
    system = fsspec.filesystem(url.split(":")[0])
    for path in local.rglob("*"):
        if path.is_file() and not path.name.endswith(".idx"):
            system.pipe_file(f"{url}/{path.relative_to(local)}", path.read_bytes())
    return system


@pytest.fixture
def store():
    """Returns the store; empties it after the test."""
    yield fsspec.filesystem("metered")
    MeteredStore.reset()


@pytest.fixture
def metered(local, store, monkeypatch):
    """Uploads the folder to a store; blocks are small, so that a file has many."""
    monkeypatch.setattr(stores, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 2**16)
    _upload(local, "metered://folder")
    MeteredStore.requests.clear()
    return "metered://folder"


def test_pairs_of_a_store_are_those_of_a_disk_and_fetched_once(local, metered):
    expected = read_entries(str(local))
    assert len(expected) == len(_KEYS)
    assert read_entries(metered) == expected
    assert [entry.key for entry in open_source(f"{metered}/a.*")] == [e.key for e in expected]
    MeteredStore.requests.clear()
    assert read_entries(f"{metered}/a.*") == expected
    (size,) = [path.stat().st_size for path in local.glob("a.*") if path.suffix != ".idx"]
    pictures = list(local.glob("i/*"))
    total = size + sum(path.stat().st_size for path in pictures)
    requests = MeteredStore.requests
    # In addition to the blocks: the footer of parquet; the head and the images of a table.
    is_parquet = (local / "a.parquet").exists()
    most = 1.01 * total + 2**16 * is_parquet
    assert total - len(b"PAR1") <= requests["bytes read"] <= most
    most = math.ceil(size / 2**16) + 3 * is_parquet + bool(pictures) + len(pictures)
    assert requests["get"] <= most
    assert requests["list"] + requests["info"] <= 4
    # Counting the pairs for a progress bar does not read the whole file.
    MeteredStore.requests.clear()
    (shard,) = list_shards(f"{metered}/a.*")
    assert FORMATS[shard.kind].count(shard) in (None, len(_KEYS))
    assert MeteredStore.requests["bytes read"] <= 2**17


def test_a_store_that_fails_one_request_in_twenty_loses_nothing(local, metered, monkeypatch):
    delays = []
    monkeypatch.setattr(stores, "sleep", delays.append)
    expected = read_entries(str(local))
    MeteredStore.failing_every = 20 if len(list(local.glob("i/*"))) else 5
    for _ in range(3):
        assert read_entries(metered) == expected
    assert delays and set(delays) <= set(stores.DELAYS_SECS[:2])
    assert not fsspec.filesystem("metered").exists("/folder/a.tfrecord.idx")  # nothing is written


@pytest.mark.parametrize("local", ["tar", "parquet of many groups", "jsonl"], indirect=True)
def test_pairs_are_read_from_s3(local, s3_bucket):
    url = f"{s3_bucket}/readers"
    system = _upload(local, url)
    try:
        assert read_entries(url) == read_entries(str(local))
        (shard,) = list_shards(f"{url}/a.*")
        identity = shard.identity()
        assert identity["size_bytes"] == system.info(shard.path)["size"]
        assert identity["changed_ns"]  # the etag
    finally:
        system.rm(url, recursive=True)


def test_paths_of_a_table_do_not_lead_out_of_its_folder(store):
    store.pipe_file("/box/in/a.png", PNG)
    store.pipe_file("/box/secret.png", PNG)
    names = {
        "inside": "a.png",
        "dotted": "x/../a.png",
        "url": "metered:///box/in/a.png",
        "above": "../secret.png",
        "far": "../../box/secret.png",
        "absolute": "/box/secret.png",
        "other": "metered:///box/secret.png",
        "gone": "b.png",
        "half": "\ud83d.png",
    }
    rows = [{"key": key, "image": name, "caption": "c"} for key, name in names.items()]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    store.pipe_file("/box/in/t.jsonl", text.encode())
    entries = read_entries("metered:///box/in/t.jsonl?key_column=key")
    assert [e.key for e in entries if isinstance(e, Pair)] == ["inside", "dotted", "url"]
    refused = dict.fromkeys(("above", "far", "absolute", "other"), "refused_path")
    reasons = skip_reasons(entries)
    assert reasons.pop("half") in ("refused_path", "no_image")
    assert reasons == refused | {"gone": "no_image"}
    # The folder may be elsewhere.
    rows = '{"image": "secret.png", "caption": "c"}\n'
    store.pipe_file("/box/in/t.jsonl", rows.encode())
    (pair,) = open_source("metered:///box/in/t.jsonl", image_root="metered:///box")
    assert pair.image == PNG


def test_a_list_in_json_is_read_where_its_url_is_named_alone(store):
    store.pipe_file("/lists/t.json", b'[{"image": "a.png", "caption": "one"}]')
    store.pipe_file("/lists/a.png", PNG)
    assert read_entries("metered:///lists/t.json") == [Pair("t-00000000", PNG, "one")]
    with pytest.raises(ValueError, match="nothing to read at 'metered:///lists'"):
        list_shards("metered:///lists")


def test_what_cannot_be_read_is_refused_at_once(store, monkeypatch):
    store.pipe_file("/bad/cut.tar", b"x" * 700)
    store.pipe_file("/bad/cut.parquet", b"PAR1" + bytes(70))
    store.pipe_file("/bad/other.csv", b"picture,caption\na,b\n")
    for name in ("cut.tar", "cut.parquet"):
        with pytest.raises(ValueError, match=f"metered:///bad/{name}: ") as caught:
            list(open_source(f"metered:///bad/{name}"))
        assert not isinstance(caught.value, stores.StorageError)
    with pytest.raises(ValueError, match=r"nosuch:// cannot be read: .*pip install s3fs"):
        list_shards("nosuch://bucket/a.tar")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Access Denied")

    monkeypatch.setattr(MeteredStore, "cat_file", refuse)
    with pytest.raises(
        stores.StorageError, match=r"other\.csv: could not be read \(Access Denied\)"
    ):
        list_shards("metered:///bad/other.csv")
