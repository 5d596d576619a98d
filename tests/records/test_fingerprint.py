"""What a data set's fingerprint notices, and what it costs to keep."""

import shutil

import pytest

from diht_jax.records.fingerprint import describe_changes, fingerprint_records
from diht_jax.records.formats.registry import open_source, open_writer
from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter


def write(path, sizes, fill=b"a"):
    with TFRecordWriter(path) as writer:
        for size in sizes:
            writer.write(fill * size)


@pytest.fixture
def folder(tmp_path):
    for shard in range(4):
        write(tmp_path / f"part-{shard}.tfrecord", (9000, 10 + shard, 9000))
    return tmp_path


def look(paths):
    return fingerprint_records(TFRecordSource(paths))


@pytest.mark.parametrize("suffix", ["tfrecord", "array_record"])
def test_a_shard_that_was_copied_over_another_is_named(tmp_path, suffix, caplog):
    paths = [str(tmp_path / f"part-{number}.{suffix}") for number in range(3)]
    for number, path in enumerate(paths):
        with open_writer(path) as writer:
            writer.write(bytes([number]) * 20)
    fingerprint_records(open_source(paths))
    assert not caplog.records
    shutil.copy(paths[0], paths[2])
    fingerprint_records(open_source(paths))
    (record,) = caplog.records
    assert paths[0] in record.getMessage() and paths[2] in record.getMessage()


@pytest.mark.parametrize(
    "change, expected",
    [
        # Of equal lengths, but the ends are others.
        (
            lambda f: write(f / "part-1.tfrecord", (9000, 11, 9000), b"b"),
            ["1 changed (part-1.tfrecord)"],
        ),
        # Two records exchanged: the same size, and the same ends.
        (lambda f: write(f / "part-1.tfrecord", (9000, 9000, 11)), ["1 changed (part-1.tfrecord)"]),
        (
            lambda f: (f / "part-3.tfrecord").rename(f / "part-4.tfrecord"),
            ["1 added (part-4.tfrecord)", "1 removed (part-3.tfrecord)"],
        ),
    ],
)
def test_changes_are_named(folder, change, expected):
    before = look(folder)
    change(folder)
    for index in folder.glob("*.idx"):
        index.unlink()
    now = look(folder)
    assert now.digest != before.digest and describe_changes(before, now) == expected


def test_another_order_and_equal_names_are_reported(folder, tmp_path_factory):
    paths = sorted(folder.glob("*.tfrecord"))
    before, now = look(paths), look(paths[::-1])
    assert describe_changes(before, now) == ["the same shards in another order"]
    other = tmp_path_factory.mktemp("other")
    write(other / "part-0.tfrecord", (5,))
    both = look([*paths, other])
    assert describe_changes(before, both) == ["1 added (part-0.tfrecord (2))"]
