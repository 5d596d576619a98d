"""Evaluation within a run: a wrong task ends the run at its start, a later failure does not."""

import logging
import shutil

import jax
import numpy as np
import pytest

from diht_jax.training import task_evaluation
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from tests.training.conftest import at_step, saved_steps

# The model's score after each step: step 2 is the best.
SCORES = {2: 0.9, 4: 0.2, 6: 0.3}


@pytest.fixture
def run(config, squares, tmp_path):
    """Evaluates every other of six steps on a copy of the squares; its config and a trainer.

    Apart from the last checkpoint, only the steps of evaluations are saved.
    """
    source = shutil.copytree(squares, tmp_path / "source")
    config.checkpoint.every_steps = 100
    config.checkpoint.keep_last = 1
    config.evaluation.every_steps = 2
    config.evaluation.tasks = f"colors=retrieval:{source}?caption_template={{caption}}"
    return config, lambda name: train(config, tmp_path / name, devices=jax.devices()[:1])


def values_of(workdir, name):
    return {row["step"]: row[name] for row in read_metrics(workdir) if name in row}


@pytest.fixture
def scored(monkeypatch):
    """Replaces evaluation by one that returns `SCORES`; lists the steps that were evaluated."""
    evaluated = []

    def evaluate_task(model, task, *, batch_size, show):
        evaluated.append(model.step)
        return {
            "task": task.name,
            "kind": task.kind,
            "metrics": {"t2i_r1": SCORES[model.step]},
            "units": {"t2i_r1": "share"},
        }

    monkeypatch.setattr(task_evaluation, "evaluate_task", evaluate_task)
    return evaluated


def test_a_source_that_vanishes_costs_its_evaluations_only(run, tmp_path, monkeypatch, caplog):
    config, train_as = run
    with monkeypatch.context() as patched:
        at_step(patched, 4, lambda: shutil.rmtree(tmp_path / "source"))
        with caplog.at_level(logging.ERROR):
            state = train_as("run")
    assert "step 4: the evaluation of task 'colors' failed, and the run goes on" in caplog.text
    assert values_of(tmp_path / "run", "evaluation_failed") == {4: 1.0, 6: 1.0}
    assert values_of(tmp_path / "run", "evaluation/colors/t2i_r1").keys() == {2}
    assert saved_steps(tmp_path / "run") == [6]
    config.evaluation.tasks = ""
    without = train_as("without")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(without))


def test_a_missing_source_or_metric_ends_the_run_before_its_first_step(run, tmp_path):
    config, train_as = run
    colors, config.data.validation_share = config.evaluation.tasks, 0.3
    config.evaluation.tasks = colors.replace("colors", "validation")
    with pytest.raises(ValueError, match="tasks: 'validation' is what config.data.validation_sh"):
        train_as("run")
    config.evaluation.tasks, config.data.validation_share = colors, 0.0
    config.checkpoint.best_metric = "colors/top1"
    with pytest.raises(ValueError, match="best_metric='colors/top1' is not among"):
        train_as("run")
    config.checkpoint.best_metric = "colors/t2i_r1"
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(ValueError, match=r"task 'colors' .* cannot be evaluated: its source .*"):
        train_as("run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_best_checkpoint_stays_and_a_killed_evaluation_is_made_up_for(
    run, tmp_path, monkeypatch, scored
):
    config, train_as = run
    config.checkpoint.best_metric = "colors/t2i_r1"
    straight = train_as("straight")
    assert saved_steps(tmp_path / "straight") == [2, 6] and scored == [2, 4, 6]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(task_evaluation, "evaluate_task", killed)
        with pytest.raises(KeyboardInterrupt):
            train_as("killed")
    assert saved_steps(tmp_path / "killed") == [2]
    with monkeypatch.context() as patched:
        at_step(patched, 4, killed)  # step 6: the best of steps 2 and 4 is known from the metrics
        with pytest.raises(KeyboardInterrupt):
            train_as("killed")
    resumed = train_as("killed")
    assert scored[3:] == [2, 4, 6]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(straight), jax.device_get(resumed))
    assert saved_steps(tmp_path / "killed") == [2, 6]
    for name in ("loss", "evaluation/colors/t2i_r1"):
        assert values_of(tmp_path / "killed", name) == values_of(tmp_path / "straight", name)
    train_as("killed")
    assert len(scored) == 6
