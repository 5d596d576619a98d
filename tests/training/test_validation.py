"""Held-out records are never trained on, and serve to evaluate the run."""

import shutil

import jax
import pytest

from diht_jax.evaluate import open_tasks
from diht_jax.evaluation.task_parsing import open_source
from diht_jax.evaluation.tasks import evaluate_task, validation_tasks
from diht_jax.loading import load_model
from diht_jax.records.schema import Pair
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.task_evaluation import log_best, note_result
from diht_jax.training.workdir.checkpoint import BestStep
from diht_jax.training.workdir.opening import open_data
from diht_jax.training.workdir.saved_run import write_config
from diht_jax.training.workdir.stored_run import StagedDirectory
from tests import make


def validation_keys(config):
    tasks = validation_tasks(config)
    return sorted(entry.key for task in tasks for entry in open_source(task).entries())


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_an_epoch_holds_every_record_but_those_held_out(order, config, squares):
    config.data.update(validation_share=0.3, order=order, block_records=4, num_streams=4)
    held_out, mixture = validation_keys(config), open_data(config)
    epoch = mixture.num_records
    iterator = make.train_iterator(mixture, batch_size=epoch, seed=config.seed, num_workers=0)
    trained = iterator.keys(first_example=3 * epoch)
    assert held_out and len(trained) == epoch
    assert sorted([*trained, *held_out]) == [f"square_{number:03d}" for number in range(52)]


def test_the_held_out_records_of_each_source_are_a_task(config, squares, tmp_path):
    other = make.write_records(tmp_path / "other", 40)
    config.data.validation_share = 0.3
    config.data.text_template = "{caption}!"
    config.data.train = {
        "squares": {"path": str(squares), "weight": 1.0, "text_template": "this is {caption}"},
        "other": {"path": str(other), "weight": 1.0},
    }
    found = {task.name: task.caption_template for task in validation_tasks(config)}
    assert found == {
        "validation_squares": "this is {caption}",
        "validation_other": "{caption}!",
    }


@pytest.fixture(scope="module")
def trained(make_config, tmp_path_factory):
    """The config of a run of two steps with an evaluation after each, and its work directory."""
    config, workdir = make_config(), tmp_path_factory.mktemp("runs") / "run"
    config.checkpoint.update(every_steps=1, best_metric="validation/t2i_r10")
    config.evaluation.update(every_steps=1, batch_size=16)
    config.data.update(validation_share=0.3, text_template="a photo of {caption}")
    train(config, workdir, stop_after_steps=2, devices=jax.devices()[:1])
    return config, workdir


def test_a_run_is_measured_on_what_it_holds_out(trained):
    config, workdir = trained
    (task,) = open_tasks(str(workdir), ["validation"])
    assert task.caption_template == config.data.text_template
    loaded = load_model(str(workdir), batch_size=16, devices=jax.devices()[:1])
    measured = evaluate_task(loaded, task, batch_size=16)
    assert measured["counts"]["images"] == len(validation_keys(config))
    rows = [row for row in read_metrics(workdir) if "evaluation/validation/t2i_r10" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for name, value in measured["metrics"].items():
        assert rows[-1][f"evaluation/validation/{name}"] == value, name


def test_a_run_in_a_store_is_measured_on_what_it_holds_out(trained, tmp_path, monkeypatch):
    config, workdir = trained
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    stored = StagedDirectory(f"memory://{tmp_path.name}/run", str(tmp_path / "staging"))
    shutil.copytree(workdir, stored.folder)
    stored.send()
    (task,) = open_tasks(stored.url, ["validation"])
    assert sorted(entry.key for entry in open_source(task).entries()) == validation_keys(config)


def test_a_damaged_record_that_is_held_out_costs_itself_where_training_skips_it(config, tmp_path):
    config.data.train = str(make.write_records(tmp_path / "data", 12))
    config.data.validation_share = 0.5
    keys = validation_keys(config)
    path = tmp_path / "data" / "train-00000.tfrecord"
    data = bytearray(path.read_bytes())
    data[data.index(keys[1].encode())] ^= 1
    path.write_bytes(data)
    (task,) = validation_tasks(config)
    with pytest.raises(ValueError, match=r"train-00000\.tfrecord: record"):
        list(open_source(task).entries())
    config.data.on_bad_record = "skip"
    (task,) = validation_tasks(config)
    found = [entry.key for entry in open_source(task).entries() if isinstance(entry, Pair)]
    assert sorted(found) == [keys[0], *keys[2:]]


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_best_step_is_named_with_the_flags_that_load_it(use_ema, config, caplog):
    config.checkpoint.best_metric, config.evaluation.use_ema = "validation/t2i_r10", use_ema
    with caplog.at_level("INFO"):
        log_best(config, BestStep(values={3: 0.25, 6: 0.5, 7: 0.75}), [3, 6, 9])  # 7 was deleted
    assert "--step=6" in caplog.text and ("--ema" in caplog.text) == use_ema


def test_a_step_without_the_best_metric_is_named(config, caplog):
    config.checkpoint.best_metric, best = "pets/top5", BestStep()
    note_result(config, best, 3, {"pets/top1": 0.5, "pets/top5": 0.75})
    assert not caplog.text
    note_result(config, best, 6, {"pets/top1": 0.5})  # only four classes
    assert best.values == {3: 0.75}
    assert "step 6 cannot be the best" in caplog.text and ": pets/top1" in caplog.text


def test_a_model_without_held_out_records_has_no_such_task(tmp_path):
    write_config(tmp_path, make.tiny_config())
    with pytest.raises(ValueError, match=f"--tasks=validation .*--model={tmp_path}"):
        open_tasks(str(tmp_path), ["validation"])
