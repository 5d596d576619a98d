"""Users' own layouts of pairs, through every command that reads a source."""

import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.filter import run_filter
from diht_jax.evaluation.embedding.inputs import input_units, list_inputs
from diht_jax.evaluation.sources.registry import open_units
from tests.data_prep.filtering.jobs import job_config, read_dropped, read_records
from tests.make import png

_CAPTIONS = [f"picture {number} of a cat" for number in range(3)]


def _files(folder: pathlib.Path) -> str:
    for number, caption in enumerate(_CAPTIONS):
        (folder / f"{number}.txt").write_text(caption)
    return str(folder)


def _json(folder: pathlib.Path) -> str:
    rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(_CAPTIONS)]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return str(folder / "pairs.json")


def _imagefolder(folder: pathlib.Path) -> str:
    rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(_CAPTIONS)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")
    return str(folder)


@pytest.mark.parametrize("write", [_files, _json, _imagefolder])
def test_every_command_reads_the_same_pairs_by_a_relative_path(tmp_path, monkeypatch, write):
    folder = tmp_path / "own" / "dogs"
    folder.mkdir(parents=True)
    images = [png(number) for number in range(len(_CAPTIONS))]
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(image)
    # Captions in files are also read from sub-folders.
    source = write(folder) if write is not _files else write(folder) and str(folder.parent)
    expected = list(zip(images, _CAPTIONS, strict=True))
    monkeypatch.chdir(tmp_path)
    source = source.removeprefix(f"{tmp_path}/")
    run_filter(job_config(source, tmp_path / "kept"))
    found = {"filter": read_records(tmp_path / "kept")}
    found["evaluate"] = list(open_units(source, {}).entries())
    found["embed, search"] = [e for unit in input_units(list_inputs(source)) for e in unit()]
    for command, pairs in found.items():
        assert [(pair.image, pair.caption) for pair in pairs] == expected, command


@pytest.mark.parametrize(
    ("dropped", "reasons"), [((), {"source": {"bad_row": 1}}), (("taken",), {})]
)
def test_a_bad_value_of_parquet_costs_its_row_where_the_column_is_kept(tmp_path, dropped, reasons):
    dates = pyarrow.array([0, 2**31 - 1, 1], pyarrow.int32()).cast(pyarrow.date32())
    columns = {"png": [png(i) for i in range(3)], "txt": _CAPTIONS, "taken": dates}
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert run_filter(job_config(str(path), tmp_path / "kept", drop_metadata=dropped)) == {}
    expected = _CAPTIONS if dropped else [_CAPTIONS[0], _CAPTIONS[2]]
    assert [r.caption for r in read_records(tmp_path / "kept")] == expected
    assert read_dropped(tmp_path / "kept") == reasons
