"""Damaged files of an output: each is named, or made again; none changes a result in silence."""

import json
import pathlib
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.captions.mentions import read_mentions
from data_prep.filter import run_filter
from data_prep.filtering.replay import Replay
from data_prep.reports.__main__ import merge_reports
from diht_jax.readers.registry import open_source
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


def test_the_list_of_concepts_of_another_shard_is_named(tmp_path):
    source = write_tars(tmp_path / "in", 2, pairs_per_tar=3)
    config = job_config(source, tmp_path / "out", concepts=True, examples_per_shard=3)
    assert run_filter(config) == {}
    one, other = sorted((tmp_path / "out").glob("*.concepts.npz"))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=one.name):
        read_mentions(str(one).removesuffix(".concepts.npz"), "objects")


@pytest.mark.parametrize("ending", ["decisions.parquet", "samples.tsv", "tfrecord.stats.json"])
def test_what_belongs_to_another_part_is_not_taken_for_that_of_this_one(finished, tmp_path, ending):
    output = shutil.copytree(finished[0], tmp_path / "out")
    one, other = sorted(output.glob(f"parts/*.{ending}"))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=one.name):
        merge_reports([output, output])


def test_reports_are_not_merged_without_some_of_the_decisions(finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "out")
    min(output.glob("parts/*.decisions.parquet")).unlink()
    with pytest.raises(ValueError, match=str(output)):
        merge_reports([finished[0], output])


def test_a_flipped_bit_in_a_filtered_table_is_noticed(tmp_path):
    captions = [f"a dog runs to tree {number}" for number in range(50)]
    table = pyarrow.table({"caption": captions, "url": [str(number) for number in range(50)]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", compression="none")
    config = job_config(str(tmp_path / "in.parquet"), tmp_path / "out", metadata_only=True)
    assert run_filter(config) == {}
    (path,) = (tmp_path / "out").glob("*.parquet")
    data = bytearray(path.read_bytes())
    data[100] ^= 1  # in the first page
    path.write_bytes(data)
    with pytest.raises(ValueError, match=path.name):
        list(open_source(str(path)))
