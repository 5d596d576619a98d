"""Memory of the input: counted and bounded; joined batches, and reuse of their buffers."""

import gc
import os
import threading
import types

import jax
import numpy as np
import pytest

from diht_jax import sharding
from diht_jax.input import workers
from diht_jax.input.in_flight import JOINED_BATCHES, InFlight, Joiner
from tests.waiting import wait_until

ROWS, PARTS = 4, 3


def part(number):
    """A distinct sub-batch, large enough that JAX aliases it on the CPU."""
    rng = np.random.default_rng(number)
    return {
        "images": rng.integers(0, 256, (ROWS, 8, 8, 3), np.uint8),
        "tokens": rng.integers(0, 1000, (ROWS, 5), np.int32),
        "probs": rng.random((ROWS, 2)).astype(np.float16),
        "skipped_records": np.full(ROWS, number, np.int32),
    }


def batch(number):
    """The expected batch: its parts, concatenated."""
    parts = [part(PARTS * number + i) for i in range(PARTS)]
    return {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}


def assert_is(found, number):
    expected = batch(number)
    assert set(found) == set(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(np.asarray(array), expected[name])
        assert array.dtype == expected[name].dtype


class Source:
    """Parts in order; counts how many were taken."""

    def __init__(self, failing=None):
        self.taken, self.failing = 0, failing

    def __call__(self):
        number = self.taken
        self.taken += 1
        if number == self.failing:
            raise ValueError(f"part {number} is bad")
        return part(number)


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def joiner(source):
    joiner = Joiner(source, PARTS)
    yield joiner
    joiner.close()


def addresses(found):
    return {array.ctypes.data for array in found.values()}


def test_batches_are_their_parts_in_memory_that_is_used_again(joiner):
    seen = set()
    for number in range(40):
        found = joiner.take()
        assert_is(found, number)
        seen |= addresses(found)
        del found
    assert len(seen) <= 4 * JOINED_BATCHES


def test_no_batch_is_joined_ahead_of_two_that_are_in_use(joiner, source):
    first, second = joiner.take(), joiner.take()
    assert joiner.memory.is_short() and source.taken == 2 * PARTS
    ahead = joiner._ahead
    assert not ahead.batch.done()  # waits for room
    del first
    wait_until(lambda: source.taken == 3 * PARTS)
    assert_is(second, 1)


def test_batches_that_are_kept_stay_as_they_are_and_so_does_a_view(joiner):
    kept = [joiner.take() for _ in range(3)]
    views = [joiner.take()["images"][2:5, ::2].T for _ in range(6)]
    for number, found in enumerate(kept):
        assert_is(found, number)
    for number, view in enumerate(views, len(kept)):
        np.testing.assert_array_equal(view, batch(number)["images"][2:5, ::2].T)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_arrays_of_jax_stay_as_they_are(joiner, num_devices):
    mesh = sharding.create_mesh(-1, 1, jax.devices()[:num_devices])
    spread = sharding.batch_sharding(mesh)
    kept, aliases = [], 0
    for _ in range(6):
        found = joiner.take()
        start = found["images"].ctypes.data
        kept.append(jax.make_array_from_process_local_data(spread, found))
        shard = kept[-1]["images"].addressable_shards[0].data
        aliases += shard.unsafe_buffer_pointer() == start
        del found, shard
        gc.collect(0)
    assert aliases  # otherwise this test shows nothing
    for number, found in enumerate(kept):
        assert_is(found, number)


def test_memory_comes_back_from_arrays_of_jax(joiner):
    spread = sharding.batch_sharding(sharding.create_mesh(-1, 1, jax.devices()[:1]))
    total, seen = 0, set()
    for number in range(12):
        found = joiner.take()
        seen |= addresses(found)
        total = jax.block_until_ready(
            jax.make_array_from_process_local_data(spread, found)["tokens"].sum()
        )
        assert int(total) == batch(number)["tokens"].sum()
        del found
    assert len(seen) <= 4 * (JOINED_BATCHES + 1)


def test_an_error_comes_at_its_own_batch():
    joiner = Joiner(Source(failing=2 * PARTS + 1), PARTS)
    assert_is(joiner.take(), 0)
    assert_is(joiner.take(), 1)
    with pytest.raises(ValueError, match=f"part {2 * PARTS + 1} is bad"):
        joiner.take()
    joiner.close()


def test_closing_ends_the_thread_and_a_later_batch_begins_with_the_next_part(joiner, source):
    joiner.take()
    wait_until(lambda: source.taken == 2 * PARTS)
    joiner.close()
    wait_until(lambda: "join_batch" not in {thread.name for thread in threading.enumerate()})
    source.taken = 9 * PARTS
    assert_is(joiner.take(), 9)


# 65,536 examples of 224 px on one host with eight workers.
_LARGE = {
    "num_workers": 8,
    "num_threads": 16,
    "prefetch_batches": 2,
    "rows": 256,
    "parts_per_batch": 256,
    "example_bytes": 3 * 224**2 + 4 * 77,
}


def test_a_large_batch_is_in_flight_four_times():
    large = InFlight(**_LARGE)
    batch_bytes = 65_536 * _LARGE["example_bytes"]
    assert batch_bytes / 1e9 == pytest.approx(9.9, abs=0.05)
    # Two batches ahead, in sub-batches shared by 8 workers, and two joined batches.
    assert large.shared_bytes == 2 * batch_bytes + 4 * large.part_bytes
    assert large.process_bytes == 2 * batch_bytes + 8 * large.part_bytes
    assert (large.shared_bytes + large.process_bytes) / 1e9 == pytest.approx(40, abs=0.5)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the free bytes of shared memory and of the machine."""

    def set_them(shared: int, memory: int) -> None:
        stats = types.SimpleNamespace(f_bavail=shared, f_frsize=1)
        monkeypatch.setattr(os, "statvfs", {"/dev/shm": stats}.__getitem__)
        (tmp_path / "meminfo").write_text(f"MemFree: 1 kB\nMemAvailable: {memory // 1024} kB\n")
        monkeypatch.setattr(workers, "_MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(workers, "CGROUP", tmp_path)

    return set_them


def test_more_than_what_is_free_or_allowed_is_an_error_that_names_the_keys(machine):
    planned = InFlight(**_LARGE)
    machine(shared=30 * 10**9, memory=50 * 10**9)
    planned.check(None)
    planned.check(40.0)
    with pytest.raises(ValueError, match=r"max_in_flight_gib=20.0 is 21\.5 GB, but .* 40\.0 GB"):
        planned.check(20.0)
    machine(shared=30 * 10**9, memory=35 * 10**9)
    with pytest.raises(ValueError, match="may take 35.0 GB more memory, but .* need 40.0") as error:
        planned.check(None)
    assert "config.data.num_workers=8" in str(error.value)
    planned.check(40.0)  # an explicit value replaces the measured one
    machine(shared=10 * 10**9, memory=50 * 10**9)
    with pytest.raises(ValueError, match="/dev/shm has 10.0 GB free, but .* need 19.9 GB"):
        planned.check(40.0)


def test_the_memory_of_a_container_counts_without_the_files_that_it_has_read(machine, tmp_path):
    machine(shared=0, memory=9000 * 1024)
    assert workers.available_memory() == 9000 * 1024
    for name, text in {
        "memory.max": "5000\n",
        "memory.current": "4500\n",
        "memory.stat": "anon 1000\nfile 3500\nshmem 500\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert workers.available_memory() == 5000 - 4500 + 3500 - 500
    (tmp_path / "memory.max").write_text("max\n")
    assert workers.available_memory() == 9000 * 1024
