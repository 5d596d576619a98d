"""Decoding workers: a killed parent leaves nothing behind; the default number of workers."""

import fcntl
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from diht_jax.input import workers
from diht_jax.input.examples import DecodeExample
from diht_jax.records.schema import Record
from tests.make import REPOSITORY, encoded, plain, write_records
from tests.waiting import wait_until

# Takes one batch from two workers, which read blocks from a store, and waits to be killed.
PARENT = """
import multiprocessing, sys, time
from benchmarks import slow_store
from diht_jax.input.examples import DecodeExample
from diht_jax.input.order import BlockOrder
from tests import make

if __name__ == "__main__":
    source = slow_store.SlowRecords("slow://" + sys.argv[1])
    order = BlockOrder(source.block_starts(5), 0, num_streams=2, window_blocks=2)
    decode = DecodeExample(8, 16, (0.9, 1.0), "{caption}")
    batches = make.train_iterator(
        make.one_source(source, decode, order=order),
        batch_size=4,
        num_workers=2,
        prefetch_batches=1,
        cache_dir=sys.argv[2],
    )
    batch = next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(10_000)
"""


def grey_square(number: int) -> Record:
    return Record(key=str(number), image=encoded(plain((number,) * 3, (9, 7))), caption="grey")


def segments_of(pid: int) -> set[pathlib.Path]:
    """Returns the shared memory segments that a process has mapped."""
    maps = pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {pathlib.Path(line.split()[5]) for line in maps if "/dev/shm/diht_jax_" in line}


def is_running(pid: int) -> bool:
    """Whether a process runs; False also for a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_killed_parent_leaves_no_worker_no_shared_memory_and_no_blocks(tmp_path):
    records = write_records(tmp_path / "records", [grey_square(number) for number in range(20)])
    script, cache = tmp_path / "parent.py", tmp_path / "cache"
    script.write_text(PARENT)
    cache.mkdir()
    command = [sys.executable, str(script), str(records), str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        try:
            children = [int(pid) for pid in parent.stdout.readline().split()]
            segments = set().union(*map(segments_of, [parent.pid, *children]))
            blocks = list(cache.glob("*/*.block"))
        finally:
            parent.kill()  # also after an error: leaving the block waits for it
    assert len(children) == 2 and segments and blocks
    left = [*segments, *(block.parent for block in blocks)]
    wait_until(lambda: not any(map(is_running, children)) and not any(p.exists() for p in left))


@pytest.fixture
def segment_folder(monkeypatch, tmp_path):
    """Replaces /dev/shm; no mark is claimed yet."""
    monkeypatch.setattr(workers, "SHARED_MEMORY", str(tmp_path))
    workers.claim_mark.cache_clear()
    yield tmp_path
    workers.claim_mark.cache_clear()


def test_a_start_removes_shared_memory_of_runs_that_were_killed(segment_folder):
    (segment_folder / "diht_jax_killed_blocks").mkdir()
    (segment_folder / "diht_jax_killed_blocks" / "0.block").touch()
    kept = {"psm_1234", "diht_jax_running.lock", "diht_jax_running_1", "diht_jax_unknown_1"}
    stale = {"diht_jax_killed.lock", "diht_jax_killed_1", "diht_jax_killed_2"}
    for name in kept | stale:
        (segment_folder / name).touch()
    with (segment_folder / "diht_jax_running.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        mark = workers.claim_mark(workers.SHARED_MEMORY)
    assert {path.name for path in segment_folder.iterdir()} == kept | {f"{mark}.lock"}
    assert workers.claim_mark(workers.SHARED_MEMORY) == mark
    # Its own lock protects it from others.
    (segment_folder / f"{mark}_1").touch()
    workers.claim_mark.cache_clear()
    workers.claim_mark(workers.SHARED_MEMORY)
    assert (segment_folder / f"{mark}_1").exists()


def test_a_mark_that_is_being_claimed_is_not_removed_by_another_start(segment_folder, monkeypatch):
    real, others = fcntl.flock, []

    def lock(file, operation):
        if not others:  # before the first lock is held
            others.append("begun")
            others[0] = workers.claim_mark.__wrapped__(str(segment_folder))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    mark = workers.claim_mark.__wrapped__(str(segment_folder))
    (segment_folder / f"{mark}_1").touch()
    workers.claim_mark.__wrapped__(str(segment_folder))
    assert others != [mark] and (segment_folder / f"{mark}_1").exists()


def test_the_bytes_of_an_example_are_those_of_its_arrays():
    record = grey_square(7)
    for num_concepts in (0, 5):
        decode = DecodeExample(8, 16, (1.0, 1.0), "{caption}", num_concepts=num_concepts)
        example = decode.plan(record, np.random.default_rng(0))()
        assert decode.example_bytes == sum(array.nbytes for array in example.values())


def test_a_container_has_the_cores_of_its_quota_and_a_worker_for_each_up_to_64(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(workers, "CGROUP", tmp_path)

    def cores(of_machine, **files):
        usable = set(range(of_machine))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: usable, raising=False)
        for name, text in files.items():
            (tmp_path / name.replace("_", ".", 1)).write_text(text)
        return workers.default_num_workers()

    assert (cores(1), cores(48), cores(208)) == (1, 48, 64)
    assert cores(48, cpu_max="150000 100000\n") == 2
    assert cores(48, cpu_max="max 100000\n") == 48
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()  # cgroup version 1
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in (("800000\n", 8), ("-1\n", 48)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert cores(48) == expected
