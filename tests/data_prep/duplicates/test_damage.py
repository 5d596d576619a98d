"""Damaged files of the output: named or made again, never read."""

import numpy as np
import pytest

from data_prep.duplicates import image_hashes, job, scan
from data_prep.duplicates.table import Lookup
from data_prep.filter import run_filter
from tests.data_prep.duplicates.jobs import duplicates_config, read_dropped, scene, write_pictures
from tests.data_prep.filtering.jobs import job_config
from tests.make import encoded


@pytest.fixture
def folder(tmp_path):
    """The output for two tars, in which 20 of 40 pictures are copies."""
    pictures = {f"p{i:02d}": encoded(scene(i, 9)) for i in range(20)}
    write_pictures(tmp_path / "in" / "0.tar", pictures)
    write_pictures(tmp_path / "in" / "1.tar", {f"c{key}": data for key, data in pictures.items()})
    assert _run(tmp_path) == {}
    return tmp_path


def _run(folder, **changes):
    return job.run(duplicates_config(folder / "in", folder / "out", **changes))


_EXPECTED = {f"cp{i:02d}": ("exact", f"p{i:02d}") for i in range(20)}


def _damages(data: bytes, count: int):
    """A name and bytes for each of some single damages: flipped bytes, cuts, zeroed pages."""
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
            yield f"{number} at {position}", bytes(changed)


def test_no_damage_of_the_table_is_read(folder):
    path = folder / "out" / "dropped.arrow"
    whole = path.read_bytes()
    for name, damaged in _damages(whole, 120):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"dropped\.arrow.*damaged"):
            pytest.fail(f"read {Lookup(folder / 'out').find(['p00', 'cp00'])} from damage {name}")
    path.write_bytes(whole)
    assert Lookup(folder / "out").find(["p00", "cp00"])[1].duplicate_of == "p00"


def test_the_filter_names_the_damaged_table_before_it_begins(folder):
    path = folder / "out" / "dropped.arrow"
    path.write_bytes(path.read_bytes()[::-1])
    config = job_config(
        str(folder / "in" / "*.tar"), folder / "kept", duplicates__table=str(folder / "out")
    )
    with pytest.raises(ValueError, match=r"config\.duplicates\.table='.*dropped\.arrow'"):
        run_filter(config)
    assert not list((folder / "kept").rglob("*.tfrecord"))


@pytest.mark.parametrize("name", ["dropped.arrow", "clusters.npz", "centroids.npz", "groups"])
def test_the_same_command_makes_what_is_damaged_again(folder, name):
    path = folder / "out" / name
    path = next(path.iterdir()) if path.is_dir() else path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    if name != "dropped.arrow":
        (folder / "out" / "duplicates.json").unlink()  # else nothing reads it
    if name == "centroids.npz":
        (folder / "out" / "clusters.npz").unlink()
    assert _run(folder) == {}
    assert read_dropped(folder / "out") == _EXPECTED
    assert path.read_bytes() == whole


@pytest.mark.parametrize("ending", [".arrow", ".arrow.stats.json"])
def test_a_damaged_scan_is_made_again(folder, ending, monkeypatch):
    path = min((folder / "out" / "scan").glob(f"*[0-9a-f]{ending}"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes(40))
    changes = {"threshold": 0.8}  # so that the scans are read
    scanned = []

    def counted(unit, report, *, config):
        scanned.append(unit.output)
        scan.scan_unit(unit, report, config=config)

    monkeypatch.setattr(job, "scan_unit", counted)
    if ending == ".arrow":
        (reason,) = _run(folder, **changes).values()
        assert str(path) in reason
    assert _run(folder, **changes) == {}
    assert scanned == [str(path).removesuffix(".stats.json")]
    assert path.read_bytes() == whole and read_dropped(folder / "out") == _EXPECTED


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
    for name, damaged in _damages(path.read_bytes(), 150):
        path.write_bytes(damaged)
        image_hashes.open_index.cache_clear()
        try:
            found = image_hashes.open_index(str(path))
        except ValueError as error:
            assert str(path) in str(error), name
        else:  # what an archive says besides its contents, such as times
            assert (found.digest(), found.keys.tolist()) == (index.digest(), index.keys.tolist())


def test_a_damaged_description_is_named(folder):
    path = folder / "out" / "duplicates.json"
    whole = path.read_bytes()
    for damaged in (whole[:50], whole.replace(b'"digest": "', b'"digest": "0')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"duplicates\.json' is missing or damaged"):
            Lookup(folder / "out")
    settings = folder / "out" / "settings.json"
    data = bytearray(settings.read_bytes())
    data[data.index(b": ") + 3] ^= 1
    settings.write_bytes(data)
    with pytest.raises(ValueError, match=r"settings\.json' is damaged"):
        _run(folder)
