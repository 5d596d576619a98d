"""Pairs that end their worker: found, counted and left out; the shard is that without them."""

import os
import pathlib
import signal
import tarfile

from data_prep.filter import run_filter
from data_prep.jobs.engine import BATCH, PAIR, CrashSearch
from data_prep.steps import registry
from data_prep.steps.base import Step
from tests.data_prep.filtering.jobs import job_config, read_counts, read_records, write_tars


class DeadlyStep(Step):
    """Ends the process at two pictures of the first tar, in different ways."""

    name = "deadly"
    order = 15
    reasons = {}

    @classmethod
    def describe_rules(cls, config) -> dict:
        return {}  # so that the folders of both tests belong to one config

    def measure(self, batch):
        captions = {candidate.pair.caption for candidate in batch}
        if "name 0 1" in captions:
            os._exit(7)
        if "name 0 6" in captions:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


def _copy_without(folder: pathlib.Path, source: pathlib.Path, keys: set[str]) -> None:
    folder.mkdir()
    for path in sorted(source.glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(folder / path.name, "w") as new:
            for member in old.getmembers():
                if member.name.partition(".")[0] not in keys:
                    new.addfile(member, old.extractfile(member))


def test_pairs_that_kill_their_worker_are_found_and_the_shard_goes_on(tmp_path, monkeypatch):
    pattern = write_tars(tmp_path / "in", 2, pairs_per_tar=8)
    _copy_without(tmp_path / "without", tmp_path / "in", {"0-1", "0-6"})
    settings = {"batch_size": 3, "keep_parts": True}
    assert (
        run_filter(job_config(str(tmp_path / "without" / "*.tar"), tmp_path / "a", **settings))
        == {}
    )

    monkeypatch.setitem(registry.STEPS, "deadly", DeadlyStep)
    config = job_config(pattern, tmp_path / "b", num_workers=1, **settings)
    assert run_filter(config) == {}
    assert read_records(tmp_path / "b") == read_records(tmp_path / "a")
    for path in (tmp_path / "a").glob("*.tfrecord"):
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
    counts = read_counts(tmp_path / "b")
    assert counts["dropped"]["source"] == {"crashed": 2}
    assert counts["read"] == 16 and counts["kept"] == 14
    crashed = counts["samples"]["source/crashed"]
    assert sorted(key for _, key, _ in crashed) == ["0-1", "0-6"]
    assert not [p for p in (tmp_path / "b").rglob("*") if p.name.endswith(".tmp")]


def _record(stage, first, last):
    return {"stage": stage, "first": first, "last": last}


def test_a_pair_is_blamed_only_where_two_deaths_agree():
    begun = CrashSearch()
    in_batch = begun.after(_record(BATCH, 256, 512))
    assert in_batch == CrashSearch(suspects=(256, 512))
    # Another batch: as when memory ran out, now here, now there.
    assert in_batch.after(_record(BATCH, 512, 700)) == CrashSearch(suspects=(512, 700))
    found = in_batch.after(_record(PAIR, 300, 301))
    assert found == CrashSearch(crashed=(300,))
    again = found.after(_record(BATCH, 256, 512)).after(_record(PAIR, 299, 300))
    assert again.crashed == (300, 299)
    # Every pair alone does no harm, or nothing had begun: no pair is blamed, and it ends.
    for record in (None, _record(BATCH, 256, 512)):
        search, deaths = in_batch, 0
        while search is not None:
            assert search.crashed == ()
            search, deaths = search.after(record), deaths + 1
        assert deaths == 3
