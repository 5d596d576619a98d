"""Output files that are swapped, missing or damaged: each is named in an error.

`tests/fuzz/kinds/written.py` tests single damages in every file.
"""

import pathlib
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.captions.mentions import read_mentions
from data_prep.filter import run_filter
from data_prep.reports.__main__ import merge_reports
from diht_jax.readers.registry import open_source
from tests.data_prep.filtering.jobs import job_config, write_tars


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished output folder with two parts and two shards."""
    folder = tmp_path_factory.mktemp("finished")
    source = write_tars(folder / "in", 2, pairs_per_tar=3)
    config = job_config(
        source, folder / "out", concepts=True, keep_parts=True, examples_per_shard=3
    )
    assert run_filter(config) == {}
    return folder / "out"


def _read_concepts(output: pathlib.Path) -> list:
    shards = [str(path) for path in sorted(output.glob("*.tfrecord"))]
    found = (part for shard in shards for part in read_mentions(shard, "objects"))
    return [np.array(part).tolist() for part in found]


def _merge_reports(output: pathlib.Path) -> dict:
    return merge_reports([output, output])


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
    output = shutil.copytree(finished, tmp_path / "out")
    one, other = sorted(output.glob(f"{'' if read is _read_concepts else 'parts/'}*.{ending}"))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=one.name):
        read(output)


def test_reports_are_not_merged_without_some_of_the_decisions(finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "out")
    min(output.glob("parts/*.decisions.parquet")).unlink()
    with pytest.raises(ValueError, match=str(output)):
        _merge_reports(output)


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
