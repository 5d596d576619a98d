"""Files of a finished filter that were exchanged or damaged: each is named."""

import pathlib
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.decisions.report import merge_reports
from data_prep.filter import run_filter
from data_prep.filtering.replay import Replay
from diht_jax.readers.registry import open_source
from tests import make
from tests.data_prep.filtering.jobs import job_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("finished")
    for name, count in (("a", 5), ("b", 5)):
        captions = [f"a dog of {name} runs to tree {number}" for number in range(count)]
        make.write_pair_tar(folder / f"{name}.tar", captions)
    config = job_config(str(folder / "*.tar"), folder / "out", concepts=True)
    config.examples_per_shard = 5
    assert run_filter(config) == {}
    return folder / "out"


@pytest.fixture
def copy(finished, tmp_path) -> pathlib.Path:
    return shutil.copytree(finished, tmp_path / "out")


def test_decisions_of_another_part_are_not_taken_for_those_of_this_one(copy):
    one, other = sorted(copy.glob("parts/*.decisions.parquet"))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=one.name):
        Replay(str(copy)).run()
    with pytest.raises(ValueError, match=one.name):
        merge_reports([copy, copy])


@pytest.mark.parametrize("suffix", ["samples.tsv", "stats.json"])
def test_what_belongs_to_another_part_is_not_taken_for_that_of_this_one(copy, suffix):
    one, other = sorted(copy.glob(f"parts/*.{suffix}"))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=one.name):
        merge_reports([copy, copy])


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
