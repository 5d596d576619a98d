"""The command on pairs with planted copies, its output table, and the filter that uses it."""

import json
import pathlib
from concurrent import futures

import fsspec
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from data_prep.decisions.report import read_report
from data_prep.duplicates import job, kmeans, search
from data_prep.duplicates.rows import forget_copies
from data_prep.duplicates.table import Lookup, read_summary
from data_prep.filter import run_filter
from data_prep.filtering.replay import Replay
from data_prep.sources import Input, default_source, list_inputs
from data_prep.steps.known_pictures import DuplicateStep
from diht_jax.readers.base import SourceShard
from tests.data_prep.duplicates.jobs import (
    duplicates_config,
    read_dropped,
    read_rows,
    scene,
    write_pictures,
)
from tests.data_prep.filtering import jobs
from tests.data_prep.filtering.jobs import job_config, read_records
from tests.make import encoded, run_command
from tests.serving import free_address

_SETTINGS = {
    "keep": "largest", "threshold": 0.98, "verify__correlation": None, "embeddings__mirrored": True,
}  # fmt: skip


def _config(source, output, **changes):
    return duplicates_config(source, output, **_SETTINGS | changes)


def _with_files(source, output, files, **changes):
    changes |= {"embeddings__kind": "files", "embeddings__files": str(files)}
    return _config(source, output, **changes)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twelve scenes in two tars, copies of some in the second, and two broken pictures."""
    folder = tmp_path_factory.mktemp("pairs")
    scenes = {f"s{i:02d}": encoded(scene(i), "PNG") for i in range(12)}
    copies = {
        "again": scenes["s00"],  # equal bytes
        "jpeg": encoded(scene(1), "JPEG", quality=60),
        "small": encoded(scene(2).resize((60, 45)), "PNG"),
        "mirror": encoded(scene(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"),
        "large": encoded(scene(4).resize((240, 180)), "PNG"),
        "again_small": encoded(scene(2).resize((60, 45)), "PNG"),
        "broken": b"no picture",
        "broken_too": b"no picture",
    }
    write_pictures(folder / "0.tar", dict(list(scenes.items())[:6]))
    write_pictures(folder / "1.tar", dict(list(scenes.items())[6:]) | copies)
    return folder


_EXPECTED = {  # with config.keep = "largest": keeps the larger one, or the first of equals
    "again": ("exact", "s00"),
    "jpeg": ("near", "s01"),
    "small": ("near", "s02"),
    "again_small": ("exact", "s02"),
    "mirror": ("near", "s03"),
    "s04": ("near", "large"),
}


@pytest.fixture(scope="module")
def found(pairs, tmp_path_factory):
    output = tmp_path_factory.mktemp("found")
    assert job.run(_config(pairs, output)) == {}
    return output


def test_planted_copies_are_found_and_nothing_else(found):
    table = read_rows(found)
    assert len(table) == 20
    assert read_dropped(found) == _EXPECTED
    assert table["again_small"]["duplicate_of"] == "small"  # itself a copy of s02
    assert table["jpeg"]["similarity"] > 0.98 and table["again"]["similarity"] == 1
    assert (table["s05"]["cluster"], table["broken"]["cluster"]) == (0, None)
    summary = json.loads((found / "duplicates.json").read_text())
    assert (summary["pairs"], summary["exact"], summary["near"], summary["kept"]) == (20, 2, 4, 14)
    assert summary["without_embedding"] == 2
    lookup = Lookup(found)
    near, absent = lookup.find(["jpeg", "s01"])
    assert (near.kind, near.duplicate_of, absent) == ("near", "s01", None)


def test_a_finished_folder_is_read_and_another_threshold_goes_on(pairs, found, monkeypatch):
    scanned = {path: path.stat().st_mtime_ns for path in (found / "scan").iterdir()}
    monkeypatch.setattr(job, "scan_unit", pytest.fail)  # no input is scanned again
    assert job.run(_config(pairs, found)) == {}
    assert job.run(_config(pairs, found, threshold=1.0)) == {}
    assert {key for key, (kind, _) in read_dropped(found).items() if kind == "near"} <= {"mirror"}
    assert job.run(_config(pairs, found, exact=False)) == {}
    kinds = {key: row["kind"] for key, row in read_rows(found).items()}
    assert (kinds["again"], kinds["again_small"]) == ("near", "near")
    assert job.run(_config(pairs, found)) == {}
    assert read_dropped(found) == _EXPECTED
    assert scanned == {path: path.stat().st_mtime_ns for path in (found / "scan").iterdir()}
    with pytest.raises(ValueError, match="holds 1 scans of inputs that .* no longer names"):
        job.run(_config(pairs, found, input=str(pairs / "0.tar"), max_changed_shards=0.0))
    with pytest.raises(ValueError, match="other settings; changed: embeddings"):
        job.run(_config(pairs, found, embeddings__mirrored=False))


@pytest.mark.parametrize("name", ["report.html", "duplicates/00001.parquet", "dropped.arrow"])
def test_a_result_that_is_gone_is_made_again(pairs, found, name):
    path = found / name
    before = path.read_bytes()
    path.unlink()
    assert job.run(_config(pairs, found)) == {}
    assert path.read_bytes() == before


def test_another_number_of_pairs_is_shown_by_the_next_run(pairs, found):
    for count in (2, 24):
        assert job.run(_config(pairs, found, report_pairs=count)) == {}
        page = (found / "report.html").read_text()
        assert page.count("<figure>") == 2 * min(count, len(_EXPECTED))


def test_exact_copies_need_no_embeddings(pairs, tmp_path):
    assert job.run(_config(pairs, tmp_path, embeddings__kind="none")) == {}
    assert read_dropped(tmp_path) == {
        "again": ("exact", "s00"),
        "again_small": ("exact", "small"),
    }


def test_the_filter_drops_what_the_table_names(pairs, found, tmp_path):
    config = job_config(str(pairs / "*.tar"), tmp_path / "out", duplicates__table=str(found))
    assert run_filter(config) == {}
    assert jobs.read_dropped(tmp_path / "out")["duplicates"] == {"exact": 2, "near": 4}
    kept = {record.key for record in read_records(tmp_path / "out")}
    assert kept == {"large", *(f"s{i:02d}" for i in range(12) if i != 4)}
    evidence = {s["key"]: s.get("evidence") for s in read_report(tmp_path / "out")["samples"]}
    assert evidence["s04"].endswith(" with large")
    again = Replay(str(tmp_path / "out")).run()  # without the table
    assert again.funnel.dropped()["duplicates"] == {"exact": 2, "near": 4}
    with pytest.raises(ValueError, match="no complete output of python -m data_prep.duplicates"):
        run_filter(job_config(str(pairs / "*.tar"), tmp_path / "b", duplicates__table=str(pairs)))


def test_an_input_that_is_gone_is_left_to_its_own_task(tmp_path):
    (tmp_path / "duplicates.json").write_text('{"inputs": []}')
    config = job_config("0.tar", tmp_path / "out", duplicates__table=str(tmp_path))
    gone = Input(SourceShard("webdataset", str(tmp_path / "0.tar")), str(tmp_path))
    DuplicateStep.check_inputs(config, [gone])


def test_given_embeddings_need_no_pictures(tmp_path):
    generator = np.random.default_rng(0)
    emb = generator.standard_normal((40, 8)).astype(np.float32)
    emb[30:] = emb[:10] + 0.01  # near copies of the first ten
    emb[33] *= 1e6
    emb[34] *= 1e-8  # the two exceed float16's range
    keys = np.array([f"k{i}" for i in range(39)] + ["k5"])  # the last key names two pairs
    np.savez(tmp_path / "a.npz", key=keys[:25], image_emb=emb[:25])
    table = {"key": keys[25:].tolist(), "image_emb": emb[25:].tolist()}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "b.parquet")
    for count in (1, 3):
        output = tmp_path / f"out{count}"
        config = _with_files(
            tmp_path, output, tmp_path / "[ab].*", clusters__count=count, input=None, keep="first"
        )
        assert job.run(config) == {}
        found = Lookup(output).find([f"k{i}" for i in range(40)])
        assert [i for i, row in enumerate(found) if row] == list(range(30, 39))  # k5 is not dropped
        assert [row.duplicate_of for row in found if row] == [f"k{i}" for i in range(9)]


def test_the_output_of_embed_must_be_of_the_same_input(pairs, tmp_path):
    config = _with_files(pairs, tmp_path / "out", tmp_path)
    with pytest.raises(ValueError, match=r"expected the --output of diht_jax\.embed"):
        job.run(config)
    other = [{"path": "elsewhere.tar", "start": 0}]
    (tmp_path / "embeddings.json").write_text(json.dumps({"source": other}))
    with pytest.raises(ValueError, match="is of another input than config.input"):
        job.run(config)


def test_embeddings_of_texts_name_what_is_expected(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, key=np.array(["s00", "s01"]), text_emb=np.eye(2, dtype=np.float32))
    failures = job.run(_with_files(tmp_path, tmp_path / "out", path, input=None, keep="first"))
    assert failures.exit_status == 1
    assert "'image_emb'" in failures[str(path)] and "--modalities image" in failures[str(path)]


def test_an_interrupted_search_goes_on(tmp_path, monkeypatch):
    emb = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    emb[50:] = emb[:10]
    np.savez(tmp_path / "a.npz", key=np.array([f"k{i}" for i in range(60)]), image_emb=emb)
    out, changes = tmp_path / "out", {"input": None, "keep": "first", "clusters__count": 3}
    config = _with_files(tmp_path, out, tmp_path / "*.npz", **changes)
    monkeypatch.setattr(search, "_GROUP_ROWS", 1)  # a task for each cluster
    compare, calls = search.compare_group, []

    def stop_at(number):
        def counted(*arguments, **named):
            calls.append(number)
            if len(calls) == number:
                raise KeyboardInterrupt
            return compare(*arguments, **named)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(search, "compare_group", stop_at(2))
        with pytest.raises(KeyboardInterrupt):
            job.run(config)
    assert len(list((out / "groups").iterdir())) == 1
    calls.clear()
    monkeypatch.setattr(job, "scan_unit", pytest.fail)  # no scan is repeated
    monkeypatch.setattr(kmeans, "fit", pytest.fail)
    monkeypatch.setattr(search, "compare_group", stop_at(3))
    assert job.run(config) == {}
    found = Lookup(out).find([f"k{i}" for i in range(60)])
    assert [i for i, row in enumerate(found) if row] == list(range(50, 60))


def test_the_output_of_embed_is_joined_by_keys(pairs, tmp_path):
    inputs = list_inputs(str(pairs / "*.tar"), default_source())
    (tmp_path / "embeddings.json").write_text(
        json.dumps({"source": [found.shard.identity() for found in inputs]})
    )
    emb = np.eye(12, dtype=np.float32)
    emb[7] = emb[2]  # s07 looks like s02 to this model
    keys = np.array([f"s{i:02d}" for i in range(12)])
    for name, rows in (("0-00000", [1, 0]), ("0-00001", [2, 3, 4, 5]), ("1-00000", range(6, 12))):
        rows = list(rows)
        path = tmp_path / f"embeddings-0000{name}.npz"
        np.savez(path, key=keys[rows], image_emb=emb[rows])
    config = _with_files(pairs, tmp_path / "out", tmp_path)
    assert job.run(config) == {}
    exact = {"again": ("exact", "s00"), "again_small": ("exact", "small")}
    assert read_dropped(tmp_path / "out") == exact | {"s07": ("near", "s02")}


@pytest.fixture(scope="module")
def cropped(tmp_path_factory):
    """Thirty scenes and, in another tar, 90% crops of the first ten of them."""
    folder = tmp_path_factory.mktemp("cropped")
    generator = np.random.default_rng(0)
    scenes, crops = {}, {}
    for number in range(30):
        picture = scene(number, 9, (200, 150))
        scenes[f"s{number:02d}"] = encoded(picture)
        if number < 10:
            left, top = generator.integers(0, 21), generator.integers(0, 16)
            crop = picture.crop((left, top, left + 180, top + 135))
            crops[f"c{number:02d}"] = encoded(crop, "JPEG")
    write_pictures(folder / "0.tar", scenes)
    write_pictures(folder / "1.tar", crops)
    return folder


def test_crops_are_found_from_store_to_store_by_an_array_of_jobs(cropped, tmp_path, s3_bucket):
    changes = {
        "keep": "first", "threshold": 0.6, "verify__correlation": 0.95, "clusters__count": 4,
        "clusters__probes": 2,
    }  # fmt: skip
    assert job.run(_config(cropped, tmp_path / "out", **changes)) == {}
    expected = {f"c{number:02d}": ("near", f"s{number:02d}") for number in range(10)}
    assert read_dropped(tmp_path / "out") == expected
    cosines = _config(cropped, tmp_path / "cosines", **changes | {"verify__correlation": None})
    assert job.run(cosines) == {}
    assert read_dropped(tmp_path / "cosines").keys() > expected.keys()  # what they alone drop
    system = fsspec.filesystem("s3")
    system.put(str(cropped), "bucket/duplicates/in", recursive=True)
    url = f"{s3_bucket}/duplicates"
    config = _config(cropped, f"{url}/out", **changes)
    config.input = f"{url}/in/*.tar"
    assert job.run(config, 0, 2) == {}
    assert read_summary(f"{url}/out") is None  # the other tar is not scanned yet
    assert job.run(config, 1, 2) == {}
    system.invalidate_cache()
    names = ("duplicates/00000.parquet", "duplicates/00001.parquet", "dropped.arrow")
    for name in names:
        stored = system.cat_file(f"bucket/duplicates/out/{name}")
        assert stored == (tmp_path / "out" / name).read_bytes()
    found = Lookup(f"{url}/out").find(["c03", "s03"])
    assert (found[0].duplicate_of, found[1]) == ("s03", None)
    assert job.run(_config(cropped, f"{url}/out", input=f"{url}/in/*.tar", **changes)) == {}
    system.rm("bucket/duplicates", recursive=True)
    forget_copies(f"{url}/out")


# Settings of the job that processes of `jax.distributed` share.
_SHARED = {
    "embeddings.kind": "files",
    "verify.correlation": None,
    "clusters.rows_per_cluster": 30,
    "threshold": 0.9,
    "num_workers": 0,
}


def _embed(folder: pathlib.Path) -> None:
    """Writes 600 embeddings in six files: a third are near-duplicates, and two share a key."""
    generator = np.random.default_rng(0)
    emb = generator.standard_normal((600, 8)).astype(np.float32)
    emb[400:] = emb[generator.integers(0, 400, 200)]
    emb[400:] += 0.1 * generator.standard_normal((200, 8)).astype(np.float32)
    keys = np.array([f"k{number}" for number in range(599)] + ["k3"])
    for number in range(6):
        own = slice(100 * number, 100 * (number + 1))
        np.savez(folder / f"{number}.npz", key=keys[own], image_emb=emb[own])


def test_two_processes_find_what_one_finds(tmp_path):
    _embed(tmp_path)
    changes = _SHARED | {"embeddings.files": str(tmp_path / "[0-5].npz")}
    shared = [("config", "prep/duplicates"), ("config.output", tmp_path / "shared")]
    shared += [(f"config.{name}", value) for name, value in changes.items()]
    shared += [("coordinator_address", free_address()), ("num_processes", 2)]

    def start(index: int):
        return run_command("data_prep.duplicates", *shared, ("process_id", index), devices=2)

    with futures.ThreadPoolExecutor() as pool:
        done = list(pool.map(start, range(2)))
    assert [process.returncode for process in done] == [0, 0], [p.stderr for p in done]
    assert any("600 pairs: 0 (0.0%) exact copies" in process.stdout for process in done)
    assert len(list((tmp_path / "shared" / "groups").iterdir())) == 1
    changes = {name.replace(".", "__"): value for name, value in changes.items()}
    config = duplicates_config(tmp_path, tmp_path / "alone", input=None, **changes)
    assert job.run(config) == {}
    keys = [f"k{number}" for number in range(600)]
    found, expected = (Lookup(tmp_path / name).find(keys) for name in ("shared", "alone"))
    assert [row and row.duplicate_of for row in found] == [
        row and row.duplicate_of for row in expected
    ]
    assert sum(row is not None for row in found) > 150
    assert read_summary(tmp_path / "shared") == read_summary(tmp_path / "alone")
