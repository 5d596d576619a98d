"""Damaged files of an output: each is named, or made again; none changes a result in silence."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from data_prep.captions.mentions import read_mentions
from data_prep.filter import run_filter
from data_prep.filtering.replay import Replay
from tests.data_prep.filtering.jobs import job_config, snapshot, write_tars

_DAMAGES = 4  # of each file
_KINDS = (
    "parts/*.decisions.parquet",
    "parts/*.samples.tsv",
    "parts/*.tfrecord.stats.json",
    "parts/*.place.json",
    "parts/manifest.json",
    "parts/settings.json",
    "*.tfrecord.stats.json",
    "stats.json",
    "report.json",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished folder, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    source = write_tars(folder / "in", 2, pairs_per_tar=3)
    config = job_config(source, folder / "out", concepts=True, keep_parts=True)
    assert run_filter(config) == {}
    return folder / "out", config


def _damage(path: pathlib.Path, seed: int) -> None:
    """Another byte somewhere, or an end that is missing."""
    rng, data = np.random.default_rng(seed), bytearray(path.read_bytes())
    place = int(rng.integers(len(data)))
    if seed % 4 == 0:
        data = data[:place]
    else:
        data[place] ^= int(rng.integers(1, 256))
    path.write_bytes(data)


def _results(folder: pathlib.Path) -> dict:
    found = {name: data for name, data in snapshot(folder).items() if "manifest" not in name}
    report = json.loads((folder / "report.json").read_text())
    return found | {name: report[name] for name in ("counts", "measures", "samples")}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_filter_that_reads_a_damaged_file_names_it_or_makes_it_again(finished, tmp_path, kind):
    whole, config = finished
    expected, output = _results(whole), tmp_path / "out"
    config = config.copy_and_resolve_references()
    config.output = str(output)
    for seed in range(_DAMAGES):
        shutil.copytree(whole, output)
        path = sorted(output.glob(kind))[0]
        if kind != "report.json":
            (output / "report.json").unlink()  # so that all is read
        _damage(path, seed)
        try:
            assert run_filter(config) == {}
        except ValueError as error:
            assert path.name in str(error), f"{seed}: {error}"
            path.unlink()
            assert run_filter(config) == {}
        assert _results(output) == expected, seed
        shutil.rmtree(output)


@pytest.mark.parametrize("kind", ["parts/*.decisions.parquet", "parts/manifest.json", "stats.json"])
def test_a_replay_names_the_damaged_file(finished, tmp_path, kind):
    whole, _ = finished
    Replay(str(whole)).run(str(tmp_path / "lists"))
    expected = snapshot(tmp_path / "lists")
    for seed in range(_DAMAGES):
        output = tmp_path / str(seed)
        shutil.copytree(whole, output)
        path = sorted(output.glob(kind))[0]
        _damage(path, seed)
        try:
            Replay(str(output)).run(str(tmp_path / f"lists{seed}"))
        except ValueError as error:
            assert path.name in str(error) or str(output) in str(error), seed
        else:
            assert snapshot(tmp_path / f"lists{seed}") == expected, seed


def test_labels_name_the_damaged_list_of_concepts(finished, tmp_path):
    whole, _ = finished
    shutil.copytree(whole, tmp_path / "out")
    path = next(iter((tmp_path / "out").glob("*.concepts.npz")))
    shard, data = str(path).removesuffix(".concepts.npz"), path.read_bytes()
    expected = [[part.tolist() for part in map(np.array, read_mentions(shard, "objects"))]]
    for seed in range(20 * _DAMAGES):
        path.write_bytes(data)
        _damage(path, seed)
        try:
            found = read_mentions(shard, "objects")
        except ValueError as error:
            assert path.name in str(error), seed
        else:
            assert [[part.tolist() for part in map(np.array, found)]] == expected, seed
