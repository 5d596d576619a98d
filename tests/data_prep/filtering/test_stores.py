"""The filter with input and output in object stores: an S3 server and a store with counters."""

import collections
import functools
import json
import threading

import fsspec
import pytest

from data_prep.filter import run_filter
from data_prep.filtering import plan
from diht_jax.storage import files, stores
from tests.data_prep.filtering.jobs import job_config, snapshot, write_tars
from tests.records.stores import Killed, MeteredStore

# Files that contain the output's location or the cost of the run.
_OWN = ("stats.json", "settings.json", "dataset_info.json")


def test_the_output_on_s3_is_the_local_one(tmp_path, s3_bucket):
    pattern = write_tars(tmp_path / "in", 2)
    changes = {"examples_per_shard": 6, "output_format": "webdataset"}
    assert run_filter(job_config(pattern, tmp_path / "out", **changes)) == {}
    url = f"{s3_bucket}/filter"
    fsspec.filesystem("s3").put(str(tmp_path / "in"), f"{url}/in", recursive=True)
    config = job_config(f"{url}/in/*.tar", f"{url}/out", **changes)
    assert run_filter(config) == {}
    local, stored = snapshot(tmp_path / "out"), snapshot(f"{url}/out")
    assert stored.keys() == local.keys()
    differing = {name for name in local if local[name] != stored[name]}
    assert not {name for name in differing if name.rpartition("/")[2] not in _OWN}
    assert json.loads(stored["stats.json"])["counts"] == json.loads(local["stats.json"])["counts"]
    assert {"report.json", "report.html"} <= {n.rpartition("/")[2] for n in _names(f"{url}/out")}
    # A second run does nothing.
    written = _versions(f"{url}/out")
    assert run_filter(config) == {}
    assert _versions(f"{url}/out") == written
    fsspec.filesystem("s3").rm(url, recursive=True)


def _names(url):
    return fsspec.filesystem(url.split(":")[0]).find(url)


def _versions(url):
    system = fsspec.filesystem("s3")
    system.invalidate_cache()
    return {name: info["LastModified"] for name, info in system.find(url, detail=True).items()}


@pytest.fixture
def metered(tmp_path):
    """Puts two tars in a store with counters; returns a function that makes a config."""
    write_tars(tmp_path / "in", 2)
    MeteredStore.reset()
    for path in (tmp_path / "in").iterdir():
        fsspec.filesystem("metered").put_file(path, f"/in/{path.name}")
    MeteredStore.requests.clear()
    yield functools.partial(job_config, "metered:///in/*.tar", examples_per_shard=6)
    MeteredStore.reset()


def test_a_run_that_is_killed_at_whatever_write_goes_on(metered):
    assert run_filter(metered("metered:///whole")) == {}
    expected = snapshot("metered:///whole")
    num_writes = MeteredStore.requests["put"] + MeteredStore.requests["remove"]
    assert num_writes > 30
    for number in range(2, num_writes + 1, 4):
        out = f"metered:///killed{number}"
        MeteredStore.requests.clear()
        MeteredStore.ends_before = number
        with pytest.raises(Killed):
            run_filter(metered(out))
        MeteredStore.ends_before = 0
        done = {n for n in _names(out) if n.endswith(".tfrecord.stats.json")}
        before = {name: MeteredStore.store[name].modified for name in done}
        assert run_filter(metered(out)) == {}
        found = snapshot(out)
        assert found.keys() == expected.keys()
        assert {n for n in found if found[n] != expected[n]} <= {"stats.json", "dataset_info.json"}
        # Finished files are not written again.
        assert before.items() <= {n: MeteredStore.store[n].modified for n in _names(out)}.items()


def test_a_finished_output_shard_costs_two_requests(metered, monkeypatch):
    costs, threads = {}, set()
    read = MeteredStore.cat_file

    def cat_file(store, path, *args, **kwargs):
        if path.endswith(".tfrecord.stats.json") and "/parts/" not in path:
            threads.add(threading.current_thread())
        return read(store, path, *args, **kwargs)

    for number in (6, 1):
        config = metered(f"metered:///out{number}", examples_per_shard=number)
        assert run_filter(config) == {}
        with monkeypatch.context() as patch:
            patch.setattr(MeteredStore, "cat_file", cat_file)
            MeteredStore.requests.clear()
            assert run_filter(config) == {}
        names = [name for name in _names(config.output) if name.endswith(".tfrecord")]
        costs[len(names)] = MeteredStore.requests.copy()
    (few, of_few), (many, of_many) = sorted(costs.items())
    assert many >= few + 4
    # Two reads of its statistics: to find the shard's owner, and for the plan. Listings have sizes.
    assert of_many["get"] - of_few["get"] == 2 * (many - few)
    for kind in ("list", "info", "put", "remove"):
        assert of_many[kind] == of_few[kind]
    # The reads run in parallel.
    assert threading.main_thread() not in threads and len(threads) > 1


def test_a_store_that_fails_one_request_in_twenty_changes_no_byte(metered, monkeypatch):
    delays = []
    monkeypatch.setattr(stores, "sleep", delays.append)
    assert run_filter(metered("metered:///good")) == {}
    MeteredStore.failing_every = 20
    assert run_filter(metered("metered:///flaky")) == {}
    MeteredStore.failing_every = 0
    assert len(delays) >= 5
    good, flaky = snapshot("metered:///good"), snapshot("metered:///flaky")
    assert good.keys() == flaky.keys()
    assert {n for n in good if good[n] != flaky[n]} <= {"stats.json", "dataset_info.json"}


@pytest.fixture
def api_calls(monkeypatch):
    """Counts the calls to S3 by operation; every page of a listing is a call."""
    client = pytest.importorskip("aiobotocore.client").AioBaseClient
    calls, call = collections.Counter(), client._make_api_call

    async def count(self, operation, arguments):
        calls[operation] += 1
        return await call(self, operation, arguments)

    monkeypatch.setattr(client, "_make_api_call", count)
    return calls


def test_inputs_are_planned_by_the_pages_of_their_listing(s3_bucket, api_calls):
    models = pytest.importorskip("moto.s3.models")
    (backend,) = (b["aws"] for b in models.s3_backends.values() if "bucket" in b["aws"].buckets)
    for number in range(3_000):  # put directly, without S3 calls
        backend.put_object("bucket", f"many/{number:05d}.tar", b"tar")
    config = job_config(f"{s3_bucket}/many/*.tar", f"{s3_bucket}/planned")
    job = plan.plan_job(config, 0, 1, "local", overwrite=False)
    assert plan.find_done(job, overwrite=False) == ({}, False)
    tasks = job.tasks
    assert len(tasks) == 3_000
    assert api_calls["ListObjectsV2"] <= 3 + 9  # 1,000 names a page
    assert api_calls["HeadObject"] + api_calls["GetObject"] <= 4
    assert api_calls.total() <= 3 + 13
    identities = {task.source.identity()["changed_ns"] for task in tasks}
    assert len(identities) == 1 and None not in identities  # same contents, known without a call
    assert api_calls.total() <= 3 + 13
    # A small file, such as the statistics of a part, costs one request.
    files.write_bytes(f"{s3_bucket}/planned/small", b"whole")
    api_calls.clear()
    assert files.read_bytes(f"{s3_bucket}/planned/small") == b"whole"
    assert api_calls == {"GetObject": 1}
    for name in list(backend.buckets["bucket"].keys):
        if name.startswith(("many/", "planned/")):
            backend.delete_object("bucket", name)
