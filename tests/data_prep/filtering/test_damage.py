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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished folder of two parts and two shards, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    source = write_tars(folder / "in", 2, pairs_per_tar=3)
    config = job_config(
        source, folder / "out", concepts=True, keep_parts=True, examples_per_shard=3
    )
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


def _filter(output: pathlib.Path, config) -> dict:
    config = config.copy_and_resolve_references()
    config.output = str(output)
    assert run_filter(config) == {}
    found = {name: data for name, data in snapshot(output).items() if "manifest" not in name}
    report = json.loads((output / "report.json").read_text())
    return found | {name: report[name] for name in ("counts", "measures", "samples")}


def _replay(output: pathlib.Path, config) -> dict:
    lists = output.with_name("lists")
    Replay(str(output)).run(str(lists))
    return snapshot(lists)


def _read_concepts(output: pathlib.Path, config) -> list:
    shards = [str(path) for path in sorted(output.glob("*.tfrecord"))]
    found = (part for shard in shards for part in read_mentions(shard, "objects"))
    return [np.array(part).tolist() for part in found]


def _merge_reports(output: pathlib.Path, config) -> dict:
    return merge_reports([output, output])


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        *((_filter, f"parts/*.{kind}") for kind in ("decisions.parquet", "samples.tsv")),
        *((_filter, f"parts/*.{kind}") for kind in ("tfrecord.stats.json", "place.json")),
        *((_filter, f"parts/{name}.json") for name in ("manifest", "settings")),
        *((_filter, name) for name in ("*.tfrecord.stats.json", "stats.json", "report.json")),
        *((_replay, f"parts/{name}") for name in ("*.decisions.parquet", "manifest.json")),
        (_replay, "stats.json"),
        (_read_concepts, "*.concepts.npz"),
    ],
)
def test_a_damaged_file_is_named_or_made_again(finished, tmp_path, read, kind):
    whole, config = finished
    expected = read(shutil.copytree(whole, tmp_path / "whole"), config)
    output = tmp_path / "out"
    for seed in range(20 * _DAMAGES if read is _read_concepts else _DAMAGES):
        shutil.copytree(whole, output)
        path = min(output.glob(kind))
        if path.name != "report.json":
            (output / "report.json").unlink()  # so that a filter reads all
        _damage(path, seed)
        try:
            found = read(output, config)
        except ValueError as error:
            assert path.name in str(error) or str(output) in str(error), f"{seed}: {error}"
            if read is _filter:
                assert path.name in str(error)
                path.unlink()
                assert read(output, config) == expected, seed
        else:
            assert found == expected, seed
        shutil.rmtree(output)


@pytest.mark.parametrize(
    ("read", "ending"),
    [
        (_merge_reports, "decisions.parquet"),
        (_merge_reports, "samples.tsv"),
        (_merge_reports, "tfrecord.stats.json"),
        (_read_concepts, "concepts.npz"),
    ],
)
def test_what_belongs_to_another_part_is_not_taken_for_that_of_this_one(
    finished, tmp_path, read, ending
):
    output = shutil.copytree(finished[0], tmp_path / "out")
    one, other = sorted(output.glob(f"{'' if read is _read_concepts else 'parts/'}*.{ending}"))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=one.name):
        read(output, None)


def test_reports_are_not_merged_without_some_of_the_decisions(finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "out")
    min(output.glob("parts/*.decisions.parquet")).unlink()
    with pytest.raises(ValueError, match=str(output)):
        _merge_reports(output, None)


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
