"""Which format the shards of a path have."""

import fsspec
import pytest

from diht_jax.records import schema
from diht_jax.records.catalog import find_kind, find_shards
from diht_jax.records.formats.registry import (
    FORMATS,
    open_writer,
)


def test_folders_globs_and_lists(tmp_path):
    for name in (
        "tar/00000.tar",
        "tar/00000.parquet",
        "both/a.tar",
        "both/a.tfrecord",
        "odd/a.bin",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_kind(tmp_path / "tar") == find_kind(f"{tmp_path}/t*/*") == "webdataset"
    assert find_kind([f"{tmp_path}/tar", f"{tmp_path}/both/*.tar"]) == "webdataset"
    assert find_kind(str(tmp_path / "both")) == "tfrecord"  # as before there were others
    assert find_kind(str(tmp_path / "odd" / "a.bin")) == "tfrecord"
    assert find_shards(tmp_path / "tar") == [str(tmp_path / "tar" / "00000.tar")]
    with pytest.raises(ValueError, match=r"no TFRecord shard at '.*/odd', nor one of another form"):
        find_kind(tmp_path / "odd")
    with pytest.raises(ValueError, match="are webdataset, tfrecord; name those of one format"):
        find_kind([str(tmp_path / "tar"), str(tmp_path / "both")])


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_shard_in_a_store_is_the_local_one_and_appears_whole(form, tmp_path):
    name = f"a{form.suffix}"
    records = [
        schema.encode_record(schema.Pair(f"k{n}", b"\xff\xd8" + bytes(n), "c")) for n in range(9)
    ]
    system, url = fsspec.filesystem("memory"), f"memory://writers/{name}"
    for path in (str(tmp_path / name), url):
        with open_writer(path) as writer:
            for record in records:
                writer.write(record)
            assert len(writer) == len(records)
    local = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {i["name"].rsplit("/")[-1]: system.cat(i["name"]) for i in system.ls("writers")} == local
    with pytest.raises(RuntimeError), open_writer(url) as writer:
        writer.write(records[0])
        raise RuntimeError
    assert system.cat_file(url) == local[name]
    writer.close()
    assert system.cat_file(url) == local[name]
    system.rm("writers", recursive=True)
