"""Shard tasks: whole or absent, done once, redone when anything changed."""

import gc
import os
import pathlib
import tracemalloc

import pytest

from data_prep.jobs import fingerprint, manifest, shards
from data_prep.jobs.failures import survey
from data_prep.sources.list import default_source, list_inputs
from diht_jax.readers.registry import SourceShard, read_pairs
from diht_jax.records.schema import Pair, encode_record
from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter


def _make_source(folder: pathlib.Path, name: str, count: int) -> SourceShard:
    path = folder / f"{name}.tfrecord"
    with TFRecordWriter(path) as writer:
        for i in range(count):
            writer.write(encode_record(Pair(f"{name}/{i}", b"image", f"caption {i}")))
    return SourceShard("tfrecord", str(path))


def _copy(source: SourceShard, writer: TFRecordWriter) -> dict:
    for pair in read_pairs(source):
        writer.write(encode_record(pair))
    return {"copied": len(writer)}


def _plan(tmp_path: pathlib.Path, counts=(2, 0, 3), config_hash="c0") -> list[shards.ShardTask]:
    (tmp_path / "in").mkdir(exist_ok=True)
    sources = [_make_source(tmp_path / "in", f"s{i}", count) for i, count in enumerate(counts)]
    (tmp_path / "out").mkdir(exist_ok=True)
    return [
        shards.ShardTask(source, str(tmp_path / "out" / f"{i}.tfrecord"), config_hash)
        for i, source in enumerate(sources)
    ]


def test_a_task_writes_shard_index_and_statistics(tmp_path):
    tasks = _plan(tmp_path)
    stats = [shards.run_task(task, _copy) for task in tasks]
    assert [s["counts"] for s in stats] == [{"copied": 2}, {"copied": 0}, {"copied": 3}]
    assert len(TFRecordSource(tmp_path / "out")) == 5
    for task, expected in zip(tasks, stats, strict=True):
        on_disk = shards.read_json(task.stats_path)
        assert on_disk == expected
        assert on_disk["output"]["bytes"] == os.path.getsize(task.output)
        assert shards.read_json(task.location_path)["path"] == task.source.path
        assert shards.find_finished([task])[task.output] == shards.trim_stats(on_disk)


def test_a_failed_task_leaves_nothing(tmp_path):
    task = _plan(tmp_path, [2])[0]

    def fail(source, writer):
        _copy(source, writer)
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        shards.run_task(task, fail)
    assert os.listdir(tmp_path / "out") == []
    # Nor may the statistics of an earlier success survive a failure.
    shards.run_task(task, _copy)
    with pytest.raises(ValueError, match="half-way"):
        shards.run_task(task, fail)
    assert shards.find_finished([task]) == {}


@pytest.mark.parametrize("change", ["config", "input", "output", "no output", "broken statistics"])
def test_a_change_means_it_is_not_done(tmp_path, change):
    task = _plan(tmp_path, [2])[0]
    shards.run_task(task, _copy)
    assert shards.find_finished([task]) != {}
    if change == "config":
        task = _plan(tmp_path, [2], config_hash="c1")[0]
    elif change == "input":
        _make_source(tmp_path / "in", "s0", 3)
    elif change == "output":
        pathlib.Path(task.output).write_bytes(b"cut off")
    elif change == "no output":
        os.remove(task.output)
    else:
        pathlib.Path(task.stats_path).write_text('{"config_hash": ')
    assert shards.find_finished([task]) == {}


def test_a_driver_holds_little_of_each_part(tmp_path):
    """Of 10,000 parts 20 MB, however many samples their statistics list."""
    (tmp_path / "in").mkdir()
    for number in range(300):
        (tmp_path / "in" / f"{number:05d}.tar").write_bytes(b"")
    tracemalloc.start()
    try:
        inputs = list_inputs(str(tmp_path / "in" / "*.tar"), default_source())
        folder = str(tmp_path / "out")
        tasks = manifest.plan_parts(inputs, folder, dataset="web", split="train", config_hash="h")
        for task in tasks:
            pathlib.Path(task.output).write_bytes(b"")
            counts = {"names": [f"name {i}" for i in range(200)]}
            described = fingerprint.describe(task.source)
            shards.finish_task(task, described, counts, 7, digest="0123456789abcdef" * 2)
        found = survey(tasks)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.parts) == 300 and found.waiting == 0
    assert {stats["output"]["records"] for _, stats in found.parts} == {7}
    assert held / 300 < 2000 + 1000  # bytes; the second number for what imports leave
