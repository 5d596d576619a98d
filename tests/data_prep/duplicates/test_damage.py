"""Damaged files of the output: named or made again, never read."""

import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from data_prep.duplicates import image_hashes, job, scan
from data_prep.duplicates.table import Lookup
from data_prep.filter import run_filter
from tests.data_prep.duplicates.jobs import duplicates_config, read_dropped, scene, write_pictures
from tests.data_prep.filtering.jobs import job_config
from tests.make import encoded


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two tars, in which 20 of 40 pictures are copies, and the output for them."""
    folder = tmp_path_factory.mktemp("finished")
    pictures = {f"p{i:02d}": encoded(scene(i, 9)) for i in range(20)}
    write_pictures(folder / "in" / "0.tar", pictures)
    write_pictures(folder / "in" / "1.tar", {f"c{key}": data for key, data in pictures.items()})
    assert job.run(duplicates_config(folder / "in", folder / "out")) == {}
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the output."""
    return shutil.copytree(finished / "out", tmp_path / "out")


@pytest.fixture
def run(finished, out):
    """Runs the job once more on the copy; settings may differ."""
    return lambda **changes: job.run(duplicates_config(finished / "in", out, **changes))


_EXPECTED = {f"cp{i:02d}": ("exact", f"p{i:02d}") for i in range(20)}


def _damages(data: bytes, count: int) -> Iterator[bytes]:
    """Some single damages: flipped bytes, cuts, zeroed pages."""
    generator = np.random.default_rng(0)
    for number in range(count):
        position = int(generator.integers(len(data)))
        changed = bytearray(data)
        if number % 3 == 0:
            changed[position] ^= int(generator.integers(1, 256))
        elif number % 3 == 1:
            del changed[position:]
        else:
            page = slice(position, min(position + 512, len(data)))
            changed[page] = bytes(page.stop - page.start)
        if changed != data:
            yield bytes(changed)


def test_no_damage_of_the_table_is_read(out, finished, tmp_path):
    path = out / "dropped.arrow"
    for number, damaged in enumerate(_damages(path.read_bytes(), 120)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"dropped\.arrow.*damaged"):
            pytest.fail(f"{number}: read {Lookup(out).find(['p00', 'cp00'])}")
    # The filter names it before it begins.
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
        (out / "duplicates.json").unlink()  # else nothing reads it
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
    changes = {"threshold": 0.8}  # so that the scans are read
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


def test_no_damage_of_an_index_of_hashes_changes_it(tmp_path):
    generator = np.random.default_rng(1)
    index = image_hashes.Index(
        np.array([f"k{i}" for i in range(50)]),
        generator.integers(0, 256, (50, 16), np.uint8),
        generator.integers(0, 2**63, 50, np.uint64),
        np.ones(50, bool),
    )
    path = tmp_path / "index.npz"
    image_hashes.write_index(path, index)
    for number, damaged in enumerate(_damages(path.read_bytes(), 150)):
        path.write_bytes(damaged)
        image_hashes.open_index.cache_clear()
        try:
            found = image_hashes.open_index(str(path))
        except ValueError as error:
            assert str(path) in str(error), number
        else:  # what an archive says besides its contents, such as times
            assert (found.digest(), found.keys.tolist()) == (index.digest(), index.keys.tolist())


def test_a_damaged_description_is_named(out, run):
    path, settings = out / "duplicates.json", out / "settings.json"
    whole = path.read_bytes()
    for damaged in (whole[:50], whole.replace(b'"digest": "', b'"digest": "0')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"duplicates\.json"):
            Lookup(out)
    data = bytearray(settings.read_bytes())
    data[data.index(b": ") + 3] ^= 1
    settings.write_bytes(data)
    with pytest.raises(ValueError, match=r"settings\.json"):
        run()
