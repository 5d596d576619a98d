"""Jobs of several processes, each with devices of its own, started as a user starts them."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from diht_jax import distributed
from diht_jax.config import load_recipe
from diht_jax.training.loop import train
from diht_jax.training.metrics import read_metrics

NUM_PROCESSES, DEVICES_EACH = 2, 2


@pytest.fixture
def start_job(squares):
    """Starts `diht_jax.train` in two processes; kills what is left of them at the end."""
    processes = []

    def start(workdir, *flags):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        env = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES_EACH}",
        }
        for process_id in range(NUM_PROCESSES):
            command = [
                *(sys.executable, "-m", "diht_jax.train"),
                *("--config", "configs/demo.py:debug=True", f"--config.data.train={squares}"),
                *("--workdir", str(workdir), f"--coordinator_address=localhost:{port}"),
                *(f"--num_processes={NUM_PROCESSES}", f"--process_id={process_id}", *flags),
            ]
            processes.append(
                subprocess.Popen(
                    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        return processes

    yield start
    for process in processes:
        process.kill()
        process.wait()


def losses(workdir):
    return np.array([row["loss"] for row in read_metrics(workdir) if "loss" in row])


def test_two_processes_of_two_devices_have_the_losses_of_one_with_four(
    squares, start_job, tmp_path
):
    processes = start_job(tmp_path / "two", "--config.mesh.fsdp=2")
    config = load_recipe("configs/demo.py", "debug=True")
    config.data.train = str(squares)
    config.mesh.fsdp = 2
    train(config, tmp_path / "one", devices=jax.devices()[:4])
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    expected = losses(tmp_path / "one")
    assert len(expected) == 4
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:1", 2, None), "--process_id: expected together with"),
        ((None, 2, 0), "--coordinator_address: expected together with"),
        (("localhost:1", 2, 2), "--process_id=2: expected at least 0 and less than"),
    ],
)
def test_wrong_flags(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(*arguments)


@pytest.mark.parametrize(
    "environment, cluster",
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
    ],
)
def test_cluster_is_found_by_its_environment(monkeypatch, environment, cluster):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.find_cluster() == cluster
