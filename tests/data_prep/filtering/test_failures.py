"""Archives that are cut off: what comes of a job."""

import json
import os
import resource

import pytest

from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from diht_jax.storage import stores
from tests.data_prep.filtering.jobs import (
    job_config,
    read_counts,
    read_records,
    write_tars,
)


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


@pytest.mark.parametrize("output_format", ["tfrecord", "array_record", "webdataset"])
def test_an_output_that_may_not_become_larger_is_named_and_waited_for_no_time(
    tmp_path, output_format
):
    """The limit of the operating system on the size of files, which rises until all have room."""
    source, output = write_tars(tmp_path / "in", 1, pairs_per_tar=40), tmp_path / "out"
    config = job_config(source, output, output_format=output_format, retries=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stopped: list[str] = []
    for kib in range(0, 1000, 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, hard))
        try:
            assert run_filter(config) == {}
            break
        except stores.FullError as error:
            stopped.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [text for text in stopped if not text.startswith(f"{output}/")] == []
    assert len(set(stopped)) > 1
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]


def test_pipes_and_links_that_lead_nowhere_cost_only_themselves(tmp_path):
    source, output = write_tars(tmp_path / "in", 2), tmp_path / "out"
    bad = [tmp_path / "in" / name for name in ("a_pipe.tar", "b_loop.tar", "c_nowhere.tar")]
    os.mkfifo(bad[0])
    bad[1].symlink_to(bad[1].name)
    bad[2].symlink_to("nowhere.tar")
    for number, pattern in enumerate((source, str(tmp_path / "in"))):
        failures = run_filter(job_config(pattern, output / str(number), max_failed_shards=3))
        assert list(failures) == [str(path) for path in bad]
        assert [path for path in bad if str(path) not in failures[str(path)]] == []
        assert failures.exit_status == 3
        assert len(read_records(output / str(number))) == 10
