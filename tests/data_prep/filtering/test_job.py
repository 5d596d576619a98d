"""The filter as a job: reruns, cleaned parts, changes, job arrays, damaged input and output.

`test_command.py` tests the decisions about pairs, `test_kill_points.py` tests kills, and
`tests/fuzz/kinds/written.py` single damages in every file.
"""

import json
import os
import shutil

import pytest

from data_prep.captions.mentions import read_mentions
from data_prep.filter import run_filter
from data_prep.filtering import config as filter_config
from data_prep.reports.__main__ import merge_reports
from tests.data_prep.filtering.jobs import (
    job_config,
    read_counts,
    read_records,
    snapshot,
    when_done,
    write_table,
    write_tars,
)
from tests.make import encoded, plain
from tests.readers.failing_disk import FailingDisk


def test_what_was_cleaned_away_is_read_again_only_where_it_is_needed(tmp_path):
    source = write_tars(tmp_path / "in", 3)
    config = job_config(source, tmp_path / "out", examples_per_shard=5)
    run_filter(config)
    before = snapshot(tmp_path / "out")
    assert not list((tmp_path / "out" / "parts").glob("*.tfrecord"))
    damaged = tmp_path / "out" / "pairs-train-00001.tfrecord"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    stats = when_done(tmp_path / "out")
    run_filter(config)
    assert snapshot(tmp_path / "out") == before
    now = when_done(tmp_path / "out")
    assert [name for name in stats if now[name] != stats[name]] == ["00001.tar"]
    for kind in ("decisions.parquet", "samples.tsv"):  # of one part, without a second copy
        min((tmp_path / "out" / "parts").glob(f"*.{kind}")).unlink()
        run_filter(config)
        assert snapshot(tmp_path / "out") == before


def test_a_shard_that_others_have_added_is_not_removed(tmp_path):
    source = write_tars(tmp_path / "in", 2)
    run_filter(job_config(source, tmp_path / "out"))
    added = tmp_path / "out" / "a.tfrecord"
    added.write_bytes((tmp_path / "out" / "pairs-train-00000.tfrecord").read_bytes())
    with pytest.raises(ValueError, match="such as 'a.tfrecord'"):
        run_filter(job_config(source, tmp_path / "out", examples_per_shard=5))
    assert added.exists()


def test_what_has_changed_is_said_and_made_again_only_within_the_limit(tmp_path):
    source = write_tars(tmp_path / "in", 3)
    run_filter(job_config(source, tmp_path / "out"))
    before = snapshot(tmp_path / "out")
    with pytest.raises(ValueError, match=r"image\.min_side 1 -> 2.*--overwrite"):
        run_filter(job_config(source, tmp_path / "out", image__min_side=2))
    # Touched, but with the same contents: refused, unless the identity is the size.
    os.utime(tmp_path / "in" / "00000.tar", ns=(1, 1))
    with pytest.raises(ValueError, match=r"input '.*00000\.tar'.*1 are made again, 0 re.* 2 stay"):
        run_filter(job_config(source, tmp_path / "out", max_changed_shards=0))
    run_filter(job_config(source, tmp_path / "out", input_identity="size"))
    run_filter(job_config(source, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == before
    run_filter(job_config(source, tmp_path / "later"))
    assert snapshot(tmp_path / "later") == before  # no output depends on the modification time
    # The same size, but other bytes.
    path = tmp_path / "in" / "00001.tar"
    path.write_bytes(path.read_bytes().replace(b"name 1 4", b"NAME 1 4"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"1 shards .* changed: the input '.*00001\.tar'"):
        run_filter(job_config(source, tmp_path / "out", max_changed_shards=0))
    assert snapshot(tmp_path / "out") == before
    # The recipe's fraction of 0.01 allows at least one of several shards.
    assert run_filter(job_config(source, tmp_path / "out")) == {}
    assert [r.caption for r in read_records(tmp_path / "out")][9] == "NAME 1 4"


def test_an_outage_costs_no_pair(tmp_path):
    """A lasting read error fails the shard; the next run has all pairs despite a brief error."""
    names = [f"{number:02d}.png" for number in range(27)]
    rows = [{"image": name, "caption": f"name {name}"} for name in names]
    source = write_table(tmp_path, rows, dict.fromkeys(names, encoded(plain("red"))))
    config = job_config(source, tmp_path / "out", retries=1)
    with FailingDisk(tmp_path / "05.png", failures=10**9).mounted():
        failures = run_filter(config)
    assert [*failures.values()][0].startswith(f"{tmp_path}/05.png: could not be read in 5 attempts")
    with FailingDisk(tmp_path, failures=3, spared=20).mounted() as disk:  # brief
        assert run_filter(config) == {}
    assert not disk.failures
    assert [record.caption for record in read_records(tmp_path / "out")] == [
        f"name {name}" for name in names
    ]
    assert read_counts(tmp_path / "out")["dropped"]["source"] == {}


def test_another_model_is_refused(tmp_path, monkeypatch):
    source = write_tars(tmp_path / "in", 2)
    config = job_config(source, tmp_path / "out", concepts=True, keep_parts=True)
    run_filter(config)
    versions = filter_config.package_versions(config)
    assert set(versions) == {"spacy", "spacy_model", "py3langid", "pillow"}

    other = versions | {"spacy_model": "en_core_web_sm 9.0.0"}
    monkeypatch.setattr(filter_config, "package_versions", lambda _: other)
    with pytest.raises(ValueError, match=r"spacy_model \(en_core_web_sm .*, now .* 9.0.0\)"):
        run_filter(config)
    assert run_filter(config, overwrite=True) == {}
    stats = json.loads((tmp_path / "out" / "stats.json").read_bytes())
    assert stats["versions"]["spacy_model"] == {"en_core_web_sm 9.0.0": 2}


# Output files that are swapped, missing or damaged


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


@pytest.mark.parametrize(
    "pattern",
    ["parts/*.decisions.parquet", "parts/*.samples.tsv", "parts/*.stats.json", "*.concepts.npz"],
)
def test_what_belongs_to_another_part_is_not_taken_for_that_of_this_one(
    finished, tmp_path, pattern
):
    output = shutil.copytree(finished, tmp_path / "out")
    one, other = sorted(output.glob(pattern))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=one.name):
        merge_reports([output, output])
        for shard in output.glob("*.tfrecord"):
            read_mentions(str(shard), "objects")


def test_reports_are_not_merged_without_some_of_the_decisions(finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "out")
    min(output.glob("parts/*.decisions.parquet")).unlink()
    with pytest.raises(ValueError, match=str(output)):
        merge_reports([output, output])
