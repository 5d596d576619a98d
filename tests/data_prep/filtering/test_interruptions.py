"""A job that loses a node of its cluster: the same bytes in the end, nothing twice.

The images are large, so that a shard takes long enough to be interrupted.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_prep.filter import run_filter
from diht_jax.records.schema import decode_record
from diht_jax.records.tfrecord import TFRecordSource
from tests import make
from tests.data_prep.filtering.jobs import RAY_ENVIRONMENT, job_config, snapshot

_REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
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


def _finished(folder: pathlib.Path) -> dict[str, int]:
    """When the statistics of each finished part, and of each output shard, were written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.glob("**/*.tfrecord.stats.json")
    }


def _read_report(folder: pathlib.Path) -> tuple[dict, str]:
    """report.json and report.html without where the output lies, and how long it took."""
    report = json.loads((folder / "report.json").read_bytes())
    for name in ("seconds", "throughput"):
        assert report.pop(name)
    for job in report["jobs"]:
        del job["output"]
    page = (folder / "report.html").read_text()
    page, count = re.subn(r"<h2>Throughput</h2>.*?(?=<h2>)", "", page, flags=re.DOTALL)
    assert count == 1
    return report, page


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
    config.update({"input": f"{folder}/in/*.tar,{folder}/damaged.tar"})
    config.update({"output": f"{folder}/cluster", "examples_per_shard": 20})
    config.max_failed_shards = 0
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
    stats = sorted(folder.glob("cluster/**/*.tfrecord.stats.json"))
    print("finished", json.dumps([[path.name, path.stat().st_mtime_ns] for path in stats]))
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    (folder / "damaged.tar").write_bytes((folder / "in" / "00000.tar").read_bytes())
    print("then", json.dumps(run_filter(config, engine="ray")), flush=True)
    cluster.shutdown()

if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    main(sys.argv[1])
"""


def test_cluster_loses_a_node(tmp_path):
    pytest.importorskip("ray")
    work = tmp_path
    _write_inputs(work)
    script = work / "cluster.py"
    script.write_text(_CLUSTER)
    (work / "damaged.tar").write_bytes((work / "in" / "00000.tar").read_bytes()[:3000])
    environment = os.environ | RAY_ENVIRONMENT | {"PYTHONPATH": str(_REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(script), str(work)],
        cwd=_REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LONGEST_SECS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lost a node" in done.stdout
    assert "its node was lost" in done.stderr and "its task will run again" in done.stderr
    told = {
        name: json.loads(text)
        for name, _, text in (line.partition(" ") for line in done.stdout.splitlines())
        if name in ("failures", "finished", "then")
    }
    assert list(told["failures"]) == [f"{work}/damaged.tar"]  # and the others are complete
    assert len(told["finished"]) == _NUM_TARS
    # When the tar is whole, the cluster does the rest, the re-sharding too; the local engine
    # makes the same bytes of the same input.
    assert told["then"] == {}
    source = f"{work}/in/*.tar,{work}/damaged.tar"
    config = job_config(source, work / "reference", examples_per_shard=20)
    assert run_filter(config) == {}
    now = {
        pathlib.Path(name).name: time_ns
        for name, time_ns in _finished(work / "cluster").items()
        if name.startswith("parts/")
    }
    assert {name: now[name] for name, _ in told["finished"]} == dict(map(tuple, told["finished"]))
    found = snapshot(work / "cluster")
    assert found == snapshot(work / "reference")
    shards = {f"pairs-train-{i:05d}.tfrecord{suffix}" for i in range(3) for suffix in ("", ".idx")}
    assert shards | {"kept_keys.txt", "stats.json", "dataset_info.json"} <= found.keys()
    assert _read_report(work / "cluster") == _read_report(work / "reference")
    records = [decode_record(data) for data in TFRecordSource(work / "cluster")]
    assert len(records) == (_NUM_TARS + 1) * _PAIRS
    assert records[7].caption == "picture 1 of 1"
