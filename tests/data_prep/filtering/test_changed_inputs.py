"""Added, removed and changed inputs: each change filters only its own part again."""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import shutil
import tarfile

import pytest

from data_prep import filter as filter_job
from data_prep.decisions.table import read_manifest
from data_prep.filter import run_filter
from data_prep.labelling.examples import read_counts as read_concepts
from diht_jax.records.dataset_index import read_index
from diht_jax.storage import files
from tests.data_prep.filtering.jobs import (
    job_config,
    part_names,
    read_records,
    snapshot,
    when_done,
    write_tars,
)


def _when_filtered(monkeypatch, act) -> None:
    """Calls `act` with each task after its part is written."""
    real = filter_job.filter_shard

    def filter_shard(task, report, **keywords):
        result = real(task, report, **keywords)
        act(task)
        return result

    monkeypatch.setattr(filter_job, "filter_shard", filter_shard)


@pytest.fixture
def filtered(monkeypatch) -> list[str]:
    """Records the names of the filtered inputs, in order."""
    found: list[str] = []
    _when_filtered(monkeypatch, lambda task: found.append(pathlib.Path(task.source.path).name))
    return found


def _add(folder: pathlib.Path, name: str, like: str) -> None:
    """Writes a copy of a tar under a new name, with new keys."""
    with tarfile.open(folder / like) as old, tarfile.open(folder / name, "w") as new:
        for member in old:
            data = old.extractfile(member)
            member.name = f"{name.removesuffix('.tar')}-{member.name}"
            new.addfile(member, data)


# Where the parts' records are: in kept parts, in the output shards, or in parts as the output.
_KINDS = (
    {"keep_parts": True, "examples_per_shard": 4},
    {"keep_parts": False, "examples_per_shard": 4, "concepts": True},
    {"examples_per_shard": None},
)


@pytest.mark.parametrize("settings", _KINDS, ids=["kept", "copied", "output"])
def test_tars_in_the_middle_are_added_replaced_and_removed(tmp_path, filtered, settings):
    source, output = write_tars(tmp_path / "in", 6, pairs_per_tar=2), tmp_path / "out"
    config = job_config(source, output, **settings)
    run_filter(config)
    before = when_done(output)
    filtered.clear()
    _add(tmp_path / "in", "00002b.tar", like="00000.tar")
    assert run_filter(config) == {}
    assert filtered == ["00002b.tar"]
    keys = (output / "kept_keys.txt").read_text().split()
    assert keys == [record.key for record in read_records(output)]
    if config.examples_per_shard is not None:  # otherwise sorted by name
        assert keys[4:8] == ["2-0", "2-1", "00002b-0-0", "00002b-0-1"]
    assert {name: when_done(output)[name] for name in before} == before
    filtered.clear()
    _add(tmp_path / "in", "00004.tar", like="00001.tar")
    (tmp_path / "in" / "00003.tar").unlink()
    with pytest.raises(ValueError, match=r"1 are made again, 1 removed, and 5 stay"):
        run_filter(config)
    is_asked_for = config.examples_per_shard is None
    config.max_changed_shards = 1 if is_asked_for else 2
    assert run_filter(config, overwrite=is_asked_for) == {}
    assert filtered == ["00004.tar"]
    gone = part_names(output)
    run_filter(job_config(source, tmp_path / "fresh", **settings))
    assert snapshot(output) == snapshot(tmp_path / "fresh")
    assert gone == part_names(tmp_path / "fresh")


def test_the_jobs_of_an_array_together_replace_no_more_than_one_job_would(tmp_path, filtered):
    """At most 3 of 20 parts may change: with 20 changes every job refuses, with 3 none does.

    A job that starts when only some of the 3 are made again must not fail either.
    """
    source, output = write_tars(tmp_path / "in", 20, pairs_per_tar=1), tmp_path / "out"
    config = job_config(source, output, max_changed_shards=0.15)
    run_filter(config)
    before = snapshot(output)
    tars = sorted((tmp_path / "in").glob("*.tar"))
    times = [path.stat().st_mtime_ns for path in tars]
    filtered.clear()
    for path, time in zip(tars, times, strict=True):
        os.utime(path, ns=(time, time + 10**9))
    for index in range(4):
        with pytest.raises(ValueError, match="allows 3 inputs to be gone or replaced"):
            run_filter(config, index, 4)
    assert filtered == [] and snapshot(output) == before
    for number, (path, time) in enumerate(zip(tars, times, strict=True)):
        os.utime(path, ns=(time, time + 10**9 * (number in (3, 5, 7))))
    for index in range(4):
        assert run_filter(config, index, 4) == {}
    assert sorted(filtered) == ["00003.tar", "00005.tar", "00007.tar"]


def _after(count: int, change, monkeypatch) -> None:
    """Calls `change` once, after `count` parts are written."""
    made = itertools.count(1)
    _when_filtered(monkeypatch, lambda task: change() if next(made) == count else None)


def test_an_input_that_changes_while_the_filter_runs_is_filtered_again(
    tmp_path, filtered, monkeypatch
):
    source, output = write_tars(tmp_path / "in", 5, pairs_per_tar=1), tmp_path / "out"

    def change() -> None:
        _add(tmp_path / "in", "00001.tar", like="00002.tar")

    _after(3, change, monkeypatch)
    config = job_config(source, output, keep_parts=True)
    assert run_filter(config) == {}
    assert filtered.count("00001.tar") == 2 and len(filtered) == 6
    run_filter(job_config(source, tmp_path / "fresh", keep_parts=True))
    assert snapshot(output) == snapshot(tmp_path / "fresh")
    assert "00001-2-0" in (output / "kept_keys.txt").read_text().split()


def test_an_input_that_changes_after_its_job_of_an_array_has_ended_fails_the_last_job(tmp_path):
    source, output = write_tars(tmp_path / "in", 4, pairs_per_tar=1), tmp_path / "out"
    config = job_config(source, output)
    assert run_filter(config, 0, 2) == {}
    _add(tmp_path / "in", "00002.tar", like="00000.tar")
    failures = run_filter(config, 1, 2)
    assert list(failures) == [str(tmp_path / "in" / "00002.tar")] and failures.exit_status == 1
    assert run_filter(config, 0, 2) == {}
    run_filter(job_config(source, tmp_path / "fresh"))
    assert snapshot(output) == snapshot(tmp_path / "fresh")


def test_an_input_that_changes_whenever_it_was_read_fails(tmp_path, monkeypatch):
    source, output = write_tars(tmp_path / "in", 3, pairs_per_tar=1), tmp_path / "out"
    restless = tmp_path / "in" / "00001.tar"

    def touch(task) -> None:
        if task.source.path == str(restless):
            os.utime(restless, ns=(0, restless.stat().st_mtime_ns + 10**9))

    with monkeypatch.context() as patch:
        _when_filtered(patch, touch)
        failures = run_filter(job_config(source, output, max_failed_shards=0))
    assert list(failures) == [str(restless)] and failures.exit_status == 1
    assert run_filter(job_config(source, output, max_failed_shards=0)) == {}
    assert len(read_records(output)) == 3


def _remove_decisions_and_a_part(parts: pathlib.Path) -> None:
    one, other = sorted(parts.glob("*.decisions.parquet"))
    one.unlink()
    for path in parts.glob(other.name.partition(".")[0] + ".*"):
        path.unlink()


def test_parts_that_are_removed_while_the_filter_runs_are_an_error(tmp_path, monkeypatch, capsys):
    source, output = write_tars(tmp_path / "in", 3, pairs_per_tar=1), tmp_path / "out"
    _after(2, lambda: _remove_decisions_and_a_part(output / "parts"), monkeypatch)
    config = job_config(source, output)
    failures = run_filter(config)
    assert set(failures) == {str(tmp_path / "in" / f"0000{i}.tar") for i in (0, 1)}
    assert failures.exit_status == 1
    assert "other jobs" not in capsys.readouterr().out
    assert run_filter(config) == {}
    assert len(read_records(output)) == 3


def test_other_output_shards_are_copied_and_a_kill_while_they_are_loses_nothing(
    tmp_path, filtered, monkeypatch
):
    """Interrupts before every seventh change; parts that were removed are never filtered again."""
    source = write_tars(tmp_path / "in", 3, pairs_per_tar=3)
    run_filter(job_config(source, tmp_path / "done", concepts=True, examples_per_shard=4))
    run_filter(job_config(source, tmp_path / "wanted", concepts=True, examples_per_shard=2))
    filtered.clear()
    wanted, kills = snapshot(tmp_path / "wanted"), 0
    real = {name: getattr(files, name) for name in ("remove", "write_bytes")}
    while True:
        output = tmp_path / f"out{kills}"
        shutil.copytree(tmp_path / "done", output)
        config = job_config(source, output, concepts=True, examples_per_shard=2)
        left = [kills]

        def change(*args, name, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            real[name](*args)

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(files, name, functools.partial(change, name=name))
            with contextlib.suppress(KeyboardInterrupt):
                run_filter(config)
        was_killed = left[0] < 0
        assert run_filter(config) == {}
        assert snapshot(output) == wanted
        assert filtered == []
        shutil.rmtree(output)
        if not was_killed:
            break
        kills += 7
    assert kills > 30


def test_parts_as_output_hold_what_shards_would(tmp_path):
    source = write_tars(tmp_path / "in", 3, pairs_per_tar=2)
    run_filter(job_config(source, tmp_path / "sharded", concepts=True))
    output = tmp_path / "out"
    config = job_config(source, output, concepts=True, examples_per_shard=None)
    assert run_filter(config) == {}
    assert [path.name for path in sorted(output.glob("*.tfrecord"))] == sorted(
        read_manifest(str(output))[i]["name"] for i in range(3)
    )
    assert not (output / "parts").exists() and not (output / "dataset_info.json").exists()
    records = {record.key: record for record in read_records(output)}
    assert records == {record.key: record for record in read_records(tmp_path / "sharded")}
    paths = [[str(p) for p in (tmp_path / n).glob("*.tfrecord")] for n in ("out", "sharded")]
    found, expected = (read_concepts(names)[0] for names in paths)
    assert found == expected  # the label command needs these files next to a shard
    index = read_index(str(output))
    assert index.starts.tolist() == [0, 2, 4, 6]


def test_a_few_failures_do_not_hold_up_the_output(tmp_path):
    source, output = write_tars(tmp_path / "in", 8, pairs_per_tar=2), tmp_path / "out"
    broken = [tmp_path / "in" / f"{number:05d}.tar" for number in (2, 5)]
    whole = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(path.read_bytes()[:3000])
    failures = run_filter(job_config(source, output, max_failed_shards=1))
    assert list(failures) == [str(path) for path in broken] and not failures.output_written
    assert not (output / "stats.json").exists()
    output = tmp_path / "array"
    config = job_config(source, output, max_failed_shards=0.25)
    # Two jobs: the one that sees all parts writes the output, without the other's failed parts.
    assert not run_filter(config, 0, 2).output_written
    failures = run_filter(config, 1, 2)
    assert failures.output_written and set(failures) == {str(path) for path in broken}
    assert len(read_records(output)) == 12
    failed = json.loads((output / "stats.json").read_text())["failed"]
    assert [row["source"] for row in failed] == [str(path) for path in broken]
    for path, data in zip(broken, whole, strict=True):
        path.write_bytes(data)
    assert run_filter(config) == {}
    assert len(read_records(output)) == 16
    assert "failed" not in json.loads((output / "stats.json").read_text())
    run_filter(job_config(source, tmp_path / "fresh"))
    assert snapshot(output) == snapshot(tmp_path / "fresh")
