"""Jobs of several processes with several devices each, started as a user starts them."""

import dataclasses
import glob
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest
from jax._src.clusters.slurm_cluster import SlurmCluster
from PIL import Image

from diht_jax import distributed
from diht_jax.config import load_recipe
from diht_jax.data.index import update_index
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.multihost import EXIT_CODE
from diht_jax.training.workdir.stored_run import read_manifests
from tests import make
from tests.compiling import xla_flags
from tests.serving import free_address
from tests.training.conftest import NUM_RECORDS, colored_square
from tests.waiting import wait_until

NUM_PROCESSES, DEVICES_EACH = 2, 2
TOTAL_STEPS = 18
SMALLER = {
    "model.overrides.vision_layers": 1,
    "model.overrides.text_layers": 1,
    "model.overrides.vocab_size": 700,
}
KINDS = ("alt", "synthetic", "title", "recaption")
# Extra fields of the batch, and texts that either all devices pack or none. Sets of kinds have a
# different order in each process, and both processes must still draw the same captions.
SEVERAL = {
    "loss.equal_pairs": "mask",
    "data.captions": "sample",
    "data.caption_weights": ",".join(f"{kind}=1" for kind in KINDS),
}
HEARTBEAT_SECS = 10
LONGEST_SECS = 900  # only against hangs


class Job:
    """Commands in two processes of two CPU devices each."""

    def __init__(self):
        self.processes: list[subprocess.Popen] = []

    def start(self, *command: str) -> list[subprocess.Popen]:
        address = free_address()
        env = {**os.environ, "XLA_FLAGS": xla_flags(DEVICES_EACH)}
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", *command, f"--coordinator_address={address}"),
                    *(f"--num_processes={NUM_PROCESSES}", f"--process_id={process_id}"),
                    f"--heartbeat_timeout_secs={HEARTBEAT_SECS}",
                ],
                env={**env, "PYTHONHASHSEED": str(process_id)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for process_id in range(NUM_PROCESSES)
        ]
        return self.processes

    def outputs(self) -> list[str]:
        return [process.communicate(timeout=LONGEST_SECS)[0] for process in self.processes]

    def run(self, *command: str) -> list[str]:
        """Runs a command that must succeed; returns the processes' output."""
        self.start(*command)
        outputs = self.outputs()
        codes = [process.returncode for process in self.processes]
        if codes != [0, 0]:
            raise AssertionError("\n".join([f"exit codes {codes}", *outputs]))  # untruncated
        return outputs

    def wait_for_lines(self, folder: pathlib.Path, more: int, name: str = "loss") -> None:
        """Waits until the metrics below a folder have `more` new lines with a key prefix `name`."""

        def count() -> int:
            # Unlike `rglob`, this tolerates a checkpoint folder that is renamed in between.
            paths = glob.iglob(f"{folder}/**/metrics.jsonl", recursive=True)
            rows = [row for path in paths for row in read_metrics(pathlib.Path(path).parent)]
            return sum(any(key.startswith(name) for key in row) for row in rows)

        wanted = count() + more

        def has_them() -> bool:
            ended = [process.poll() for process in self.processes]
            assert ended == [None, None], self.outputs()
            return count() >= wanted

        wait_until(has_them)


@pytest.fixture
def job():
    job = Job()
    yield job
    for process in job.processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """A folder of images for each class, one of them invalid."""
    folder = tmp_path_factory.mktemp("shades")
    for label, level in enumerate((20, 120, 230)):
        (folder / f"shade {label}").mkdir()
        for index in range(4):
            color = (level, level + 3 * index, level)
            Image.new("RGB", (20, 16), color).save(folder / f"shade {label}" / f"{index}.png")
    (folder / "shade 1" / "2.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """The squares with a caption of each kind."""
    records = []
    for number in range(NUM_RECORDS):
        texts = [colored_square(number).caption]
        texts += [f"{kind} {number}" for kind in KINDS[1:]]
        metadata = {"captions": texts, "caption_kinds": list(KINDS)}
        records.append(dataclasses.replace(colored_square(number), metadata=metadata))
    return make.write_records(tmp_path_factory.mktemp("captioned"), records, (31, 21))


def test_a_job_in_a_store_that_loses_a_process_and_is_stopped_is_the_run_of_one(
    squares, captioned, shades, job, tmp_path, s3_bucket
):
    run, staging = f"{s3_bucket}/job", tmp_path / "shared"
    retrieval = f"retrieval:{squares}?caption_template={{caption}}"
    tasks = f"classification:{shades},{retrieval}"
    changes = {
        **(SMALLER | SEVERAL | {"mesh.fsdp": 2, "total_steps": TOTAL_STEPS}),
        **{"evaluation.tasks": tasks, "evaluation.every_steps": 6, "evaluation.batch_size": 8},
    }
    config = load_recipe("configs/demo.py", "debug=True")
    config.data.train = str(captioned)
    config.update_from_flattened_dict(changes)
    devices = jax.devices()[:4]
    straight = train(config, tmp_path / "straight", devices=devices)
    config.checkpoint.staging = str(tmp_path / "one process")
    train(config, run, devices=devices, stop_after_steps=3)

    # One of two processes is killed, and the other one ends.
    command = (
        *("diht_jax.train", "--config", "configs/demo.py:debug=True", "--workdir", run),
        *(f"--config.data.train={captioned}", *(f"--config.{k}={v}" for k, v in changes.items())),
        f"--config.checkpoint.staging={staging}",
    )
    processes = job.start(*command)
    job.wait_for_lines(staging, 1)
    processes[1].kill()
    outputs = job.outputs()
    assert processes[0].returncode not in (0, EXIT_CODE)
    # Either a collective notices the broken connection, or JAX's service the missing heartbeats.
    assert re.search("Start the same command|another task died", outputs[0]), outputs[0]

    # The data now has an index, of which the second process is told. Both processes evaluate, and
    # both stop when one of them is told to.
    indexed = tmp_path / "indexed"
    shutil.copytree(captioned, indexed)
    update_index(indexed)
    processes = job.start(*command, f"--config.data.train={indexed}")
    job.wait_for_lines(staging, 1, name="evaluation/")
    processes[1].send_signal(signal.SIGTERM)
    outputs = job.outputs()
    assert [process.returncode for process in processes] == [EXIT_CODE] * 2, outputs
    stopped = max(read_manifests(run))
    assert 6 <= stopped < TOTAL_STEPS and f"stopped after step {stopped}" in outputs[0]

    # One process finishes the run of the two.
    state = train(config, run, devices=devices)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(straight), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-3, atol=1e-5)
    (staged,) = (tmp_path / "one process").rglob("metrics.jsonl")
    one, two = read_metrics(tmp_path / "straight"), read_metrics(staged.parent)
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for ours, theirs in zip(two, one, strict=True):
        names = [name for name in theirs if name == "loss" or name.startswith("evaluation/")]
        assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=1e-4)

    # The command on two processes gives the results of training's last evaluation.
    evaluate = ("diht_jax.evaluate", "--model", run, "--tasks", tasks, "--batch_size=8")
    results = tmp_path / "two.json"
    job.run(*evaluate, "--bootstrap=0", "--nopages", "--output", str(results))
    found = json.loads(results.read_text())["results"]
    measured = {
        f"evaluation/{task['task']}/{name}": value
        for task in found
        for name, value in task["metrics"].items()
    }
    assert measured == pytest.approx({k: v for k, v in two[-1].items() if k != "step"})
    assert len(measured) == 10
    counts = found[0]["counts"]
    assert (counts["images"], counts["dropped"]) == (11, {"image_unreadable": 1})


def test_processes_that_embed_end_together_where_a_file_is_damaged(shades, job, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for index in (0, 1):
            tar.add(shades / "shade 0" / f"{index}.png", f"{index}.png")
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) // 20])
    embed = ("diht_jax.embed", "--model", "clipart_tiny", "--input", f"{tmp_path}/?.tar")
    job.start(*embed, "--output", str(tmp_path / "embedded"), "--batch_size=8")
    outputs = job.outputs()
    assert [process.returncode for process in job.processes] == [1, 1], outputs
    assert [
        output for output in outputs if not ("error:" in output and "b.tar: the tar" in output)
    ] == [], outputs
    assert (tmp_path / "embedded" / "embeddings-00000-00000.json").exists()


def test_wrong_flags():
    with pytest.raises(ValueError, match="--coordinator_address: expected together with"):
        distributed.start(None, 2, 0)
    with pytest.raises(ValueError, match="--process_id=2: expected at least 0 and less than"):
        distributed.start("localhost:1", 2, 2)


# The variables of a batch script, and those that `srun` adds.
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_STEP_NODELIST": "node[1-2]"}


@pytest.mark.parametrize(
    "environment, cluster, warns",
    [
        ({**STEP, "SLURM_NTASKS": "1"}, None, False),
        ({**STEP, "SLURM_NTASKS": "4"}, "Slurm", False),
        ({**BATCH, "SLURM_NTASKS": "4"}, None, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI", False),
    ],
)
def test_cluster_is_found_by_its_environment(monkeypatch, caplog, environment, cluster, warns):
    for name in ("SLURM_NTASKS", *STEP, "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.find_cluster() == cluster
    assert ("begin the command with srun" in caplog.text) == warns
    # With Slurm, JAX finds everything it needs.
    assert SlurmCluster.is_env_present() == ("SLURM_STEP_NODELIST" in environment)
