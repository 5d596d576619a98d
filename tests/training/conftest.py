"""A small data set of coloured squares, and a config that trains on it in seconds."""

import dataclasses
import json
import pathlib
import subprocess
import types
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from etils.epath import backend, gpath
from fsspec.registry import _registry

from diht_jax.input.pipeline import TrainIterator
from diht_jax.models.parameters import ModelDefinition
from diht_jax.models.zoo import Architecture
from diht_jax.records.dataset_info import STATS_SUFFIX
from diht_jax.records.schema import Record
from diht_jax.records.vocabulary import ConceptList, Vocabulary, write_vocabulary
from diht_jax.training import loop, program
from diht_jax.training.monitoring import throughput
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.program import TrainProgram
from diht_jax.weights.export import write_model
from diht_jax.weights.source import ModelFiles
from tests import make
from tests.records.stores import BucketStore

NUM_RECORDS = 52
# Fields of an architecture with the components of SigLIP's towers.
SIGLIP = {
    "class_token": False,
    "vision_projection": "none",
    "text_projection": "bias",
    "causal_text": False,
    "text_pool": "last",
    "activation": "gelu_tanh",
}


# The data and evaluation keys on which a program depends, and the keys on which it does not.
DATA_KEYS, EVALUATION_KEYS = ("batch_size", "class_key", "allow_changed"), ("use_ema",)
NOT_IN_PROGRAMS = (
    *("total_steps", "no_patch_dropout_steps", "log_every_steps", "checkpoint", "profile"),
    *("stage", "trackers", "tracking", "debug_nans", "max_skipped_steps"),
)
MADE: dict[Any, TrainProgram] = {}  # shared by all files in this process


@pytest.fixture(scope="package", autouse=True)
def programs():
    """Shares programs among runs of one config: tracing would take most of a tiny run's time.

    Runs that tests start as a command trace their own program.
    """

    def program_of(config, total_steps, devices=None):
        plain = config.to_dict()
        for section, names in (("data", DATA_KEYS), ("evaluation", EVALUATION_KEYS)):
            plain[section] = {name: plain[section][name] for name in names}
        for name in NOT_IN_PROGRAMS:
            del plain[name]
        del plain["model"]["init_from"]
        key = (repr(plain), total_steps, tuple(devices or jax.devices()))
        if key not in MADE:
            MADE[key] = TracedOnce(config.copy_and_resolve_references(), total_steps, devices)
        return MADE[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (program, throughput):
            patch.setattr(module, "TrainProgram", program_of)
        yield


class TracedOnce(TrainProgram):
    """A program whose callers all get the same jitted step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._steps: dict[bool, Any] = {}

    def step(self, state, *, patch_dropout=True):
        if patch_dropout not in self._steps:
            self._steps[patch_dropout] = super().step(state, patch_dropout=patch_dropout)
        return self._steps[patch_dropout]


@pytest.fixture(scope="module", autouse=True)
def free_compiled():
    """Frees a file's compiled programs, gigabytes in total. Other files have the cache on disk."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="package", autouse=True)
def no_curves():
    """Disables a run's curves, which cost as much as training a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda workdir: None)
        yield


def write_weights(
    folder: pathlib.Path, arch: Architecture, form: str = "safetensors", **facts: Any
) -> Any:
    """Writes a weight directory of randomly drawn parameters, and returns these."""
    params = make.draw_parameters(ModelDefinition(arch, "float32", "float32").init_params)
    write_model(folder, form, ModelFiles(arch, params, "drawn", **facts), card="")
    return params


def at_step(monkeypatch, step, action):
    """Calls `action` when the batch of a step is taken."""
    take, taken = TrainIterator.__next__, []

    def acting(iterator):
        taken.append(None)
        if len(taken) == step:
            action()
        return take(iterator)

    monkeypatch.setattr(TrainIterator, "__next__", acting)


def series(workdir: pathlib.Path, name: str) -> np.ndarray:
    """Returns the values of a metric, from the lines of a run that have it."""
    return np.array([row[name] for row in read_metrics(workdir) if name in row])


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints in a work directory."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_bitwise_equal(one: Any, other: Any) -> None:
    """Asserts that the arrays of two trees are equal."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), one, other)


def colored_square(index: int) -> Record:
    color = tuple(np.random.default_rng(index).integers(0, 256, 3).tolist())
    caption = "a square of red {}, green {} and blue {}".format(*color)
    image = make.encoded(make.plain(color, (20, 16)))
    return Record(key=f"square_{index:03d}", image=image, caption=caption)


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> pathlib.Path:
    """Two shards of records, 31 and 21 long."""
    directory = tmp_path_factory.mktemp("squares")
    for shard, indices in enumerate([range(31), range(31, NUM_RECORDS)]):
        make.write_shard(directory / f"squares-{shard}.tfrecord", map(colored_square, indices))
    return directory


def labelled_square(index: int) -> Record:
    """Returns a square with its shade as the object; every fourth is unlabelled."""
    record = colored_square(index)
    if index % 4 == 0:
        return record
    color = np.random.default_rng(index).integers(0, 256, 3)
    shade = min(2, int(color.sum()) // 256)
    return dataclasses.replace(
        record,
        object_ids=np.int32([shade, (shade + 1) % 3]),
        object_probs=np.float32([0.75, 0.25]),
        attribute_ids=np.int32([int(shade < 2)]),
        attribute_probs=np.float32([1.0]),
    )


@pytest.fixture(scope="session")
def write_labelled():
    """Returns a function that writes labelled squares to a new folder, as data_prep.label does."""

    def write(folder: pathlib.Path, names=("dark", "medium", "light")) -> pathlib.Path:
        folder.mkdir()
        vocabulary = Vocabulary(
            ConceptList("objects", tuple(names), (1,) * len(names)),
            ConceptList("attributes", ("bright", "dull"), (1, 1)),
        )
        path = folder / "squares-0.tfrecord"
        make.write_shard(path, map(labelled_square, range(NUM_RECORDS)))
        stats = {"counts": {"vocabulary": vocabulary.describe()}}
        (folder / f"{path.name}{STATS_SUFFIX}").write_text(json.dumps(stats))
        write_vocabulary(folder, vocabulary)
        return folder

    return write


@pytest.fixture(scope="session")
def labelled(write_labelled, tmp_path_factory) -> pathlib.Path:
    """One shard of labelled records."""
    return write_labelled(tmp_path_factory.mktemp("labelled") / "squares")


@pytest.fixture(scope="session")
def make_config(squares):
    """Returns a function that makes the config of a run of 6 steps of 16 examples.

    Patch dropout makes the step depend on its random key.
    """

    def make_one() -> ml_collections.ConfigDict:
        config = make.tiny_config(total_steps=6)
        config.model.patch_dropout = 0.25
        config.model.overrides.patch_size = 4
        config.loss.beta = 0.25
        config.optimizer.warmup_steps = 4
        config.data.train = str(squares)
        config.log_every_steps = 1
        config.checkpoint.every_steps = 5
        return config

    return make_one


@pytest.fixture
def config(make_config) -> ml_collections.ConfigDict:
    """A config of `make_config` for one test."""
    return make_config()


@pytest.fixture
def mount_tmpfs(tmp_path):
    """Returns a function that mounts a tmpfs, given options such as "size=2m", on a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options: str) -> pathlib.Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("file systems cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["gcsfs", "tensorflow"])
def bucket(request, monkeypatch):
    """URL of a bucket in `BucketStore`, which etils reaches as gcsfs or through TensorFlow."""
    system = BucketStore()
    for protocol in BucketStore.protocol:
        monkeypatch.setitem(_registry, protocol, BucketStore)
    through_tensorflow = request.param == "tensorflow"
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: through_tensorflow)
    gfile = types.SimpleNamespace(GFile=system.open, exists=system.exists)
    monkeypatch.setattr(backend._TfBackend, "gfile", gfile)
    find_system = backend.fsspec_backend._get_filesystem
    find_system.cache_clear()
    yield "gs://bucket"
    find_system.cache_clear()
    BucketStore.reset()
