"""Processes of `jax.distributed` that share the scan find the same as one process."""

import pathlib
from concurrent import futures

import numpy as np

from data_prep.duplicates import job
from data_prep.duplicates.table import Lookup, read_summary
from tests.data_prep.duplicates.jobs import duplicates_config
from tests.make import run_command
from tests.serving import free_address

_CHANGES = {
    "embeddings.kind": "files",
    "verify.correlation": None,
    "clusters.rows_per_cluster": 30,
    "threshold": 0.9,
    "num_workers": 0,
}


def _embed(folder: pathlib.Path) -> None:
    """Writes 600 embeddings in six files: a third are near-duplicates, and two share a key."""
    generator = np.random.default_rng(0)
    emb = generator.standard_normal((600, 8)).astype(np.float32)
    emb[400:] = emb[generator.integers(0, 400, 200)]
    emb[400:] += 0.1 * generator.standard_normal((200, 8)).astype(np.float32)
    keys = np.array([f"k{number}" for number in range(599)] + ["k3"])
    for number in range(6):
        own = slice(100 * number, 100 * (number + 1))
        np.savez(folder / f"{number}.npz", key=keys[own], image_emb=emb[own])


def test_two_processes_find_what_one_finds(tmp_path):
    _embed(tmp_path)
    changes = _CHANGES | {"embeddings.files": str(tmp_path / "[0-5].npz")}
    shared = [("config", "prep/duplicates"), ("config.output", tmp_path / "shared")]
    shared += [(f"config.{name}", value) for name, value in changes.items()]
    shared += [("coordinator_address", free_address()), ("num_processes", 2)]

    def start(index: int):
        return run_command("data_prep.duplicates", *shared, ("process_id", index), devices=2)

    with futures.ThreadPoolExecutor() as pool:
        done = list(pool.map(start, range(2)))
    assert [process.returncode for process in done] == [0, 0], [p.stderr for p in done]
    assert any("600 pairs: 0 (0.0%) exact copies" in process.stdout for process in done)
    assert len(list((tmp_path / "shared" / "groups").iterdir())) == 1
    changes = {name.replace(".", "__"): value for name, value in changes.items()}
    config = duplicates_config(tmp_path, tmp_path / "alone", input=None, **changes)
    assert job.run(config) == {}
    keys = [f"k{number}" for number in range(600)]
    found, expected = (Lookup(tmp_path / name).find(keys) for name in ("shared", "alone"))
    assert [row and row.duplicate_of for row in found] == [
        row and row.duplicate_of for row in expected
    ]
    assert sum(row is not None for row in found) > 150
    assert read_summary(tmp_path / "shared") == read_summary(tmp_path / "alone")
