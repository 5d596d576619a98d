"""A job that loses a node of its cluster: the same bytes in the end, nothing twice.

The images are large, so that a shard takes long enough to be interrupted.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_prep.filter import run_filter
from tests import make
from tests.data_prep.filtering.jobs import RAY_ENVIRONMENT, job_config, snapshot

_NUM_TARS, _PAIRS = 9, 6
_LONGEST_SECS = 900  # of a command; a failure here means that it waits for ever


def _write_inputs(folder: pathlib.Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (900, 1400, 3), np.uint8)
    image = make.encoded(Image.fromarray(pixels), "JPEG", quality=60)
    for number in range(_NUM_TARS):
        members = {}
        for i in range(_PAIRS):
            caption = f"picture {i} of {number}"
            members |= make.pair_members(f"{number}-{i}", caption, image, "jpg")
        make.write_tar(folder / "in" / f"{number:05d}.tar", members)


_CLUSTER = """
import glob, json, pathlib, sys, threading, time
import ray
from absl import logging
from ray.cluster_utils import Cluster
from data_prep.filter import run_filter
from diht_jax.config import load_recipe

def main(folder):
    folder = pathlib.Path(folder)
    config = load_recipe("configs/prep/convert.py")
    config.update({"input": f"{folder}/in/*.tar"})
    config.update({"output": f"{folder}/cluster", "examples_per_shard": 20})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    config.ray.address = cluster.address

    def lose_the_second_node():
        # The head has room for one worker: two of them mean that the second node is at work.
        workers = set()
        while len(workers) < 2:
            time.sleep(0.01)
            for path in glob.glob(f"{folder}/cluster/parts/*.seconds.json"):
                workers.add(json.loads(pathlib.Path(path).read_bytes())["worker"])
        cluster.remove_node(second, allow_graceful=False)
        print("lost a node", flush=True)

    thread = threading.Thread(target=lose_the_second_node, daemon=True)
    thread.start()
    print("failures", json.dumps(run_filter(config, engine="ray")), flush=True)
    thread.join()
    cluster.shutdown()

if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    main(sys.argv[1])
"""


def test_cluster_loses_a_node(tmp_path):
    pytest.importorskip("ray")
    _write_inputs(tmp_path)
    script = tmp_path / "cluster.py"
    script.write_text(_CLUSTER)
    environment = os.environ | RAY_ENVIRONMENT | {"PYTHONPATH": str(make.REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=make.REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LONGEST_SECS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lost a node" in done.stdout
    assert "its node was lost" in done.stderr and "its task will run again" in done.stderr
    assert "failures {}" in done.stdout
    config = job_config(f"{tmp_path}/in/*.tar", tmp_path / "reference", examples_per_shard=20)
    assert run_filter(config) == {}
    found = snapshot(tmp_path / "cluster")
    assert found == snapshot(tmp_path / "reference")
    shards = {f"pairs-train-{i:05d}.tfrecord{suffix}" for i in range(3) for suffix in ("", ".idx")}
    assert shards | {"kept_keys.txt", "stats.json", "dataset_info.json"} <= found.keys()
