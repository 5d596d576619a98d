"""The loop end to end: equal on any mesh, bit-identical after a stop, careful with directories."""

import jax
import numpy as np
import pytest

import diht_jax
from diht_jax.data.tfrecord import TFRecordSource
from diht_jax.training.loop import train
from diht_jax.training.metrics import read_metrics

COMPARED = ("loss", "grad_norm", "param_norm", "logit_scale", "i2t_accuracy")


def series(workdir, name):
    return np.array([row[name] for row in read_metrics(workdir) if name in row])


def assert_bitwise_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_one_device_data_parallel_and_fsdp_give_the_same_losses(config, tmp_path):
    meshes = {"one": (1, 1), "data": (8, 1), "fsdp": (1, 8), "both": (2, 4)}
    config.model.patch_dropout = 0.0
    for name, (data, fsdp) in meshes.items():
        run_config = config.copy_and_resolve_references()
        run_config.mesh.update(data=data, fsdp=fsdp)
        train(run_config, tmp_path / name, devices=jax.devices()[: data * fsdp])
    losses = series(tmp_path / "one", "loss")
    assert len(losses) == 20 and losses[-1] < losses[0]
    for name in meshes:
        for metric in COMPARED:
            np.testing.assert_allclose(
                series(tmp_path / name, metric),
                series(tmp_path / "one", metric),
                rtol=2e-4,
                atol=1e-5,
                err_msg=f"{name} {metric}",
            )


def test_stop_and_resume_is_bit_identical_to_going_straight(config, tmp_path):
    config.mesh.update(data=2, fsdp=4)
    config.ema.decay = 0.9
    config.optimizer.layer_decay = 0.8
    straight = train(config, tmp_path / "straight")
    train(config, tmp_path / "stopped", stop_after_steps=10)
    assert len(series(tmp_path / "stopped", "loss")) == 10
    resumed = train(config, tmp_path / "stopped")
    assert int(resumed.step) == 20
    assert_bitwise_equal(straight, resumed)
    for metric in COMPARED:
        np.testing.assert_array_equal(
            series(tmp_path / "straight", metric), series(tmp_path / "stopped", metric)
        )


def test_a_finished_run_is_left_as_it_is(config, tmp_path):
    config.total_steps = 6
    first = train(config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    assert_bitwise_equal(first, train(config, tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines


def test_the_loop_leaves_what_people_look_at(config, tmp_path):
    config.total_steps = 6
    config.checkpoint.every_steps = 2
    config.checkpoint.keep_last = 2
    config.profile.update(start_step=3, stop_step=4)
    state = train(config, tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    row = read_metrics(tmp_path)[-1]
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
    # TensorBoard's event files are TFRecords of protobuf events.
    from tensorboardX.proto.event_pb2 import Event

    (events,) = (tmp_path / "tensorboard").iterdir()
    logged = [
        (event.step, value.simple_value)
        for event in map(Event.FromString, TFRecordSource([events]))
        for value in event.summary.value
        if value.tag == "loss"
    ]
    losses = series(tmp_path, "loss")
    assert logged == [(i + 1, np.float32(loss)) for i, loss in enumerate(losses)]

    (trace,) = (tmp_path / "profile").glob("**/*.xplane.pb")
    profiled = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted(profiled) == [3, 4]

    model = diht_jax.load_model(tmp_path)
    assert model.step == 6
    assert_bitwise_equal(model._params, state.params)


def test_another_config_in_the_same_directory_is_refused(config, tmp_path):
    config.total_steps = 5
    train(config, tmp_path)
    config.loss.beta = 0.5
    config.optimizer.learning_rate = 1.0
    with pytest.raises(ValueError, match="changed: loss.beta, optimizer.learning_rate"):
        train(config, tmp_path)
    config.loss.beta = 0.25
    config.optimizer.learning_rate = 1e-3
    config.log_every_steps = 2
    config.data.num_workers = 0
    train(config, tmp_path)


def test_a_new_run_can_start_from_another_at_a_larger_image_size(config, tmp_path):
    config.total_steps = 5
    config.model.patch_dropout = 0.0
    trained = train(config, tmp_path / "small")
    config.model.init_from = str(tmp_path / "small")
    config.model.overrides.image_size = 24
    config.optimizer.learning_rate = 0.0
    config.optimizer.warmup_steps = 0
    fine_tuned = train(config, tmp_path / "large")
    before, after = trained.params, fine_tuned.params
    assert after["vision"]["positional_embedding"].shape == (37, 32)
    np.testing.assert_array_equal(
        after["vision"]["positional_embedding"][0], before["vision"]["positional_embedding"][0]
    )
    assert_bitwise_equal(before["text"], after["text"])
    config.model.overrides.embed_dim = 8
    with pytest.raises(ValueError, match="text/projection/kernel, vision/projection/kernel"):
        train(config, tmp_path / "other")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.train": None}, "config.data.train is not set"),
        ({"data.batch_size": 12}, "batch_size=12 is no multiple of the 8 devices"),
        ({"mesh.fsdp": 3}, "makes 6 devices, but there are 8"),
        ({"optimizer.warmup_steps": 20}, "expected less than the 20 steps"),
        ({"total_epochs": 1.0}, "set exactly one of"),
        ({"evaluation.use_ema": True}, "use_ema needs config.ema.decay"),
        ({"ema.decay": 1.0}, "ema.decay=1.0: expected at least 0 and less than 1"),
        ({"profile.start_step": 3}, "expected 1 <= start_step <= stop_step, or neither"),
        ({"profile.start_step": 3, "profile.stop_step": 2}, "got start_step=3, stop_step=2"),
        ({"optimizer.frozen": ("^visoin/",)}, "'.visoin/' is found in no parameter's name"),
    ],
)
def test_wrong_settings_are_refused_before_training(config, tmp_path, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path)
