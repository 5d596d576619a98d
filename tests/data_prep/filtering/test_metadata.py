"""The caption stage on tables without images: keeps unchanged the rows that the parser keeps."""

import functools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.filter import run_filter
from data_prep.filtering import rows
from data_prep.filtering.replay import Replay
from diht_jax.readers.registry import open_source
from tests.data_prep.filtering.jobs import job_config, read_dropped, snapshot

_CAPTIONS = [
    "a man riding a horse",
    "a red car",
    None,
    "sunset",
    "Dog wearing sunglasses",
    "",
    "a man riding a horse",
    "ein kleiner Hund spielt mit einem Ball im Garten",
]
_KEPT = (0, 4, 6)

_config = functools.partial(job_config, recipe="metadata")


@pytest.fixture
def table() -> pyarrow.Table:
    """Rows like those of LAION and DataComp, with columns of many types."""
    count = len(_CAPTIONS)
    return pyarrow.table(
        {
            "uid": [f"{i:032x}" for i in range(count)],
            "TEXT": _CAPTIONS,
            "URL": [f"http://x/{i}" for i in range(count)],
            "similarity": pyarrow.array(np.linspace(0, 1, count), pyarrow.float32()),
            "boxes": [[[1, 2]] * i for i in range(count)],
        }
    ).replace_schema_metadata({"made by": "a test"})


def test_parquet_rows_are_kept_as_they_came(tmp_path, table):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "part-0.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=3)
    table = pyarrow.parquet.read_table(path)
    config = _config(str(tmp_path / "in"), tmp_path / "out", source__caption_column="TEXT")
    assert run_filter(config) == {}
    kept = pyarrow.parquet.read_table(tmp_path / "out" / "part-0.parquet")
    assert kept.schema.equals(table.schema, check_metadata=True)
    assert kept.equals(table.take(list(_KEPT)))
    column = pyarrow.parquet.ParquetFile(tmp_path / "out" / "part-0.parquet").metadata
    assert column.row_group(0).column(0).compression == "ZSTD"
    counts = json.loads((tmp_path / "out" / "stats.json").read_text())["counts"]
    assert (counts["read"], counts["kept"]) == (8, 3)
    assert read_dropped(tmp_path / "out") == {
        "source": {"no_caption": 2},
        "caption": {"complexity": 1, "no_action": 1, "not_english": 1},
    }
    uids = np.load(tmp_path / "out" / "kept_uids.npy")
    assert [tuple(map(int, uid)) for uid in uids] == [(0, i) for i in _KEPT]
    assert (tmp_path / "out" / "kept_keys.txt").read_text().split() == [f"{i:032x}" for i in _KEPT]

    # Two jobs with one row group per unit give the same rows.
    config = _config(str(path), tmp_path / "units", source__caption_column="TEXT")
    config.source.rows_per_shard = 3
    run_filter(config, 0, 2)
    assert not (tmp_path / "units" / "stats.json").exists()
    run_filter(config, 1, 2)
    units = sorted((tmp_path / "units").glob("*.parquet"))
    assert [unit.name for unit in units] == [f"part-0-{i:05d}.parquet" for i in range(3)]
    assert pyarrow.concat_tables(map(pyarrow.parquet.read_table, units)).equals(kept)
    before = snapshot(tmp_path / "units")
    times = [unit.stat().st_mtime_ns for unit in units]
    for path in (units[1], tmp_path / "units" / "kept_uids.npy"):
        path.unlink()
    run_filter(config)
    assert snapshot(tmp_path / "units") == before
    again = [unit.stat().st_mtime_ns == t for unit, t in zip(units, times, strict=True)]
    assert again == [True, False, True]
    config.min_complexity = 2
    with pytest.raises(ValueError, match="min_complexity 1 -> 2.*--overwrite"):
        run_filter(config)


def test_lines_are_kept_byte_for_byte(tmp_path):
    lines = [
        '{"caption":  "a man riding a horse", "n": 1e5, "e": "\\u00e9"}',
        "no json",
        '{"caption": ["a red car", "a dog runs"], "uid": "ABCDEF0123456789abcdef0123456789"}',
        '{"caption": "sunset"}',
        "",
        '{"url": "u"}',
        '{"caption": "sunset", "captions": ["sunset", "Dog wearing sunglasses"]}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))  # without a line break at the end
    assert run_filter(_config(str(tmp_path / "t.jsonl"), tmp_path / "out")) == {}
    kept = (tmp_path / "out" / "t.jsonl").read_text().splitlines()
    assert kept == [lines[0], lines[2], lines[6]]
    counts = json.loads((tmp_path / "out" / "stats.json").read_text())["counts"]
    assert counts["dropped"]["source"] == {"bad_row": 1, "no_caption": 1}
    keys = (tmp_path / "out" / "kept_keys.txt").read_text().split()
    assert keys == ["t-00000000", "ABCDEF0123456789abcdef0123456789", "t-00000005"]
    config = _config(str(tmp_path / "t.jsonl"), tmp_path / "units")
    config.source.rows_per_shard = 2
    run_filter(config)
    units = sorted((tmp_path / "units").glob("*.jsonl"))
    assert len(units) == 3
    assert "".join(unit.read_text() for unit in units).splitlines() == kept


def test_a_jsonl_without_the_captions_is_refused_and_needs_no_images(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"ALT": "a man riding a horse"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: .*'ALT'"):
        run_filter(_config(str(tmp_path / "a.jsonl"), tmp_path / "out"))
    config = _config(str(tmp_path / "a.jsonl"), tmp_path / "out", source__caption_column="ALT")
    assert run_filter(config) == {}
    assert (tmp_path / "out" / "a.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()


def test_a_text_that_is_not_utf8_costs_its_row_of_a_table(tmp_path):
    captions = [b"a man riding a horse", b"caf\xe9", b"a dog biting a man"]
    texts = pyarrow.array(captions, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "t.parquet")
    assert run_filter(_config(str(tmp_path / "t.parquet"), tmp_path / "out")) == {}
    kept = pyarrow.parquet.read_table(tmp_path / "out" / "t.parquet")
    assert kept["text"].to_pylist() == [captions[0].decode(), captions[2].decode()]
    assert read_dropped(tmp_path / "out") == {"source": {"bad_row": 1}}


def test_a_table_in_capitals_that_states_its_own_columns_is_replayed(tmp_path):
    table = pyarrow.table(
        {"caption": ["sunset", "x"], "title": ["a man riding a horse", "red"], "id": ["q", "r"]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "A.PARQUET")
    source = f"{tmp_path}/A.PARQUET?caption_column=title&key_column=id"
    (tmp_path / "b.jsonl").write_text('{"caption": "a man riding a horse", "key": "z"}\n')
    assert run_filter(_config(f"{tmp_path}/b.jsonl,{source}", tmp_path / "out")) == {}
    assert pyarrow.parquet.read_table(tmp_path / "out" / "A.PARQUET").equals(table.slice(0, 1))
    # The order is that of the names, not of the inputs.
    assert (tmp_path / "out" / "kept_keys.txt").read_text() == "q\nz\n"
    assert Replay(str(tmp_path / "out")).run(str(tmp_path / "lists")).funnel.kept == 2
    assert (tmp_path / "lists" / "kept_keys.txt").read_text() == "q\nz\n"


def test_a_table_of_others_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / "t.jsonl"
    for path in (tmp_path / "t.jsonl", theirs):
        path.write_text(json.dumps({"caption": str(path)}))
    before = theirs.read_text()
    with pytest.raises(ValueError, match=r"such as 't\.jsonl'"):
        run_filter(_config(str(tmp_path / "t.jsonl"), tmp_path / "out"))
    assert theirs.read_text() == before


def test_a_step_that_needs_the_images_is_refused(tmp_path):
    config = _config("t.jsonl", tmp_path / "out", decontaminate__sets="mnist=mnist.npz")
    with pytest.raises(ValueError, match=r"config\.decontaminate"):
        run_filter(config)


def test_a_damaged_table_costs_itself(tmp_path):
    (tmp_path / "in").mkdir()
    table = pyarrow.table({"caption": ["a man riding a horse"]})
    for name in ("a", "b"):
        pyarrow.parquet.write_table(table, tmp_path / "in" / f"{name}.parquet")
    cut = tmp_path / "in" / "a.parquet"
    cut.write_bytes(cut.read_bytes()[:-9])
    (tmp_path / "in" / "c.parquet").symlink_to("nowhere")
    config = _config(f"{tmp_path}/in/*.parquet", tmp_path / "out")
    config.max_failed_shards = 2
    failures = run_filter(config)
    assert sorted(failures) == [f"{tmp_path}/in/{name}.parquet" for name in ("a", "c")]
    assert failures.output_written
    assert pyarrow.parquet.read_table(tmp_path / "out" / "b.parquet").equals(table)


def test_rows_of_many_bytes_are_not_held_together(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_BATCH_ROWS", 1)
    monkeypatch.setattr(rows, "_WRITTEN_BYTES", 2000)
    table = pyarrow.table({"caption": ["a dog bites a man"] * 4, "jpg": [bytes(1500)] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert run_filter(_config(str(tmp_path / "a.parquet"), tmp_path / "out")) == {}
    written = pyarrow.parquet.ParquetFile(tmp_path / "out" / "a.parquet")
    assert written.metadata.num_row_groups == 2
    assert written.read().equals(table)


def test_a_flipped_bit_in_a_filtered_table_is_noticed(tmp_path):
    captions = [f"a dog runs to tree {number}" for number in range(50)]
    table = pyarrow.table({"caption": captions})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", compression="none")
    assert run_filter(_config(str(tmp_path / "in.parquet"), tmp_path / "out")) == {}
    (path,) = (tmp_path / "out").glob("*.parquet")
    data = bytearray(path.read_bytes())
    data[100] ^= 1  # in the first page
    path.write_bytes(data)
    with pytest.raises(ValueError, match=path.name):
        list(open_source(str(path)))
