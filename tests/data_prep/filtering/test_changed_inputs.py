"""Inputs that grow, shrink and change: each costs its own part, whatever lies before it."""

import pathlib
import tarfile

import pytest

from data_prep.filter import run_filter
from data_prep.filtering import shard
from tests.data_prep.filtering.jobs import (
    job_config,
    part_names,
    read_counts,
    read_records,
    snapshot,
    when_done,
    write_tars,
)


@pytest.fixture
def filtered(monkeypatch) -> list[str]:
    """Names of the inputs that were filtered, as they come."""
    found = []
    real = shard.filter_shard

    def filter_shard(task, report, **keywords):
        found.append(pathlib.Path(task.source.path).name)
        return real(task, report, **keywords)

    monkeypatch.setattr(shard, "filter_shard", filter_shard)
    return found


def _add(folder: pathlib.Path, name: str, like: str) -> None:
    """A new tar with keys and captions of its own."""
    with tarfile.open(folder / like) as old, tarfile.open(folder / name, "w") as new:
        for member in old:
            data = old.extractfile(member)
            member.name = f"{name.removesuffix('.tar')}-{member.name}"
            new.addfile(member, data)


def test_a_tar_that_is_cut_off_and_deleted_later(tmp_path, filtered):
    """19 of 20 parts are done; without the tar, the output is made of them."""
    source = write_tars(tmp_path / "in", 20, pairs_per_tar=2)
    broken = tmp_path / "in" / "00007.tar"
    broken.write_bytes(broken.read_bytes()[:3000])
    config = job_config(source, tmp_path / "out")
    assert list(run_filter(config)) == [str(broken)]
    broken.unlink()
    filtered.clear()
    assert run_filter(config) == {}
    assert filtered == []
    assert read_counts(tmp_path / "out")["kept"] == 38
    assert "00007.tar" not in part_names(tmp_path / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_tars_in_the_middle_are_added_replaced_and_removed(tmp_path, filtered, overwrite):
    source, output = write_tars(tmp_path / "in", 6, pairs_per_tar=2), tmp_path / "out"
    config = job_config(source, output, keep_parts=True, examples_per_shard=4)
    run_filter(config)
    before = when_done(output)
    filtered.clear()
    _add(tmp_path / "in", "00002b.tar", like="00000.tar")
    assert run_filter(config, overwrite=overwrite) == {}
    assert filtered == ["00002b.tar"]
    keys = [record.key for record in read_records(output)]
    assert keys[4:8] == ["2-0", "2-1", "00002b-0-0", "00002b-0-1"]
    assert {name: when_done(output)[name] for name in before} == before
    filtered.clear()
    _add(tmp_path / "in", "00004.tar", like="00001.tar")
    (tmp_path / "in" / "00003.tar").unlink()
    with pytest.raises(ValueError, match=r"1 are made again, 1 removed, and 5 stay") as refused:
        run_filter(config)
    assert "input '" in str(refused.value) and "in/00004.tar'" in str(refused.value)
    assert "config.input no longer names, such as '" in str(refused.value)
    assert "in/00003.tar'" in str(refused.value)
    assert run_filter(config, overwrite=True) == {}
    assert filtered == ["00004.tar"]
    gone = part_names(output)
    run_filter(job_config(source, tmp_path / "fresh", keep_parts=True, examples_per_shard=4))
    assert snapshot(output) == snapshot(tmp_path / "fresh")
    assert gone == part_names(tmp_path / "fresh")


def test_an_input_that_is_reached_from_another_root_is_not_filtered_again(tmp_path, filtered):
    (tmp_path / "all").mkdir()
    source = write_tars(tmp_path / "all" / "a", 2)
    config = job_config(source, tmp_path / "out", keep_parts=True)
    run_filter(config)
    write_tars(tmp_path / "all" / "b", 2)
    filtered.clear()
    config.input = f"{tmp_path}/all/*/*.tar"
    assert run_filter(config) == {}
    assert filtered == ["00000.tar", "00001.tar"]  # of b
    assert list(part_names(tmp_path / "out")) == [
        "a/00000.tar", "a/00001.tar", "b/00000.tar", "b/00001.tar"
    ]  # fmt: skip
