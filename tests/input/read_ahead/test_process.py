"""The read-ahead of a host: its process is started again, ends with its parent, and is bounded."""

import os
import pathlib
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from absl import logging

from diht_jax.input.block_order import BlockOrder
from diht_jax.input.mixing import Mixture, Source
from diht_jax.input.order import GlobalOrder
from diht_jax.input.read_ahead import process
from diht_jax.input.read_ahead.block_cache import READY, BlockCache, claim_folder, new_folder
from diht_jax.input.read_ahead.bound import Footprint, ReadAheadOptions
from diht_jax.input.read_ahead.process import ReadAhead
from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter
from tests.waiting import wait_until

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]

# Starts a read-ahead, then waits to be killed.
PARENT = """
import sys, time
from diht_jax.input.block_order import BlockOrder
from diht_jax.input.read_ahead.bound import ReadAheadOptions
from diht_jax.input.read_ahead.process import ReadAhead
from diht_jax.records.tfrecord import TFRecordSource

if __name__ == "__main__":
    source = TFRecordSource(sys.argv[1])
    order = BlockOrder(source.block_starts(8), 0, num_streams=4, window_blocks=2)
    ahead = ReadAhead(source, order, ReadAheadOptions(), batch_size=8, batches_in_flight=2)
    ahead.start(0)
    assert ahead.records[order[0]] == source[order[0]]
    print(ahead.process_id, ahead._folder, flush=True)
    time.sleep(10_000)
"""


@pytest.fixture
def source(tmp_path) -> TFRecordSource:
    folder = tmp_path / "records"
    folder.mkdir()
    with TFRecordWriter(folder / "a-0.tfrecord") as writer:
        for number in range(200):
            writer.write(b"record %03d" % number)
    return TFRecordSource(folder)


def read_ahead(source, **options) -> ReadAhead:
    order = BlockOrder(source.block_starts(8), 0, num_streams=4, window_blocks=2)
    return ReadAhead(source, order, ReadAheadOptions(**options), batch_size=8, batches_in_flight=2)


def is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_reader_that_is_killed_is_started_again(source, tmp_path, monkeypatch, hang_guard):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    cache = tmp_path / "cache"
    cache.mkdir()
    ahead = read_ahead(source, cache_dir=str(cache), read_threads=1)
    order, records = ahead._order, ahead.records
    ahead.start(0)
    assert records[order[0]] == source[order[0]]
    pid = ahead.process_id
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ahead.process_id != pid)
    # Beyond the first plan: without a new process these blocks would never come.
    ahead.advance(200)
    block = np.searchsorted(order.block_starts, order[200], side="right") - 1
    wait_until(lambda: ahead._run.cache.states[block] == READY, longest_secs=60)
    assert records[order[200]] == source[order[200]]
    assert len(said) == 1 and "exit code -9" in said[0] and "started again" in said[0]
    assert ahead.describe().startswith(f"read-ahead: process {ahead.process_id}")
    pid = ahead.process_id
    ahead.stop()
    assert not is_running(pid) and not list(cache.iterdir())
    # It starts at any position, and before that the records are read directly.
    assert records[7] == source[7]
    ahead.start(160)
    assert records[order[165]] == source[order[165]]
    ahead.stop()
    ahead.stop()
    assert not list(cache.iterdir())


@pytest.mark.skipif(not pathlib.Path("/dev/shm").exists(), reason="needs Linux")
def test_a_killed_parent_leaves_neither_process_nor_files(source, tmp_path, hang_guard):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(tmp_path / "records")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pid, folder = parent.stdout.readline().split()
        assert is_running(int(pid)) and list(pathlib.Path(folder).glob("block_*"))
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_running(int(pid)) and not pathlib.Path(folder).exists())


@pytest.fixture
def dead_run(tmp_path, monkeypatch):
    """A run whose processes are dead from the start; `started` counts them."""
    started = []

    def start(self):
        started.append(self.cache["blocks"])
        return types.SimpleNamespace(
            is_alive=lambda: False, exitcode=-9, pid=1, kill=lambda: None, join=lambda secs: None
        )

    monkeypatch.setattr(process._Run, "_start_process", start)
    monkeypatch.setattr(process, "_POLL_SECS", 0.001)
    folder = new_folder(tmp_path)
    lock = claim_folder(folder)
    run = process._Run(BlockCache.create(folder, 5), lock, ())
    run.started = started
    yield run
    run.stop()


def test_a_reader_that_dies_again_and_again_is_an_error(dead_run):
    wait_until(lambda: dead_run.cache["has_failed"])
    assert len(dead_run.started) == 1 + process.MAX_RESTARTS
    failure = dead_run.cache.failure()
    assert "died 4 times in a row (exit code -9)" in failure
    assert "config.data.read_ahead_gib" in failure


def test_progress_failures_and_a_full_cache_are_logged(tmp_path, monkeypatch):
    said = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging, level, lambda text, *args: said.append(text % args))
    folder = new_folder(tmp_path)
    claim_folder(folder)
    cache = BlockCache.create(folder, 5)
    log = process._ProgressLog(cache)
    log.look()
    assert not said
    cache["is_planned"], cache["planned_bytes"], cache["requests"] = 1, 40 * 10**9, 3
    for _ in range(process._POLLS_PER_LINE):
        log.look()
    assert said == ["read-ahead: 0.0 MB of 40.0 GB of the first blocks fetched (3 requests)"]
    cache["fetched_bytes"] = 41 * 10**9
    log.look()
    assert "40.0 GB of 40.0 GB" in said[-1]
    cache.set_problem("gs://bucket/a: 503")
    for count in range(1, 1 + process._POLLS_PER_LINE):
        cache["failed_requests"] = count
        log.look()
    assert len(said) == 3 and "1 requests failed" in said[-1] and "gs://bucket/a: 503" in said[-1]
    log.look()
    assert len(said) == 4 and f"{process._POLLS_PER_LINE} requests failed" in said[-1]
    cache["is_full"] = 1
    log.look()
    log.look()
    assert len(said) == 5 and "config.data.read_ahead_gib" in said[-1]


def test_blocks_that_do_not_fit_are_an_error_with_values_that_do():
    starts = np.arange(0, 256 * 100_000 + 1, 256)
    order = BlockOrder(starts, 0, num_streams=1024, window_blocks=16)
    footprint = Footprint(
        block_bytes=10e6,
        num_blocks=100_000,
        further_blocks=100,
        batch_size=65536,
        process_count=4,
    )
    needed = footprint.needed_bytes(1024, 16)
    assert needed == (256 * 16 + 16 + 100) * 10**7
    footprint.check(order, ReadAheadOptions(read_ahead_gib=needed / 2**30))
    with pytest.raises(ValueError, match=r"need 42\.1 GB on this host") as error:
        footprint.check(order, ReadAheadOptions(read_ahead_gib=30.0))
    text = str(error.value)
    # 30 GiB are 3,221 blocks: 512 streams on 4 hosts take 2,048 + 16 + 100, windows of 12 blocks
    # 3,072 + 12 + 100.
    assert "config.data.num_streams=512 or config.data.window_blocks=12 " in text
    assert "config.data.cache_dir" in text and "config.data.read_ahead_gib=39.228" in text
    for streams, window in ((512, 16), (1024, 12)):
        assert footprint.needed_bytes(streams, window) <= 30 * 2**30
    assert footprint.needed_bytes(1024, 13) > 30 * 2**30


def test_the_bound_is_half_of_what_is_free_and_a_quarter_of_the_memory(tmp_path, monkeypatch):
    stats = types.SimpleNamespace(f_bavail=1000, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: stats)
    assert ReadAheadOptions(cache_dir=str(tmp_path)).bound_bytes() == 500 * 4096
    assert ReadAheadOptions().bound_bytes() == 500 * 4096
    stats.f_bavail = 2**60
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < ReadAheadOptions().bound_bytes() <= memory // 4
    assert ReadAheadOptions(read_ahead_gib=0.5).bound_bytes() == 2**29


def test_a_small_data_set_needs_no_more_than_itself(source):
    footprint = process.measure_footprint(
        source,
        BlockOrder(source.block_starts(8), 0, num_streams=4, window_blocks=2),
        ahead=10**6,
        batch_size=8,
        process_count=1,
    )
    size = os.path.getsize(source.paths[0])
    assert footprint.needed_bytes(1024, 16) == pytest.approx(size, abs=25)


def test_a_missing_folder_is_an_error_that_names_its_key(source, tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.cache_dir=.*missing"):
        read_ahead(source, cache_dir=str(tmp_path / "missing"))


def test_only_blocks_of_a_store_are_fetched_ahead(source):
    order = BlockOrder(source.block_starts(8), 0, num_streams=4, window_blocks=2)
    settings = {"batch_size": 8, "num_workers": 0, "prefetch_batches": 1}
    settings |= {"process_index": 0, "process_count": 1}

    def opened(paths, order):
        records = types.SimpleNamespace(paths=paths, extent=source.extent)
        mixture = Mixture([Source("", records, order, None)])
        return len(process.open_read_aheads(mixture, ReadAheadOptions(), **settings)[0])

    assert opened(source.paths, order) == 0
    assert opened(["gs://bucket/a.tfrecord"], GlobalOrder(200, 0)) == 0
    assert opened(["memory://a.tfrecord"], order) == 0  # another process would not find it
    assert opened(["gs://bucket/a.tfrecord"], order) == 1
    assert opened([*source.paths, "s3://bucket/a.tfrecord"], order) == 1
