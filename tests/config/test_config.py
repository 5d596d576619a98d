"""Validation of configs, durations, and the recipes of `configs/`."""

import sys

import jax
import pytest
from flax.traverse_util import flatten_dict

from diht_jax.config import default_config, load_recipe
from diht_jax.models import get_architecture
from diht_jax.sharding import create_mesh
from diht_jax.training.program import TrainProgram, check_micro_batch
from diht_jax.training.recipe import check_config, duration_in_steps
from tests.make import RECIPES, REPOSITORY, REQUIRED_ARGUMENTS
from tests.test_sharding import gpu_hosts


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_and_validates(path):
    config = load_recipe(path, REQUIRED_ARGUMENTS.get(path.stem, ""))
    check_config(config)
    get_architecture(config.model.name, config.model.overrides.to_dict())
    steps = duration_in_steps(config, "total", num_examples=10_000)
    assert config.optimizer.warmup_steps < steps


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_debug_form_is_small_and_starts_on_one_device(path):
    config = load_recipe(path, "debug=True")
    check_config(config)
    steps = duration_in_steps(config, "total", num_examples=10_000)
    assert config.optimizer.warmup_steps < steps <= 4 and config.data.batch_size <= 16
    assert TrainProgram(config, steps, jax.devices()[:1]).mesh.size == 1


def test_a_recipe_loads_outside_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(REPOSITORY)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    assert load_recipe(REPOSITORY / "configs" / "emoji.py").total_epochs == 40.0


def values(name, arg=""):
    """Returns the values of a recipe's keys by their dotted names."""
    config = load_recipe(REPOSITORY / "configs" / f"{name}.py", arg).to_dict()
    return flatten_dict(config, sep=".")


def differences(a, b):
    """Returns the names of the keys in which two configs differ."""
    return {key for key in a.keys() | b.keys() if a[key] != b[key]}


@pytest.mark.parametrize("topology", ["h100:8", "h100:64x8", "a100_80gb:2x4"])
@pytest.mark.parametrize(
    "name",
    ["clip_vitb32", "clip_vitb16", "diht_vitb32", "diht_vitb16", "diht_vitl14", "diht_vitl14_336"],
)
def test_recipe_for_gpus(name, topology):
    config = load_recipe(REPOSITORY / "configs" / f"{name}.py", f"topology={topology}")
    check_config(config)
    num_hosts, gpus_per_host = (1, *map(int, topology.partition(":")[2].split("x")))[-2:]
    mesh = create_mesh(config.mesh.data, config.mesh.fsdp, gpu_hosts(num_hosts, gpus_per_host))
    assert mesh.size == num_hosts * gpus_per_host and config.mesh.fsdp <= 8
    for group in mesh.devices:
        assert len({device.slice_index for device in group}) == 1
    assert config.data.batch_size == (33792 if name == "clip_vitb16" else 65536)
    check_micro_batch(config.micro_batch, config.data.batch_size, mesh.size)
    # Limits: examples for which all activations fit into an 80 GB GPU (pod_fit_gpus.json).
    at_once = (config.micro_batch or config.data.batch_size) // mesh.size
    assert at_once <= {"b32": 1024, "b16": 512, "l14": 128, "336": 128}[name[-3:]]
    how = {"micro_batch", "model.remat", "model.scan_layers", "mesh.fsdp", "topology"}
    assert differences(values(name, f"topology={topology}"), values(name)) <= how


# For each architecture, a machine with room for more and the next smaller one. The last two
# have no settings of their own, so the recipe's settings stay.
@pytest.mark.parametrize(
    ("name", "topology", "remat", "scan_layers"),
    [
        ("clip_vitb32", "v6e:16x16", "none", False),
        ("diht_vitb16", "v4:4x8x8", "none", False),
        ("diht_vitb16", "v4:4x4x8", "minimal", False),
        ("diht_vitl14", "v5p:4x4x8", "minimal", False),
        ("diht_vitl14", "v5p:4x4x4", "full", False),
        ("diht_vitl14_336", "v5p:4x8x8", "minimal", False),
        ("diht_vitl14_336", "v5p:4x4x8", "full", False),
        ("diht_vitl14", "v6e:16x16", "full", False),
        ("diht_vitb16", "a100:8", "minimal", False),
    ],
)
def test_larger_tpus_keep_what_fits(name, topology, remat, scan_layers):
    other, own = values(name, f"topology={topology}"), values(name)
    assert (other["model.remat"], other["model.scan_layers"]) == (remat, scan_layers)
    assert differences(other, own) <= {"model.remat", "model.scan_layers", "topology"}


@pytest.mark.parametrize("arg", ["", "debug=True", "topology=v5p:4x4x4", "topology=h100:8"])
def test_clip_vitb32_differs_from_diht_vitb32_in_the_loss_alone(arg):
    clip, diht = values("clip_vitb32", arg), values("diht_vitb32", arg)
    assert differences(clip, diht) == {
        "loss.beta",
        "concepts.object_weight",
        "concepts.attribute_weight",
    }
    assert clip["loss.alpha"] == 1.0 and clip["loss.beta"] == 0.0
    assert clip["concepts.object_weight"] == clip["concepts.attribute_weight"] == 0.0


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("debug=Tru", "'debug=Tru': expected True or False"),
        ("debug=True,toplogy=v5e:2x2", "'toplogy=v5e:2x2': .*did you mean 'topology'"),
        ("topology=h10:8", "unknown topology 'h10:8'; did you mean 'h100:...'?"),
    ],
)
def test_recipe_refuses_another_argument(arg, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(REPOSITORY / "configs" / "diht_vitb32.py", arg)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"total_steps": 7}, 7),
        ({"total_examples": 640}, 10),
        ({"total_epochs": 2.5}, 39),
        ({}, "set exactly one of"),
        ({"total_steps": 3, "total_epochs": 1.0}, "set exactly one of"),
        ({"total_examples": 10}, "at least one step"),
    ],
)
def test_durations(values, expected):
    config = default_config()
    config.data.batch_size = 64
    config.update(values)
    if isinstance(expected, int):
        assert duration_in_steps(config, "total", num_examples=1000) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            duration_in_steps(config, "total", num_examples=1000)
