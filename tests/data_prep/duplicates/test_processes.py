"""Processes of `jax.distributed` share the scan, and find what one process finds."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from data_prep.duplicates import job
from data_prep.duplicates.table import Lookup, read_summary
from tests.compiling import xla_flags
from tests.make import REPOSITORY

_LONGEST_SECS = 900  # only against hanging


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


def test_two_processes_find_what_one_finds(tmp_path):
    _embed(tmp_path)
    (tmp_path / "recipe.py").write_text(_RECIPE)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "data_prep.duplicates", "--config=recipe.py"]
    command += [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={index}"],
            cwd=tmp_path,
            env=os.environ | {"XLA_FLAGS": xla_flags(2), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=_LONGEST_SECS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    assert any("600 pairs: 0 (0.0%) exact copies" in text for text in printed)
    assert len(list((tmp_path / "shared" / "groups").iterdir())) == 1
    scope: dict = {}
    exec(_RECIPE, scope)
    config = scope["get_config"]()
    config.embeddings.files, config.output = str(tmp_path / "[0-5].npz"), str(tmp_path / "alone")
    assert job.run(config) == {}
    keys = [f"k{number}" for number in range(600)]
    found, expected = (Lookup(tmp_path / name).find(keys) for name in ("shared", "alone"))
    assert [row and row.duplicate_of for row in found] == [
        row and row.duplicate_of for row in expected
    ]
    assert sum(row is not None for row in found) > 150
    assert read_summary(tmp_path / "shared") == read_summary(tmp_path / "alone")
