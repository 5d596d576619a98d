"""Damaged output files: the job makes them again, and the filter names them.

`tests/fuzz/kinds/written.py` tests that damaged contents are never used.
"""

import shutil

import pytest

from data_prep.duplicates import job, scan
from data_prep.filter import run_filter
from tests.data_prep.duplicates.jobs import duplicates_config, read_dropped, scene, write_pictures
from tests.data_prep.filtering.jobs import job_config
from tests.make import encoded


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two tars of 20 pictures, the second with copies of the first, and the output for them."""
    folder = tmp_path_factory.mktemp("finished")
    pictures = {f"p{i:02d}": encoded(scene(i, 9)) for i in range(20)}
    write_pictures(folder / "in" / "0.tar", pictures)
    write_pictures(folder / "in" / "1.tar", {f"c{key}": data for key, data in pictures.items()})
    assert job.run(duplicates_config(folder / "in", folder / "out")) == {}
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished output."""
    return shutil.copytree(finished / "out", tmp_path / "out")


@pytest.fixture
def run(finished, out):
    """Runs the job again on the copy, with optional changes of the settings."""
    return lambda **changes: job.run(duplicates_config(finished / "in", out, **changes))


_EXPECTED = {f"cp{i:02d}": ("exact", f"p{i:02d}") for i in range(20)}


def test_the_filter_names_a_damaged_table_before_it_begins(out, finished, tmp_path):
    path = out / "dropped.arrow"
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    source, kept = str(finished / "in" / "*.tar"), tmp_path / "kept"
    with pytest.raises(ValueError, match=r"config\.duplicates\.table='.*dropped\.arrow'"):
        run_filter(job_config(source, kept, duplicates__table=str(out)))
    assert not list(kept.rglob("*.tfrecord"))


@pytest.mark.parametrize("name", ["dropped.arrow", "clusters.npz", "centroids.npz", "groups"])
def test_the_same_command_makes_what_is_damaged_again(out, run, name):
    path = out / name
    path = next(path.iterdir()) if path.is_dir() else path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    if name != "dropped.arrow":
        (out / "duplicates.json").unlink()  # otherwise nothing reads the file
    if name == "centroids.npz":
        (out / "clusters.npz").unlink()
    assert run() == {}
    assert read_dropped(out) == _EXPECTED
    assert path.read_bytes() == whole


@pytest.mark.parametrize("ending", [".arrow", ".arrow.stats.json"])
def test_a_damaged_scan_is_made_again(out, run, ending, monkeypatch):
    path = min((out / "scan").glob(f"*[0-9a-f]{ending}"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes(40))
    changes = {"threshold": 0.8}  # a change for which the job reads the scans
    scanned = []

    def counted(unit, report, *, config):
        scanned.append(unit.output)
        scan.scan_unit(unit, report, config=config)

    monkeypatch.setattr(job, "scan_unit", counted)
    if ending == ".arrow":
        (reason,) = run(**changes).values()
        assert str(path) in reason
    assert run(**changes) == {}
    assert scanned == [str(path).removesuffix(".stats.json")]
    assert path.read_bytes() == whole and read_dropped(out) == _EXPECTED
