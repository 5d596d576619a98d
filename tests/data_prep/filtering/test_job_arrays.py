"""Jobs of an array: statistics are read seldom, and one job writes the output."""

import collections
import contextlib
import os
import sys
import threading
from concurrent import futures

from data_prep.filter import run_filter
from data_prep.filtering import job as filter_job
from tests.data_prep.filtering.jobs import job_config, write_tars

# What this process opens while somebody listens; a hook cannot be taken away again.
_listeners = []


def _hook(event, args):
    if _listeners and event == "open" and isinstance(args[0], str | os.PathLike):
        _listeners[-1].append((os.fspath(args[0]), args[2] & (os.O_WRONLY | os.O_RDWR) == 0))


sys.addaudithook(_hook)


@contextlib.contextmanager
def _listen():
    found = []
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners.pop()


def test_jobs_that_end_at_the_same_moment_read_no_more(tmp_path, monkeypatch):
    source = write_tars(tmp_path / "in", 9, pairs_per_tar=1)
    config = job_config(source, tmp_path / "out", report_samples=0, examples_per_shard=4)
    assert run_filter(job_config(source, tmp_path / "alone", examples_per_shard=4)) == {}
    all_filtered = threading.Barrier(6)
    filter_parts = filter_job.filter_parts

    def filter_and_wait(*args):
        failures = filter_parts(*args)
        all_filtered.wait(timeout=300)
        return failures

    monkeypatch.setattr(filter_job, "filter_parts", filter_and_wait)
    with _listen() as opened, futures.ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(run_filter, config, number, 6) for number in range(6)]
        assert [job.result() for job in jobs] == [{}] * 6
    reads = collections.Counter(
        path for path, is_read in opened if is_read and path.endswith(".tfrecord.stats.json")
    )
    of_parts = {path: count for path, count in reads.items() if "/parts/" in path}
    assert len(of_parts) == 9 and max(of_parts.values()) <= 2
    assert not list((tmp_path / "out").glob(".leader*"))
    shards = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tfrecord")}
    assert len(shards) == 3
    for name, data in shards.items():
        assert (tmp_path / "alone" / name).read_bytes() == data
