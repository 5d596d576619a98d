"""Storages that fail, and archives that are cut off: what comes of a job."""

import json
import os
import tarfile

import pyarrow
import pyarrow.parquet

from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from diht_jax.readers.registry import open_source
from tests.data_prep.filtering.jobs import (
    job_config,
    read_counts,
    read_records,
    snapshot,
    write_tars,
)
from tests.readers.failing_disk import FailingDisk


def _write_inputs(folder) -> str:
    """Tars, a table beside pictures, and a parquet file, of the same pairs."""
    pattern = write_tars(folder, 6, pairs_per_tar=6)
    pairs = list(open_source(pattern))
    rows = []
    for pair in pairs[:12]:
        (folder / f"{pair.key}.png").write_bytes(pair.image)
        rows.append({"image": f"{pair.key}.png", "caption": f"a row, {pair.caption}"})
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    columns = [{"key": f"p{p.key}", "png": p.image, "txt": p.caption} for p in pairs[:12]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns), folder / "a.parquet")
    return f"{pattern},{folder}/rows.jsonl,{folder}/a.parquet"


def test_a_disk_that_fails_one_read_in_twenty_changes_no_byte(tmp_path):
    source, hashed = _write_inputs(tmp_path / "in"), {"input_identity": "hash"}
    assert run_filter(job_config(source, tmp_path / "undisturbed", **hashed)) == {}
    assert len(read_records(tmp_path / "undisturbed")) == 60
    disk = FailingDisk(tmp_path / "in", 0, every=20)
    with disk.mounted():
        assert run_filter(job_config(source, tmp_path / "disturbed", **hashed)) == {}
    assert disk.failed == disk.reads // 20 >= 1
    assert disk.slept > 0
    assert snapshot(tmp_path / "disturbed") == snapshot(tmp_path / "undisturbed")


def test_of_a_tar_that_is_cut_off_the_pairs_before_are_kept_where_the_config_asks_for_it(tmp_path):
    pattern = write_tars(tmp_path / "in", 3, pairs_per_tar=4)
    cut = tmp_path / "in" / "00001.tar"
    # A pair takes four blocks of 512 bytes: this is within the caption of the third.
    cut.write_bytes(cut.read_bytes()[: 2 * 2048 + 1540])
    failures = run_filter(job_config(pattern, tmp_path / "strict"))
    assert list(failures) == [str(cut)]
    assert "cannot be read to its end" in failures[str(cut)]

    config = job_config(pattern, tmp_path / "kept", keep_before_damage=True, keep_parts=True)
    assert run_filter(config) == {}
    keys = [record.key for record in read_records(tmp_path / "kept")]
    assert keys == ["0-0", "0-1", "0-2", "0-3", "1-0", "1-1", "2-0", "2-1", "2-2", "2-3"]
    assert read_counts(tmp_path / "kept")["read"] == 10
    stats = [
        json.loads(path.read_text())["counts"]
        for path in (tmp_path / "kept" / "parts").glob("*.tfrecord.stats.json")
    ]
    (damaged,) = [counts["damaged"] for counts in stats if "damaged" in counts]
    assert damaged.startswith(f"{cut}: the tar archive cannot be read to its end")
    assert len(stats) == 3
    warnings = read_report(tmp_path / "kept")["warnings"]
    (warning,) = [text for text in warnings if "damaged" in text]
    assert damaged in warning


def test_names_that_are_not_utf8_are_filtered_and_reported(tmp_path, capsys):
    """Of an input file, of one that is damaged, and of a picture of no known kind in a tar."""
    write_tars(tmp_path / "in", 2, pairs_per_tar=2)
    good, bad = (tmp_path / "in" / os.fsdecode(name) for name in (b"caf\xe9.tar", b"m\xe9.tar"))
    os.rename(tmp_path / "in" / "00000.tar", good)
    os.rename(tmp_path / "in" / "00001.tar", bad)
    with tarfile.open(good, "a", encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("b.m\xe9sk.png"))
    bad.write_bytes(bad.read_bytes()[:1000])
    config = job_config(f"{tmp_path}/in/*.tar", tmp_path / "out", max_failed_shards=1)
    for _ in range(2):
        assert list(run_filter(config)) == [str(bad)]
    assert [r.key for r in read_records(tmp_path / "out")] == ["0-0", "0-1"]
    assert json.loads((tmp_path / "out" / "stats.json").read_bytes())["failed"][0]["source"] == (
        str(bad)
    )
    (dropped,) = [s for s in read_report(tmp_path / "out")["samples"] if s["outcome"] != "kept"]
    assert dropped["outcome"] == "source/no_image"
    assert "failed: " in capsys.readouterr().err
    locations = [json.loads(p.read_bytes()) for p in (tmp_path / "out").glob("parts/*.place.json")]
    assert [location["path"] for location in locations] == [str(good)]
