"""The experiments use existing keys; the runner makes only what is missing, by commands."""

import dataclasses
import fcntl
import json
import string
import subprocess
import sys

import pytest

from benchmarks.lab import data, processes
from benchmarks.lab.experiments import EXPERIMENTS, RETIRED, STUDENTS
from benchmarks.lab.processes import locked, run_command
from benchmarks.lab.run import Lab, Run, definition, is_done, select_runs
from diht_jax.config import default_config, load_recipe, validate_config


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - set(RETIRED)))
def test_experiments_name_data_students_and_keys_that_exist(name):
    experiment = EXPERIMENTS[name]
    student = STUDENTS[experiment.student]
    assert set(name) <= set(string.ascii_lowercase + string.digits + "_")
    data.identity(experiment.data.format(seed=0))
    if experiment.init_from is not None:
        start = EXPERIMENTS[experiment.init_from]
        assert start.keep_model and start.seeds >= experiment.seeds
    config = load_recipe(student.recipe)
    for key, value in {**student.config, **experiment.config}.items():
        config.update_from_flattened_dict({key: value})
    config.data.train = "somewhere"
    if "total_epochs" in experiment.config:
        config.total_examples = None  # as the command line does
    validate_config(config, default_config())


def test_a_definition_changes_with_all_that_decides_a_run(monkeypatch):
    one = Run(EXPERIMENTS["cat"], 0)
    experiment = one.experiment
    others = [
        Run(experiment, 1),
        Run(EXPERIMENTS["raw"], 0),
        Run(dataclasses.replace(experiment, config={"loss.beta": 0.1}), 0),
        Run(dataclasses.replace(experiment, student="cifar10"), 0),
    ]
    tuned = Run(dataclasses.replace(experiment, init_from="raw"), 0)
    others += [tuned, Run(dataclasses.replace(experiment, init_from="random"), 0)]
    assert len({definition(each) for each in (one, *others)}) == 7
    assert definition(one) == definition(Run(experiment, 0))
    # Data made by a student depend on how that student was trained.
    each = Run(EXPERIMENTS["clip_score"], 0)
    before = definition(each)
    with monkeypatch.context() as patch:
        changed = dataclasses.replace(EXPERIMENTS["raw"], config={"loss.beta": 0.1})
        patch.setitem(EXPERIMENTS, "raw", changed)
        assert definition(each) != before
    before = definition(one)
    monkeypatch.setattr(data, "WEB_PAIRS", 5000)
    assert definition(one) != before


def write_result(folder, each, **changes):
    folder.mkdir(exist_ok=True)
    result = {"definition": definition(each), "training_secs": 50.0, "measuring_secs": 10.0}
    (folder / f"{each.name}.json").write_text(json.dumps(result | changes))


def test_only_missing_and_outdated_runs_are_made_and_failures_end_nothing(tmp_path, monkeypatch):
    runs = select_runs(["oracle", "raw_seed0"])
    write_result(tmp_path, runs[0])
    write_result(tmp_path, runs[1], definition="of another recipe")
    assert [is_done(each, tmp_path) for each in runs] == [True, False, False, False]
    made = []

    def make_one(self, each):
        if each.seed == 1:
            raise RuntimeError("diht_jax.train: exit 1")
        made.append(each.name)
        write_result(tmp_path, each)

    monkeypatch.setattr(Lab, "make_one", make_one)
    lab = Lab(tmp_path / "work", tmp_path, tmp_path)
    failed = lab.make([each for each in runs if not is_done(each, tmp_path)])
    assert failed == ["oracle_seed1"] and made == ["oracle_seed2", "raw_seed0"]


def test_a_failed_command_shows_the_end_of_what_it_printed(tmp_path):
    with pytest.raises(RuntimeError, match="no_such_module --x=1: exit 1\n.*No module named"):
        run_command("no_such_module", "--x=1")
    log = tmp_path / "lab.log"
    log.write_text("of the start before\n")
    with pytest.raises(RuntimeError, match="No module named"):
        run_command("no_such_module", log=log)
    assert "of the start before" in log.read_text() and "No module named" in log.read_text()


def test_a_lock_lasts_as_long_as_a_command_that_was_started_under_it(tmp_path):
    path = tmp_path / "runs" / "cat_seed0.lock"
    with locked(path):
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=processes._held
        )
    # The lock's owner is gone, as after kill -9, but its command still runs.
    with open(path) as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.kill()
        child.wait()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert processes._held == []
