"""The loop end to end: equal on any mesh, bit-identical when resumed, safe with directories."""

import collections
import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import diht_jax
from diht_jax.input.pipeline import TrainIterator
from diht_jax.records.formats import TFRecordSource
from diht_jax.records.schema import decode_record
from diht_jax.storage.locks import lock_folder
from diht_jax.training.loop import Run, train
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.workdir.saved_run import read_config, write_config
from tests import make
from tests.training.conftest import NUM_RECORDS, assert_bitwise_equal, saved_steps, series

COMPARED = ("loss", "grad_norm", "param_norm", "logit_scale", "i2t_accuracy")


def train_on_one(config, workdir, **options):
    return train(config, workdir, devices=jax.devices()[:1], **options)


@pytest.fixture
def seen(monkeypatch):
    """Records the texts of all examples that the loop takes, in order."""
    texts = []
    take = TrainIterator.__next__

    def recording(iterator):
        batch = take(iterator)
        texts.extend(row.tobytes() for row in batch["tokens"])
        return batch

    monkeypatch.setattr(TrainIterator, "__next__", recording)
    return texts


def test_a_run_that_goes_on_with_other_devices_is_the_run_on_one(config, tmp_path, seen):
    """With Muon, and micro-batches in the last part."""
    config.model.patch_dropout = 0.0
    config.total_steps = 13  # steps of 16 examples: four epochs of 52
    config.optimizer.kind = "muon"
    config.checkpoint.every_steps = 100
    config.mesh.update(data=1, fsdp=1)
    train_on_one(config, tmp_path / "one")
    straight = seen.copy()
    seen.clear()
    for stop, data, fsdp, micro_batch in ((6, 1, 1, None), (13, 2, 4, 8)):
        config.mesh.update(data=data, fsdp=fsdp)
        config.micro_batch = micro_batch
        devices = jax.devices()[: data * fsdp]
        state = train(config, tmp_path / "many", stop_after_steps=stop, devices=devices)

    assert seen == straight
    for epoch in range(4):
        counts = collections.Counter(seen[epoch * NUM_RECORDS : (epoch + 1) * NUM_RECORDS])
        assert len(counts) == NUM_RECORDS and set(counts.values()) == {1}
    losses = series(tmp_path / "one", "loss")
    assert len(losses) == 13 and losses[-1] < losses[0]
    for metric in COMPARED:
        np.testing.assert_allclose(
            series(tmp_path / "many", metric),
            series(tmp_path / "one", metric),
            rtol=2e-4,
            atol=1e-5,
            err_msg=metric,
        )
    momentum = state.opt_state[1].inner_states["muon"].inner_state[0].trace
    kernel = momentum["vision"]["blocks"]["0"]["mlp"]["fc_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (32, 128 // 4)


def test_a_run_that_is_stopped_and_made_longer_is_bit_identical_to_going_straight(
    config, squares, tmp_path
):
    """With records that are skipped, and counted."""
    records = [decode_record(data) for data in TFRecordSource(squares)]
    broken = (5, 30)
    for index in broken:
        records[index] = dataclasses.replace(records[index], image=b"no picture")
    config.data.train = str(make.write_records(tmp_path / "broken", records))
    config.data.on_bad_record = "skip"
    config.mesh.update(data=1, fsdp=2)
    devices = jax.devices()[:2]
    config.ema.decay = 0.9
    config.optimizer.layer_decay = 0.8
    config.optimizer.update(schedule="wsd", warmup_steps=2, decay_steps=1)
    config.log_every_steps = 2  # step 3 also writes a line, since it has a checkpoint
    config.checkpoint.update(every_steps=3, keep_last=1)
    straight = train(config, tmp_path / "straight", devices=devices)
    assert saved_steps(tmp_path / "straight") == [5, 6]
    config.total_steps = 4  # decays after step 3
    train(config, tmp_path / "stopped", stop_after_steps=3, devices=devices)
    config.total_steps = 6
    resumed = train(config, tmp_path / "stopped", devices=devices)
    assert int(resumed.step) == 6
    assert_bitwise_equal(straight, resumed)
    assert series(tmp_path / "stopped", "step").tolist() == [2, 3, 4, 5, 6]
    for name in (*COMPARED, "step", "skipped_records"):
        np.testing.assert_array_equal(
            series(tmp_path / "straight", name), series(tmp_path / "stopped", name), err_msg=name
        )
    # 96 examples: each of the 52 records once, and most of them twice.
    counts = series(tmp_path / "straight", "skipped_records")
    assert len(broken) <= counts.sum() <= 2 * len(broken)


@pytest.fixture(scope="module")
def finished(make_config, squares, tmp_path_factory):
    """A run of 6 steps with a profile: its config, work directory and last state."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_config()
    config.data.train = str(shutil.copytree(squares, folder / "squares"))
    config.checkpoint.every_steps = 2
    config.checkpoint.keep_last = 2
    config.profile.update(start_step=3, stop_step=4)
    return config, folder / "run", train_on_one(config, folder / "run")


def test_the_loop_leaves_what_people_look_at(finished):
    config, run, state = finished
    assert saved_steps(run) == [4, 6]
    row = read_metrics(run)[-1]
    expected = {
        *COMPARED,
        "step",
        "t2i_accuracy",
        "learning_rate",
        "images_per_sec",
        "data_wait_secs",
        "data_wait_share",
        "model_flops_per_sec",
    }
    assert row.keys() >= expected
    assert row["step"] == 6 and all(np.isfinite(value) for value in row.values())

    (trace,) = (run / "profile").glob("**/*.xplane.pb")
    profiled = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted(profiled) == [3, 4]

    model = diht_jax.load_model(run)
    assert model.step == 6
    assert_bitwise_equal(model._params, state.params)


def test_a_model_with_other_values_than_were_saved_is_not_loaded(finished, tmp_path):
    _, workdir, _ = finished
    run = shutil.copytree(workdir, tmp_path / "run")
    step = max(saved_steps(run))
    checks = run / "checkpoints" / str(step) / "checks" / "metadata"
    kept = json.loads(checks.read_text())
    name = "params/vision/projection/kernel"
    kept["checksums"][name] ^= 1
    kept["checksums"]["opt_state/no/matter"] = 1  # of an item that is not read
    checks.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=f"/{step}/state cannot be read: values differ .* {name};"):
        diht_jax.load_model(run)
    kept["checksums"][name] ^= 1
    checks.write_text(json.dumps(kept))
    assert diht_jax.load_model(run).step == step


def test_a_second_run_in_the_same_directory_is_refused(finished):
    config, run, _ = finished
    with (
        lock_folder(run, "--workdir", "run.lock"),
        pytest.raises(ValueError, match=r"another run works in .*: process \d+ on "),
    ):
        train_on_one(config, run)
    train_on_one(config, run)


def test_changed_shards_are_named_and_refused(finished, caplog):
    config, run, state = finished
    config = config.copy_and_resolve_references()
    folder = run.parent / "changed"
    shutil.copytree(config.data.train, folder)
    config.data.train = str(folder)
    train_on_one(config, run)  # the folder's location does not matter
    records = list(TFRecordSource(folder / "squares-0.tfrecord"))
    make.write_shard(folder / "squares-0.tfrecord", reversed(records))
    make.write_shard(folder / "new.tfrecord", records[:1])
    (folder / "squares-1.tfrecord").unlink()
    message = (
        "1 changed (squares-0.tfrecord); 1 added (new.tfrecord); 1 removed (squares-1.tfrecord)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        train_on_one(config, run)
    config.data.allow_changed = True
    assert_bitwise_equal(state, train_on_one(config, run))
    assert message in caplog.text and "the run goes on" in caplog.text


def test_a_start_that_is_refused_leaves_the_config_of_the_run(config, tmp_path, monkeypatch):
    """Evaluation reads the run's data and held-out records from it."""

    def refuse(run):
        raise ValueError("other data")

    write_config(tmp_path, config)
    monkeypatch.setattr(Run, "first_state", refuse)
    config.log_every_steps = 3
    with pytest.raises(ValueError, match="other data"):
        train_on_one(config, tmp_path)
    assert read_config(tmp_path).log_every_steps == 1


def test_a_new_run_can_start_from_another_with_larger_images_and_longer_texts(
    config, finished, tmp_path
):
    _, small, trained = finished
    config.model.init_from = str(small)
    config.model.overrides.image_size = 24
    config.model.overrides.context_length = 30
    run = Run(config, tmp_path / "large", jax.devices()[:1])
    run.close()
    before, after = trained.params, run.state.params
    assert after["vision"]["positional_embedding"].shape == (37, 32)
    np.testing.assert_array_equal(
        after["vision"]["positional_embedding"][0], before["vision"]["positional_embedding"][0]
    )
    short, long = (dict(params["text"]) for params in (before, after))
    old, new = (tower.pop("positional_embedding") for tower in (short, long))
    assert_bitwise_equal(short, long)
    assert new.shape == (30, *old.shape[1:])
    np.testing.assert_array_equal(new[:20], old[:20])
    np.testing.assert_array_equal(new[20:29:4], old[20:23])  # one old position is four new ones
    assert diht_jax.load_model(small, context_length=30).context_length == 30


def test_a_work_directory_that_cannot_be_written_is_reported(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: .*Not a directory"):
        train(config, tmp_path / "file" / "run")


def test_a_run_ends_on_whole_images_and_is_resumed_on_them(config, tmp_path):
    config.no_patch_dropout_steps = 2
    config.log_every_steps = 100
    train_on_one(config, tmp_path, stop_after_steps=5)
    assert int(train_on_one(config, tmp_path).step) == 6
    # A line is written at the boundary of the two phases, so that none averages over both.
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [4, 5, 6]
    costs = [row["model_flops_per_sec"] / row["images_per_sec"] for row in rows]
    assert costs[1] == pytest.approx(costs[2])
    # 12 of 16 patches were kept before; the text tower's cost is unchanged.
    assert 1.02 < costs[1] / costs[0] < 16 / 12
