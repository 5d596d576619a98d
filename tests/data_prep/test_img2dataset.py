"""Outputs of img2dataset: tars, TFRecords, parquet with and without images, statistics."""

import dataclasses
import json
import pathlib

import pyarrow
import pyarrow.parquet

from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from data_prep.sources import read_download_stats
from diht_jax.readers.base import Skipped, SourceShard
from diht_jax.readers.registry import read_pairs
from diht_jax.records.formats import TFRecordWriter
from diht_jax.records.train_data import open_records
from tests.data_prep.filtering.jobs import job_config, read_records
from tests.make import encoded, pair_members, plain, write_tar
from tests.records.test_schema import write_sample

_JPEG = encoded(plain("red", (60, 40)), "JPEG")

# The columns of img2dataset's schema, and an additional column of the user.
_ROWS = [
    {
        "key": f"00000000{i}",
        "caption": f"a dog number {i} runs",
        "url": f"http://x/{i}.jpg",
        "status": "failed_to_download" if i == 2 else "success",
        "error_message": "HTTP Error 404: Not Found" if i == 2 else None,
        "width": None if i == 2 else 60,
        "height": None if i == 2 else 40,
        "similarity": 0.25 + i,
        "uid": f"{i:032x}",
    }
    for i in range(4)
]
_STATS = {
    "count": 4,
    "successes": 3,
    "failed_to_download": 1,
    "failed_to_resize": 0,
    "duration": 1.5,
    "status_dict": {"success": 3, "HTTP Error 404: Not Found": 1},
}


def _write_shard(folder: pathlib.Path, output_format: str) -> None:
    """Writes one shard of an output format, with the files that img2dataset puts next to it."""
    folder.mkdir()
    rows, done = _ROWS, [row for row in _ROWS if row["status"] == "success"]
    if output_format == "webdataset":
        members: dict[str, bytes] = {}
        for row in done:
            members |= pair_members(row["key"], row["caption"], _JPEG, "jpg")
        write_tar(folder / "00000.tar", members)
    elif output_format == "tfrecord":
        with TFRecordWriter(folder / "00000.tfrecord") as writer:
            for row in done:
                writer.write(write_sample({"jpg": _JPEG, "txt": row["caption"], **row}))
        (folder / "00000.tfrecord.idx").unlink()  # img2dataset writes none
    else:
        rows = [
            row | {"jpg": _JPEG if row in done else None, "txt": row["caption"]} for row in _ROWS
        ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps(_STATS))


def _run(source: str, output: pathlib.Path) -> list:
    assert run_filter(job_config(source, output)) == {}
    return read_records(output)


def test_tars_with_statistics_and_metadata(tmp_path):
    """Tars without json members: the metadata comes from the parquet file."""
    _write_shard(tmp_path / "in", "webdataset")
    records = _run(str(tmp_path / "in"), tmp_path / "out")
    assert [r.key for r in records] == ["000000000", "000000001", "000000003"]
    assert [r.image for r in records] == [_JPEG] * 3
    assert records[1].metadata["url"] == "http://x/1.jpg"
    assert records[1].metadata["similarity"] == 1.25
    assert read_report(tmp_path / "out")["download"] == {
        k: v for k, v in _STATS.items() if k != "duration"
    }


def test_statistics_of_a_folder_come_with_its_first_part(tmp_path):
    (tmp_path / "00000_stats.json").write_text(json.dumps(_STATS))
    parts = [SourceShard("caption_files", str(tmp_path / "00000"), i, i + 2) for i in (0, 2)]
    first, second = map(read_download_stats, parts)
    assert first is not None and (first["count"], second) == (4, None)


def test_parquet_with_images(tmp_path):
    _write_shard(tmp_path / "in", "parquet")
    records = _run(str(tmp_path / "in"), tmp_path / "out")
    assert [r.key for r in records] == ["000000000", "000000001", "000000003"]
    assert [r.image for r in records] == [_JPEG] * 3
    assert records[0].caption == "a dog number 0 runs"
    assert (records[2].metadata["width"], "jpg" in records[2].metadata) == (60, False)
    report = read_report(tmp_path / "out")
    assert report["counts"]["dropped"]["source"] == {"no_image": 1}
    assert report["download"]["successes"] == 3
    entries = list(read_pairs(SourceShard("parquet", str(tmp_path / "in/00000.parquet"))))
    assert entries[2] == Skipped("000000002", "no_image", "HTTP Error 404: Not Found")


def test_tfrecords_are_filtered_as_the_tars_are(tmp_path):
    _write_shard(tmp_path / "tar", "webdataset")
    _write_shard(tmp_path / "in", "tfrecord")
    records = _run(str(tmp_path / "in"), tmp_path / "out")
    expected = _run(str(tmp_path / "tar"), tmp_path / "expected")
    # img2dataset writes None as an empty text.
    assert records == [
        dataclasses.replace(record, metadata=dict(record.metadata) | {"error_message": ""})
        for record in expected
    ]
    assert read_report(tmp_path / "out")["download"]["failed_to_download"] == 1
    assert (tmp_path / "out" / "kept_uids.npy").read_bytes() == (
        tmp_path / "expected" / "kept_uids.npy"
    ).read_bytes()
    # Training reads the same records without the filter.
    direct = open_records(str(tmp_path / "in"))
    found = [direct.decode(direct[number]) for number in range(len(direct))]
    contents = [[(r.key, r.image, r.caption) for r in read] for read in (found, records)]
    assert contents[0] == contents[1]
