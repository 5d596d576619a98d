"""Jobs on a real Ray cluster: models in separate actors, nodes that join late or are lost.

All tests share one cluster in one process, since starting it takes most of the time.
"""

import json
import pathlib
import re

import ml_collections
import pytest

from benchmarks.text_spotting_testset import make_test_set
from data_prep.filter import run_filter
from tests import make
from tests.data_prep.filtering.jobs import (
    RAY_ENVIRONMENT,
    job_config,
    snapshot,
    write_clip,
    write_table,
)
from tests.docs.pages import python_blocks

_SCRIPT = """
import collections, dataclasses, functools, itertools, json, os, pathlib, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from data_prep.filter import run_filter
from data_prep.jobs import cluster as ray_workers
from data_prep.jobs.engine import run_pending
from data_prep.jobs.failures import KEYS
from data_prep.jobs.models import open_model
from diht_jax.config.keys import build_config
from tests.data_prep.jobs.test_ray import models_config, tars_config


class Doubler:
    def double(self, number, folder):
        seen = [os.environ[n] for n in ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION")]
        pathlib.Path(folder, f"model_{os.getpid()}_{'_'.join(seen)}").touch()
        flag = pathlib.Path(folder, f"died_{number}")
        if number == 666 or (number == 13 and not flag.exists()):
            flag.touch()
            os._exit(1)
        if number == 14:
            raise ValueError("fourteen is not allowed")
        return 2 * number


Task = collections.namedtuple("Task", "source")


def work(task, report, folder):
    task = task.source
    # The first node has room for one worker: others run where a node has joined.
    pathlib.Path(f"node_{ray.get_runtime_context().get_node_id()}").touch()
    while task == 0 and len(list(pathlib.Path().glob("node_*"))) < 2:
        time.sleep(0.02)
    # What kills every model actor comes last, so that it takes nobody's batch along.
    while task == 666 and len(list(pathlib.Path().glob("done_*"))) < 5:
        time.sleep(0.02)
    sent, received = 0, []

    def calls():
        nonlocal sent
        for number in range(task, task + 9) if task < 100 else [task]:
            sent += 1
            yield number, folder

    try:
        for result in open_model(Doubler).map("double", calls()):
            received.append(result)
            assert sent - len(received) < 4, "more under way than the model can take"
    finally:
        pathlib.Path(f"done_{task}").touch()
    pathlib.Path(f"result_{task}").write_text(json.dumps(received))


@dataclasses.dataclass(frozen=True)
class Searched:
    source: str
    output: str
    search: object = None


def fail(task, report, folder):
    if task.source == "dies" and task.search is None:
        os._exit(1)
    if task.source == "hangs":
        time.sleep(600)
    pathlib.Path(folder, f"ended_{task.source}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])


def run_failing(config, folder):
    # No time passes until the other tasks have ended; then each look at the clock is late.
    looks = itertools.count()
    ended = pathlib.Path(folder).glob
    ray_workers._now = lambda: 100.0 * next(looks) if len(list(ended("ended_*"))) == 2 else 0.0
    return run_pending(
        functools.partial(fail, folder=folder),
        [Searched(name, os.path.join(folder, name)) for name in ("hangs", "dies", "works")],
        config,
        "ray",
        label="failing",
    )


def run_models(address, folder):
    config = models_config(pathlib.Path(folder), "on_ray")
    config.num_workers = 1
    config.ray.update({"address": address, "model_actors": 1, "gpus_per_model_actor": 0.0})
    return run_filter(config, engine="ray")


def lose(cluster, node, folder):
    config = tars_config(pathlib.Path(folder), "lost")
    config.num_workers = 2
    config.ray.address = cluster.address

    def lose_the_node():
        # The head has room for one worker: two of them mean that the other node is at work.
        workers = set()
        while len(workers) < 2:
            time.sleep(0.01)
            for path in pathlib.Path(folder).glob("lost/parts/*.seconds.json"):
                workers.add(json.loads(path.read_bytes())["worker"])
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose_the_node, daemon=True)
    thread.start()
    failures = run_filter(config, engine="ray")
    thread.join()
    return failures


def main(folder):
    os.chdir(folder)
    # A GPU in name only, to be reserved: nothing here computes on it.
    head = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    config = build_config(KEYS)
    config.retries = 0
    config.ray.update(address=cluster.address, model_actors=10, gpus_per_model_actor=0.5)

    nodes, read = [], ray_workers.RayPool.read

    def add_a_node(pool, future):
        if not nodes:  # the first task has ended
            nodes.append(cluster.add_node(num_cpus=3))
        return read(pool, future)

    ray_workers.RayPool.read = add_a_node
    function = functools.partial(work, folder=folder)
    tasks = list(map(Task, [5, 0, 20, 30, 6, 666]))
    failures = run_pending(function, tasks, config, "ray", label="toy")
    print("toy", json.dumps(failures), flush=True)
    config.update(retries=1, num_workers=2, shard_timeout_secs=60.0)
    config.ray.update(model_actors=0, gpus_per_worker=0.5, cpus_per_worker=0.5)
    print("failing", json.dumps(run_failing(config, folder)), flush=True)
    print("models", json.dumps(run_models(cluster.address, folder)), flush=True)
    ray.init(address=cluster.address, logging_level="ERROR")
    exec(pathlib.Path("example.py").read_text(), {"__name__": "example"})
    ray.shutdown()
    print("lost", json.dumps(lose(cluster, nodes[0], folder)), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
"""


# Small canvases for the gate, the look, and the closer look if hardly any text could be read.
_SPOTTING = {"text_spotting": True} | {
    f"spotter__{name}": value
    for name, value in {
        **{"canvas_size": 96, "gate_size": 64, "gate_score": 0.01, "closer_size": 160},
        **{"precision": "float32", "device": "cpu"},
    }.items()
}


def models_config(folder: pathlib.Path, output: str) -> ml_collections.ConfigDict:
    """Drops pictures that show their caption, and scores pairs: uses two models."""
    return job_config(
        str(folder / "pairs" / "t.jsonl"),
        folder / output,
        clip__model=str(folder / "clip.safetensors"),
        clip__batch_size=3,
        **_SPOTTING,
    )


def tars_config(folder: pathlib.Path, output: str) -> ml_collections.ConfigDict:
    """Keeps every pair of the tars."""
    return job_config(f"{folder}/in/*.tar", folder / output, examples_per_shard=20)


def _write_tars(folder: pathlib.Path) -> None:
    """Writes nine tars of large pictures: a shard takes long enough to be interrupted."""
    image = make.encoded(make.noise(0, (1400, 900)), "JPEG", quality=60)
    for number in range(9):
        members = {}
        for i in range(6):
            caption = f"picture {i} of {number}"
            members |= make.pair_members(f"{number}-{i}", caption, image, "jpg")
        make.write_tar(folder / "in" / f"{number:05d}.tar", members)


def _write_pictures(folder: pathlib.Path) -> None:
    """Writes pairs, some of which show their caption."""
    kinds = ("band", "unrelated", "picture", "nothing")
    chosen = {f"{p.kind}.jpg": p for p in make_test_set(10, seed=1) if p.kind in kinds}
    rows = [{"image": name, "caption": picture.caption} for name, picture in chosen.items()]
    write_table(folder / "pairs", rows, {name: picture.image for name, picture in chosen.items()})


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """The script's folder, and its printed lines by their first word."""
    pytest.importorskip("ray")
    pytest.importorskip("easyocr")
    folder = tmp_path_factory.mktemp("ray")
    (example,) = python_blocks(make.REPOSITORY / "docs/guides/prepare/ray.md")[:1]
    (folder / "example.py").write_text(example)
    (folder / "script.py").write_text(_SCRIPT)
    _write_pictures(folder)
    _write_tars(folder)
    write_clip(folder / "clip.safetensors", image_size=32)
    environment = RAY_ENVIRONMENT | {"PYTHONPATH": str(make.REPOSITORY)}
    done = make.run_command("script", folder, devices=8, folder=folder, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    return folder, {name: text for name, _, text in lines} | {"stderr": done.stderr}


def test_workers_share_models_that_die_and_nodes_that_join(printed):
    folder, found = printed
    failures = json.loads(found["toy"])
    # The actor that held 13 died, and another one doubled 13; 14 is an error of the model itself.
    assert (folder / "died_13").exists()
    assert failures.keys() == {"6", "666"} and failures["6"] == "fourteen is not allowed"
    assert "3 model actors died of one batch" in failures["666"]
    for task in (0, 5, 20, 30):
        result = json.loads((folder / f"result_{task}").read_text())
        assert result == [2 * n for n in range(task, task + 9)]
    assert len(list(folder.glob("node_*"))) == 2
    # Two models share the GPU and its memory; each one that died was replaced.
    models = [path.name.split("_") for path in folder.glob("model_*")]
    assert 2 <= len(models) <= 6 and {tuple(name[2:]) for name in models} == {("0", "0.45")}


def test_deaths_and_time_limits_are_those_of_local_workers(printed):
    folder, found = printed
    stopped = "stopped after config.shard_timeout_secs=60 seconds"
    assert json.loads(found["failing"]) == {"hangs": stopped}
    ended = {path.name: path.read_text() for path in folder.glob("ended_*")}
    assert ended == {"ended_dies": "0", "ended_works": "0"}  # the workers' shared GPU
    assert found["stderr"].count(f"hangs: {stopped}; its task will run again") == 1


def test_models_find_what_they_find_in_the_local_engine(printed):
    folder, found = printed
    assert json.loads(found["models"]) == {}
    assert run_filter(models_config(folder, "local")) == {}
    local, on_ray = (snapshot(folder / name) for name in ("local", "on_ray"))
    assert on_ray == local
    counts = json.loads(local["stats.json"])["counts"]
    assert counts["text_spotting"]["read"] >= 2
    assert counts["dropped"]["text"]["shows_caption"] >= 1


def test_example_of_the_page(printed):
    assert json.loads(printed[1]["kept:"]) == ["a dog chases a small cat"]


def test_the_loss_of_a_node_costs_no_pair_and_changes_no_byte(printed):
    folder, found = printed
    assert json.loads(found["lost"]) == {}
    again = r"in/\d{5}\.tar: .*its node was lost.* its task will run again"
    assert re.search(again, found["stderr"])
    assert run_filter(tars_config(folder, "reference")) == {}
    lost = snapshot(folder / "lost")
    assert lost == snapshot(folder / "reference")
    shards = {f"pairs-train-{i:05d}.tfrecord{suffix}" for i in range(3) for suffix in ("", ".idx")}
    assert shards | {"kept_keys.txt", "stats.json", "dataset_info.json"} <= lost.keys()
