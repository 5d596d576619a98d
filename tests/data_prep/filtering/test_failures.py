"""Failing inputs, disks and pairs: their effect on a job."""

import os
import resource
import signal

import pytest

from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from data_prep.filtering.replay import Replay
from data_prep.jobs import shards
from data_prep.jobs.engine import BATCH, PAIR, CrashSearch
from data_prep.steps import registry
from data_prep.steps.base import Step
from diht_jax.storage import stores
from tests.data_prep.filtering.jobs import job_config, read_counts, read_records, write_tars


def test_of_a_tar_that_is_cut_off_the_pairs_before_are_kept_where_the_config_asks_for_it(tmp_path):
    pattern = write_tars(tmp_path / "in", 3, pairs_per_tar=4)
    cut = tmp_path / "in" / "00001.tar"
    # A pair takes four blocks of 512 bytes: this cuts within the caption of the third pair.
    cut.write_bytes(cut.read_bytes()[: 2 * 2048 + 1540])
    failures = run_filter(job_config(pattern, tmp_path / "strict"))
    assert list(failures) == [str(cut)]
    assert "cannot be read to its end" in failures[str(cut)]

    config = job_config(pattern, tmp_path / "kept", keep_before_damage=True)
    assert run_filter(config) == {}
    keys = [record.key for record in read_records(tmp_path / "kept")]
    assert keys == ["0-0", "0-1", "0-2", "0-3", "1-0", "1-1", "2-0", "2-1", "2-2", "2-3"]
    assert read_counts(tmp_path / "kept")["read"] == 10
    warnings = read_report(tmp_path / "kept")["warnings"]
    assert len([text for text in warnings if f"{cut}: the tar archive cannot be read" in text]) == 1


def test_what_an_input_gave_before_it_was_damaged_is_no_part_of_a_replay(tmp_path, monkeypatch):
    pattern = write_tars(tmp_path / "in", 3, pairs_per_tar=4)
    cut, finish = tmp_path / "in" / "00001.tar", shards.finish_task

    def finish_and_cut(task, *rest):
        stats = finish(task, *rest)
        if task.source.path == str(cut):
            cut.write_bytes(cut.read_bytes()[:3000])
        return stats

    monkeypatch.setattr(shards, "finish_task", finish_and_cut)
    assert list(run_filter(job_config(pattern, tmp_path / "out"))) == [str(cut)]
    assert Replay(str(tmp_path / "out")).run().funnel.read == 8


@pytest.mark.parametrize("output_format", ["tfrecord", "array_record", "webdataset"])
def test_an_output_that_may_not_become_larger_is_named_and_waited_for_no_time(
    tmp_path, output_format
):
    """Sets the operating system's file size limit, and raises it until all files fit."""
    source, output = write_tars(tmp_path / "in", 1, pairs_per_tar=40), tmp_path / "out"
    config = job_config(source, output, output_format=output_format, retries=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stopped: list[str] = []
    for limit in (0, *(2**power for power in range(10, 20))):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert run_filter(config) == {}
            break
        except stores.FullError as error:
            stopped.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [text for text in stopped if not text.startswith(f"{output}/")] == []
    assert len(set(stopped)) > 1
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]


def test_pipes_and_links_that_lead_nowhere_cost_only_themselves(tmp_path):
    source, output = write_tars(tmp_path / "in", 2), tmp_path / "out"
    bad = [tmp_path / "in" / name for name in ("a_pipe.tar", "b_loop.tar", "c_nowhere.tar")]
    os.mkfifo(bad[0])
    bad[1].symlink_to(bad[1].name)
    bad[2].symlink_to("nowhere.tar")
    for number, pattern in enumerate((source, str(tmp_path / "in"))):
        failures = run_filter(job_config(pattern, output / str(number), max_failed_shards=3))
        assert list(failures) == [str(path) for path in bad]
        assert [path for path in bad if str(path) not in failures[str(path)]] == []
        assert failures.exit_status == 3
        assert len(read_records(output / str(number))) == 10


class DeadlyStep(Step):
    """Kills the process at one picture of the first tar."""

    name = "deadly"
    order = 15
    reasons = {}

    @classmethod
    def describe_rules(cls, config) -> dict:
        return {}

    def measure(self, batch):
        if "name 0 6" in {candidate.pair.caption for candidate in batch}:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_a_pair_that_kills_its_worker_is_found_and_the_shard_goes_on(tmp_path, monkeypatch):
    pattern = write_tars(tmp_path / "in", 2, pairs_per_tar=8)
    assert run_filter(job_config(pattern, tmp_path / "all")) == {}
    monkeypatch.setitem(registry.STEPS, "deadly", DeadlyStep)
    config = job_config(pattern, tmp_path / "out", num_workers=1, batch_size=3)
    assert run_filter(config) == {}
    others = [r for r in read_records(tmp_path / "all") if r.key != "0-6"]
    assert read_records(tmp_path / "out") == others
    counts = read_counts(tmp_path / "out")
    assert counts["dropped"]["source"] == {"crashed": 1}
    assert counts["read"] == 16 and counts["kept"] == 15
    assert [key for _, key, _ in counts["samples"]["source/crashed"]] == ["0-6"]
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.endswith(".tmp")]


def _record(stage, first, last):
    return {"stage": stage, "first": first, "last": last}


def test_a_pair_is_blamed_only_where_two_deaths_agree():
    begun = CrashSearch()
    in_batch = begun.after(_record(BATCH, 256, 512))
    assert in_batch == CrashSearch(suspects=(256, 512))
    # Another batch, as when memory runs out at changing places.
    assert in_batch.after(_record(BATCH, 512, 700)) == CrashSearch(suspects=(512, 700))
    found = in_batch.after(_record(PAIR, 300, 301))
    assert found == CrashSearch(crashed=(300,))
    again = found.after(_record(BATCH, 256, 512)).after(_record(PAIR, 299, 300))
    assert again.crashed == (300, 299)
    # Every pair alone succeeds, or nothing has begun: no pair is blamed, and the search ends.
    for record in (None, _record(BATCH, 256, 512)):
        search, deaths = in_batch, 0
        while search is not None:
            assert search.crashed == ()
            search, deaths = search.after(record), deaths + 1
        assert deaths == 3
