"""Several processes that share a search: of `jax.distributed`, killed and started again; arrays."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pyarrow
import pytest

from data_prep.duplicates import job
from data_prep.duplicates.search import Processes, StageFailedError, Task
from data_prep.duplicates.table import Lookup, read_summary
from tests.compiling import xla_flags

_REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
_LONGEST_SECS = 900  # only against hanging

# The command, with small tasks. A process is killed in the third call of what `END_AT` names.
_SCRIPT = """
import os, signal
from data_prep.duplicates import config, kmeans, search, stages
from data_prep.duplicates.__main__ import define_flags, main
from diht_jax import command_line

search._BLOCK_ROWS, stages._GROUP_ROWS, stages._GROUPS_AT_ONCE = 250, 60, 4
stages.HASHES_AT_ONCE = 200


def end_in_call(where, name, number):
    original, calls = getattr(where, name), []

    def counted(*given, **named):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(where, name, counted)


if name := os.environ.get("END_AT"):
    end_in_call({"improve": kmeans.KMeans, "find_in_group": stages}[name], name, 3)
define_flags()
command_line.run(main, config_defaults=config.default_config)
"""


class _Job:
    """The command in two processes of two CPU devices each."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        (folder / "script.py").write_text(_SCRIPT)
        self.processes: list[subprocess.Popen] = []

    def start(self, end_at: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        env = os.environ | {
            "XLA_FLAGS": xla_flags(2),
            "PYTHONPATH": str(_REPOSITORY),
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, "script.py", "--config=recipe.py"]
        command += [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
        self.processes = [
            subprocess.Popen(
                [*command, f"--process_id={index}"],
                cwd=self._folder,
                env=env | {"END_AT": end_at if index == 1 else ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(2)
        ]

    def lose_the_second(self, end_at: str) -> None:
        """Until it is killed; then the other one is as well, which would wait for it."""
        self.start(end_at)
        text, _ = self.processes[1].communicate(timeout=_LONGEST_SECS)
        assert self.processes[1].returncode == -signal.SIGKILL, text
        self.stop()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path):
    job = _Job(tmp_path)
    yield job
    job.stop()


def _embed(folder: pathlib.Path) -> None:
    """600 embeddings in six files; a third are near others, and two pairs share a key."""
    generator = np.random.default_rng(0)
    emb = generator.standard_normal((600, 8)).astype(np.float32)
    emb[400:] = emb[generator.integers(0, 400, 200)]
    emb[400:] += 0.1 * generator.standard_normal((200, 8)).astype(np.float32)
    keys = np.array([f"k{number}" for number in range(599)] + ["k3"])
    for number in range(6):
        own = slice(100 * number, 100 * (number + 1))
        np.savez(folder / f"{number}.npz", key=keys[own], image_emb=emb[own])


_RECIPE = """
from data_prep.duplicates.config import default_config


def get_config():
    c = default_config()
    c.embeddings.kind, c.embeddings.files, c.output = "files", "[0-5].npz", "shared"
    c.clusters.rows_per_cluster, c.clusters.probes, c.threshold, c.num_workers = 30, 2, 0.9, 0
    return c
"""


def test_processes_that_are_killed_find_what_one_finds(start, tmp_path):
    _embed(tmp_path)
    (tmp_path / "recipe.py").write_text(_RECIPE)
    shared = tmp_path / "shared"
    start.lose_the_second("improve")
    with np.load(shared / "centroids.npz") as state:
        assert state["done"] == 2 and len(state["centroids"]) == 20
    assert not (shared / "clusters").exists()
    start.lose_the_second("find_in_group")
    assert len(list((shared / "clusters").glob("*.arrow"))) == 3
    groups = {path.name: path.stat().st_mtime_ns for path in shared.glob("groups/*")}
    assert "00000001.arrow" in groups and "00000005.arrow" not in groups
    start.start()
    printed = [process.communicate(timeout=_LONGEST_SECS)[0] for process in start.processes]
    assert [process.returncode for process in start.processes] == [0, 0], printed
    assert "600 pairs: 0 (0.0%) exact copies" in printed[0] and "600 pairs" not in printed[1]
    for name, time in groups.items():
        assert (shared / "groups" / name).stat().st_mtime_ns == time
    # Of one process, with one block, one range of hashes and another number of devices.
    scope: dict = {}
    exec(_RECIPE, scope)
    config = scope["get_config"]()
    config.embeddings.files, config.output = str(tmp_path / "[0-5].npz"), str(tmp_path / "alone")
    assert job.run(config) == {}
    parts = sorted((tmp_path / "alone" / "duplicates").iterdir())
    assert len(parts) == 6
    for path in parts:
        assert (shared / "duplicates" / path.name).read_bytes() == path.read_bytes()
    keys = [f"k{number}" for number in range(600)]
    found = Lookup(shared).find(keys)
    assert found == Lookup(tmp_path / "alone").find(keys)
    assert sum(row is not None for row in found) > 150
    assert pyarrow.ipc.open_file(shared / "dropped.arrow").num_record_batches == 3
    summaries = [read_summary(folder) for folder in (shared, tmp_path / "alone")]
    for summary in summaries:
        del summary["digest"]  # of the ranges
    assert summaries[0] == summaries[1]


def test_jobs_of_an_array_do_their_share_first_and_then_what_others_left(tmp_path):
    tasks = [Task(f"part {n}", str(tmp_path / "parts" / str(n)), n) for n in range(7)]
    calls = []

    def write(task, report):
        calls.append(task.number)
        if task.number == 4 and len(calls) == 2:
            (tmp_path / "parts" / "5").touch()  # by another job, in the meantime
        if task.number == 2:
            raise ValueError("not two")
        pathlib.Path(task.output).touch()

    options = {"num_workers": 0}
    with pytest.raises(StageFailedError) as raised:
        Processes(1, 3, False, options).run(write, tasks, "parts")
    assert calls == [1, 4, 6, 3, 2, 0]
    assert raised.value.failures == {"part 2": "not two"}
    calls.clear()
    (tmp_path / "parts" / "2").touch()
    Processes(0, 3, False, options).run(write, tasks, "parts")
    assert calls == []
