"""The grid of launch/datacomp.sbatch: the command of every run, and the resulting config."""

import shlex
import subprocess

import pytest

from diht_jax.training.recipe import check_config
from tests.docs.commands import parsed_flags
from tests.docs.pages import REPOSITORY

# DataComp's settings for its two scales: samples seen, batch, learning rate, warm-up.
SCALES = {"small": (12_800_000, 4096, 5e-4, 500), "medium": (128_000_000, 4096, 5e-4, 500)}


def list_runs(scale):
    """Returns both commands of each run, without `python -m`."""
    script = REPOSITORY / "launch" / "datacomp.sbatch"
    printed = subprocess.run(
        ["bash", script, scale], capture_output=True, text=True, check=True, env={}
    ).stdout
    lines = [shlex.split(line) for line in printed.splitlines()]
    for line in lines:
        middle = line.index("&&")
        train, evaluate = line[:middle], line[middle + 1 :]
        assert train[:3] == ["python", "-m", "diht_jax.train"]
        assert evaluate[:3] == ["python", "-m", "diht_jax.evaluate"]
        yield train[3:], evaluate[3:]


@pytest.mark.parametrize("scale", SCALES)
def test_the_27_runs_are_those_of_the_grid_each_evaluated_into_its_own_file(scale):
    found, workdirs, outputs = set(), set(), set()
    for arguments, evaluation in list_runs(scale):
        config, workdir = parsed_flags("diht_jax.train", arguments, "config", "workdir")
        check_config(config)
        settings = config.data.batch_size, config.optimizer.learning_rate
        settings = (config.total_examples, *settings, config.optimizer.warmup_steps)
        assert settings == SCALES[scale], arguments
        labels = config.concepts.object_weight > 0
        assert config.data.labels == (f"{config.data.train}_labels" if labels else None), arguments
        pairs = config.data.train.removeprefix(f"/mnt/datacomp/{scale}/")
        found.add((pairs, config.loss.beta, labels, config.seed))
        workdirs.add(workdir)
        model, tasks, output = parsed_flags(
            "diht_jax.evaluate", evaluation, "model", "tasks", "output"
        )
        assert (model, tasks) == (workdir, ["datacomp:/mnt/datacomp/evalsets"])
        outputs.add(output)
    losses = [(0.0, False), (0.25, False), (0.25, True)]
    assert len(workdirs) == len(outputs) == 27
    assert found == {
        (pairs, *loss, seed)
        for pairs in ("raw", "clip_score", "cat")
        for loss in losses
        for seed in (0, 1, 2)
    }


def test_another_scale_is_refused():
    script = REPOSITORY / "launch" / "datacomp.sbatch"
    done = subprocess.run(["bash", script, "large"], capture_output=True, text=True, env={})
    assert done.returncode == 2 and "'large'" in done.stderr
