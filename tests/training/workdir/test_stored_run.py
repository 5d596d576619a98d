"""Runs in object stores: fsspec's memory store, and S3 on a server in this process (moto)."""

import shutil

import fsspec
import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from diht_jax.loading import read_model
from diht_jax.storage import files, stores
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.workdir import stored_run
from diht_jax.training.workdir.checkpoint import SaveError
from diht_jax.training.workdir.stored_run import (
    StagedDirectory,
    differing_files,
    local_run,
    make_manifest,
    read_manifests,
)
from tests.training.conftest import assert_bitwise_equal, saved_steps
from tests.waiting import wait_until


@pytest.fixture
def url(request, monkeypatch, tmp_path):
    """The URL of a run, in memory by default; copies for reading go to the test's folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    is_s3 = getattr(request, "param", "memory") == "s3"
    root = request.getfixturevalue("s3_bucket") if is_s3 else "memory:/"
    return f"{root}/{tmp_path.name}/run"


on_s3 = pytest.mark.parametrize("url", ["s3"], indirect=True)


def stored_files(url):
    system, root = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return [path.removeprefix(f"{root}/") for path in system.find(root)]


@on_s3
def test_a_run_that_loses_its_machine_is_the_undisturbed_one(config, tmp_path, url):
    config.checkpoint.every_steps = 2
    config.checkpoint.keep_last = 2
    device = jax.devices()[:1]
    undisturbed = train(config, tmp_path / "undisturbed", devices=device)

    for stop in (3, None):
        config.checkpoint.staging = str(tmp_path / f"machine_{stop}")
        last = train(config, url, stop_after_steps=stop, devices=device)
        shutil.rmtree(config.checkpoint.staging)
    assert_bitwise_equal(last, undisturbed)

    files = stored_files(url)
    steps = {name.split("/")[1] for name in files if name.startswith("checkpoints/")}
    assert steps == {"4", "6"}
    assert {"manifests/4.json", "manifests/6.json", "metrics.jsonl", "config.json"} <= set(files)
    fetched = StagedDirectory(url, str(tmp_path / "reader"))
    fetched.fetch()
    losses = [
        [row["loss"] for row in read_metrics(d)] for d in (fetched.folder, tmp_path / "undisturbed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6

    for step in (None, 4):
        ours, theirs = (read_model(d, step=step) for d in (url, tmp_path / "undisturbed"))
        assert ours.step == theirs.step
        assert_bitwise_equal(ours.params, theirs.params)
    with pytest.raises(ValueError, match=r"run: no checkpoint of step 2; steps found: \[4, 6\]"):
        read_model(url, step=2)


def put_checkpoint(folder, step):
    """Writes a checkpoint as Orbax does: the files first, then the final name."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        state = {"step": np.full(1000, step)}
        checkpointer.save(folder / "checkpoints" / str(step), args=ocp.args.StandardSave(state))


def steps_stored(url):
    return sorted(read_manifests(url))


@pytest.fixture
def staged(url, tmp_path):
    """A folder and a store with checkpoints 2, 4, 6."""
    staged = StagedDirectory(url, str(tmp_path / "machine"))
    staged.fetch()
    for step in (2, 4, 6):
        put_checkpoint(staged.folder, step)
    (staged.folder / "metrics.jsonl").write_text('{"step": 6}\n')
    staged.send()
    assert steps_stored(url) == [2, 4, 6]
    return staged


@pytest.mark.parametrize("damage", ["flip", "unfinished"])
def test_a_damaged_or_unfinished_checkpoint_of_the_store_does_not_count(
    staged, url, tmp_path, damage, caplog
):
    system, root = fsspec.core.url_to_fs(url)
    victim = max(system.find(f"{root}/checkpoints/6"), key=system.size)
    if damage == "flip":
        data = bytearray(system.cat_file(victim))
        data[len(data) // 2] ^= 1
        system.pipe_file(victim, bytes(data))
    else:
        system.rm_file(f"{root}/manifests/6.json")
    if damage == "flip":
        with pytest.raises(ValueError, match="the checkpoint of step 6 is damaged"):
            local_run(url)
    other = StagedDirectory(url, str(tmp_path / "another machine"))
    other.fetch()
    assert saved_steps(other.folder) == steps_stored(url) == [2, 4]
    assert ("step 6 is damaged" in caplog.text) == (damage == "flip")
    assert not any("/6/" in name for name in stored_files(url))


def test_files_that_end_with_their_own_crc32c_are_told_apart(tmp_path):
    manifests = []
    for name in ("one", "other"):
        data = name.ljust(8).encode()
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(
            data + google_crc32c.value(data).to_bytes(4, "little")
        )
        manifests.append(make_manifest(tmp_path / name))
    one, other = manifests
    assert one["file"][:2] == other["file"][:2]  # all fields that earlier versions wrote
    assert differing_files(one, other) == ["file"]
    assert differing_files(one, one) == differing_files(one, {"file": one["file"][:2]}) == []


@on_s3
def test_the_store_is_what_counts(staged, url, tmp_path):
    """The store overrides local files: after a resume elsewhere, a rollback, or a new run."""
    another = StagedDirectory(url, str(tmp_path / "another machine"))
    another.fetch()
    assert saved_steps(another.folder) == [2, 4, 6]
    put_checkpoint(another.folder, 8)
    shutil.rmtree(another.folder / "checkpoints" / "2")
    another.send()
    put_checkpoint(staged.folder, 7)  # saved by the first machine, but never sent
    staged.fetch()
    assert saved_steps(staged.folder) == steps_stored(url) == [4, 6, 8]

    # A folder that lost a file gets it back, and the store keeps it.
    next(
        path for path in (staged.folder / "checkpoints" / "8").rglob("*") if path.is_file()
    ).unlink()
    shutil.rmtree(staged.folder / "checkpoints" / "6")
    staged.fetch()
    staged.send()
    assert saved_steps(staged.folder) == steps_stored(url) == [4, 6, 8]
    assert make_manifest(staged.folder / "checkpoints" / "8") == read_manifests(url)[8]

    system, root = fsspec.core.url_to_fs(url)
    system.rm_file(f"{root}/manifests/8.json")
    staged.fetch()
    assert saved_steps(staged.folder) == [4, 6]

    system.rm(root, recursive=True)
    (staged.folder / "old").write_text("old")
    staged.fetch()
    assert saved_steps(staged.folder) == [] and not (staged.folder / "old").exists()
    assert not (staged.folder / "metrics.jsonl").exists()


def test_a_checkpoint_that_the_store_did_not_get_stays(staged, url):
    put_checkpoint(staged.folder, 8)
    shutil.rmtree(staged.folder / "checkpoints" / "2")  # removed to free space
    staged.fetch()
    assert 8 in saved_steps(staged.folder)
    staged.send()
    assert steps_stored(url) == saved_steps(staged.folder)


def test_a_machine_that_is_killed_while_it_fetches_begins_again(staged, url, tmp_path, monkeypatch):
    download, another = stored_run._download_checkpoint, StagedDirectory(url, str(tmp_path / "b"))

    def killed_after_the_last(url, step, *arguments):
        download(url, step, *arguments)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stored_run, "_download_checkpoint", killed_after_the_last)
        another.fetch()
    another.fetch()
    assert saved_steps(another.folder) == [2, 4, 6]
    assert (another.folder / "metrics.jsonl").read_text() == '{"step": 6}\n'


def test_a_machine_keeps_what_trackers_write_for_themselves(staged, url, tmp_path):
    (staged.folder / "wandb" / "run-1").mkdir(parents=True)
    (staged.folder / "wandb" / "run-1" / "debug.log").write_text("line")
    (staged.folder / "trackers.json").write_text('{"id": "3f9a1c2b"}')
    staged.send()
    assert not any("wandb" in name for name in stored_files(url))
    another = StagedDirectory(url, str(tmp_path / "another machine"))
    another.fetch()
    assert (another.folder / "trackers.json").read_text() == '{"id": "3f9a1c2b"}'


def test_what_the_store_did_not_take_is_kept_and_sent_later(
    mount_tmpfs, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(stores, "sleep", lambda secs: None)
    small_store = mount_tmpfs("size=200k")
    url = f"file://{small_store}/run"
    staged = StagedDirectory(url, str(tmp_path / "machine"))
    staged.fetch()
    staged.start()
    put_checkpoint(staged.folder, 2)
    wait_until(lambda: steps_stored(url) == [2])
    ballast = small_store / "ballast"
    ballast.write_bytes(
        bytes(200_000 - sum(p.stat().st_size + 4096 for p in small_store.rglob("*")))
    )
    put_checkpoint(staged.folder, 4)
    with pytest.raises(SaveError, match=f"{url} cannot be written: .*No space left"):
        staged.close_after(None)
    staged.close_after(KeyError)  # the user must see the current error
    assert "cannot be written" in caplog.text and steps_stored(url) == [2]

    ballast.unlink()
    again = StagedDirectory(url, str(tmp_path / "machine"))
    again.fetch()
    assert saved_steps(again.folder) == [2, 4]
    again.close_after(None)
    assert steps_stored(url) == [2, 4]


def test_the_run_goes_on_uploading_after_an_error_that_passes(monkeypatch, tmp_path, caplog):
    url, send, failures = f"memory://{tmp_path.name}/run", files.upload, []

    def failing(path, target):
        if len(failures) < 2:
            failures.append(target)
            raise OSError("503 Slow Down")
        send(path, target)

    monkeypatch.setattr(files, "upload", failing)
    for name in ("_POLL_SECONDS", "_RETRY_SECONDS"):
        monkeypatch.setattr(stored_run, name, 0.01)
    staged = StagedDirectory(url, str(tmp_path / "machine"))
    staged.fetch()
    staged.start()
    for step in (2, 4):  # the store works again before the second
        put_checkpoint(staged.folder, step)
        wait_until(lambda step=step: step in steps_stored(url), longest_secs=60)
        manifest = make_manifest(staged.folder / "checkpoints" / str(step))
        assert read_manifests(url)[step] == manifest
    assert len(failures) == 2 and "503 Slow Down" in caplog.text
    staged.close_after(None)
