"""Failed, new, removed and changed inputs, and damaged outputs: only they are made again.

`tests/fuzz/kinds/written.py` tests that damaged contents are never used.
"""

import json
import os
import pathlib

import pytest

from data_prep.duplicates import job, scan
from data_prep.filter import run_filter
from data_prep.jobs.failures import INCOMPLETE_STATUS
from data_prep.jobs.workers import ProcessDeath
from tests.data_prep.duplicates.jobs import (
    duplicates_config,
    read_dropped,
    read_rows,
    write_pictures,
)
from tests.data_prep.filtering.jobs import job_config
from tests.make import encoded, noise


def _write_tar(path, seeds) -> None:
    found = {f"{path.stem}-{i}": encoded(noise(n, (60, 45), 9)) for i, n in enumerate(seeds)}
    write_pictures(path, found)


@pytest.fixture
def tars(tmp_path):
    """Three tars of four pairs; all start with the same picture."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in range(3):
        _write_tar(folder / f"{name}.tar", [0, *range(10 * name + 1, 10 * name + 4)])
    return folder


@pytest.fixture
def scanned(monkeypatch):
    """Records the names of the scanned inputs."""
    names = []

    def counted(unit, report, *, config):
        names.append(os.path.basename(unit.source.path))
        scan.scan_unit(unit, report, config=config)

    monkeypatch.setattr(job, "scan_unit", counted)
    return names


# The number of pairs, and those that are dropped: every first picture but that of the first tar.
_EXPECTED = (12, {"1-0": "0-0", "2-0": "0-0"})
_SETTINGS = {"keep": "first", "max_failed_shards": 1.0, "max_changed_shards": 1.0}


def _config(tars, output, **changes):
    return duplicates_config(tars, output, **_SETTINGS | changes)


def _dropped(output):
    dropped = {key: kept for key, (_, kept) in read_dropped(output).items()}
    return len(read_rows(output)), dropped


def _cut(path) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 100])
    return whole


def test_a_cut_off_tar_is_left_out_and_made_up_for(tars, tmp_path, scanned):
    out = tmp_path / "out"
    whole = _cut(tars / "1.tar")
    failures = job.run(_config(tars, out, max_failed_shards=0.0))
    assert list(failures) == [str(tars / "1.tar")] and failures.exit_status == 1
    failures = job.run(_config(tars, out))
    assert list(failures) == [str(tars / "1.tar")] and failures.exit_status == INCOMPLETE_STATUS
    assert scanned == ["0.tar", "1.tar", "2.tar", "1.tar"]
    assert _dropped(out) == (8, {"2-0": "0-0"})
    summary = json.loads((out / "duplicates.json").read_text())
    assert [found["source"] for found in summary["failed"]] == [str(tars / "1.tar")]

    scanned.clear()
    (tars / "1.tar").rename(tmp_path / "1.tar")
    assert job.run(_config(tars, out)) == {}
    assert "failed" not in json.loads((out / "duplicates.json").read_text())
    assert scanned == []
    (tars / "1.tar").write_bytes(whole)
    assert job.run(_config(tars, out)) == {}
    assert scanned == ["1.tar"]
    assert _dropped(out) == _EXPECTED


def test_only_inputs_that_came_or_changed_are_scanned(tars, tmp_path, scanned):
    out = tmp_path / "out"
    assert job.run(_config(tars, out)) == {}
    scanned.clear()
    os.remove(tars / "0.tar")
    assert job.run(_config(tars, out)) == {}
    assert scanned == []
    assert _dropped(out) == (8, {"2-0": "1-0"})
    assert len(list((out / "scan").glob("*.arrow"))) == 2
    _write_tar(tars / "05.tar", [0, 51])
    assert job.run(_config(tars, out)) == {}
    assert scanned == ["05.tar"]
    assert _dropped(out) == (10, {"1-0": "05-0", "2-0": "05-0"})
    made = (out / "dropped.arrow").stat().st_mtime_ns
    os.utime(tars / "2.tar", ns=(1, 1))  # same bytes: no new search
    assert job.run(_config(tars, out)) == {}
    assert scanned == ["05.tar", "2.tar"]
    assert (out / "dropped.arrow").stat().st_mtime_ns == made
    os.utime(tars / "2.tar", ns=(2, 2))
    assert job.run(_config(tars, out, input_identity="size")) == {}
    assert scanned == ["05.tar", "2.tar"]
    for path in tars.iterdir():
        os.utime(path, ns=(3, 3))
    before = sorted((out / "scan").iterdir())
    with pytest.raises(ValueError, match=r"and 3 of inputs that were replaced.*max_changed_shards"):
        job.run(_config(tars, out))
    assert sorted((out / "scan").iterdir()) == before


def _when_first_scanned(monkeypatch, act):
    """Calls a function once, after the first scan of 1.tar."""
    left = [act]

    def scan_and_act(unit, report, *, config):
        scan.scan_unit(unit, report, config=config)
        if left and unit.source.path.endswith("1.tar"):
            left.pop()(unit)

    monkeypatch.setattr(job, "scan_unit", scan_and_act)


def _add_a_picture(unit):
    _write_tar(pathlib.Path(unit.source.path), [0, 11, 12, 13, 14])


_STRICT = {"max_failed_shards": 0.01, "max_changed_shards": 0.01}  # the defaults


def test_an_input_that_changes_after_its_scan_is_scanned_again(tars, tmp_path, monkeypatch):
    _when_first_scanned(monkeypatch, _add_a_picture)
    assert job.run(_config(tars, tmp_path / "out", **_STRICT)) == {}
    assert _dropped(tmp_path / "out") == (13, {"1-0": "0-0", "2-0": "0-0"})


def test_scans_removed_during_a_run_are_named_and_made_by_the_next(tars, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def remove_all(unit):
        for path in (out / "scan").iterdir():
            path.unlink()

    _when_first_scanned(monkeypatch, remove_all)
    failures = job.run(_config(tars, out, **_STRICT))
    assert list(failures) == [str(tars / "0.tar"), str(tars / "1.tar")]
    assert failures.exit_status == 1
    assert job.run(_config(tars, out, **_STRICT)) == {}
    assert _dropped(out) == _EXPECTED


def test_a_picture_that_ends_its_worker_is_compared_with_none(tars, tmp_path, monkeypatch):
    describe = scan.describe_picture

    def deadly(data, **options):
        if data == encoded(noise(12, (60, 45), 9)):
            raise ProcessDeath("died")
        return describe(data, **options)

    monkeypatch.setattr(scan, "describe_picture", deadly)
    assert job.run(_config(tars, tmp_path / "out")) == {}
    assert _dropped(tmp_path / "out") == _EXPECTED
    summary = json.loads((tmp_path / "out" / "duplicates.json").read_text())
    assert summary["without_embedding"] == 1
    assert not list((tmp_path / "out" / "scan").glob(".*"))


@pytest.fixture
def finished(tars, tmp_path):
    """The output for the tars."""
    out = tmp_path / "out"
    assert job.run(_config(tars, out)) == {}
    return out


def test_the_filter_names_a_damaged_table_before_it_begins(tars, finished, tmp_path):
    path = finished / "dropped.arrow"
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    source, kept = str(tars / "*.tar"), tmp_path / "kept"
    with pytest.raises(ValueError, match=r"config\.duplicates\.table='.*dropped\.arrow'"):
        run_filter(job_config(source, kept, duplicates__table=str(finished)))
    assert not list(kept.rglob("*.tfrecord"))


@pytest.mark.parametrize("name", ["dropped.arrow", "clusters.npz", "centroids.npz", "groups"])
def test_the_same_command_makes_what_is_damaged_again(tars, finished, name):
    path = finished / name
    path = next(path.iterdir()) if path.is_dir() else path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    if name != "dropped.arrow":
        (finished / "duplicates.json").unlink()  # otherwise nothing reads the file
    if name == "centroids.npz":
        (finished / "clusters.npz").unlink()
    assert job.run(_config(tars, finished)) == {}
    assert _dropped(finished) == _EXPECTED
    assert path.read_bytes() == whole


@pytest.mark.parametrize("ending", [".arrow", ".arrow.stats.json"])
def test_a_damaged_scan_is_made_again(tars, finished, scanned, ending):
    path = min((finished / "scan").glob(f"*[0-9a-f]{ending}"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes(40))
    changed = _config(tars, finished, threshold=0.8)  # a change for which the job reads the scans
    scanned.clear()
    if ending == ".arrow":
        (reason,) = job.run(changed).values()
        assert str(path) in reason
    assert job.run(changed) == {}
    assert len(scanned) == 1 and path.read_bytes() == whole
    assert _dropped(finished) == _EXPECTED
