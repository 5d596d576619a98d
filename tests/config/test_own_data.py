"""The recipe for own pairs has valid settings for any number of pairs on any machine."""

import jax
import pytest

from configs import common
from diht_jax.config import load_recipe
from diht_jax.input.order import count_streams
from diht_jax.sharding import create_mesh
from diht_jax.training.program import check_micro_batch
from diht_jax.training.recipe import check_config, duration_in_steps
from tests import make

RECIPE = make.REPOSITORY / "configs" / "own_data.py"
PAIRS = (12, 951, 3_786, 100_000, 1_000_000, 10_000_000)
MACHINES = {
    "laptop": common.Machine(),
    "small GPU": common.Machine(True, 1, 8.0),
    "three GPUs": common.Machine(True, 3, 24.0),
    "node": common.Machine(True, 8, 80.0),
}


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_settings_fit_each_other_and_the_machine(machine, pairs, monkeypatch):
    devices = MACHINES[machine]
    monkeypatch.setattr(common, "find_machine", lambda topology: devices)
    config = load_recipe(RECIPE, f"pairs={pairs}")
    check_config(config)
    count = devices.num_devices
    create_mesh(config.mesh.data, config.mesh.fsdp, jax.devices()[:count])
    assert config.data.batch_size % count == 0
    check_micro_batch(config.micro_batch, config.data.batch_size, count)
    assert config.data.batch_size % count_streams(config.data) == 0  # raises if it does not divide
    trained = pairs * (1 - config.data.validation_share)
    assert config.data.batch_size < trained
    assert pairs - trained == pytest.approx(min(pairs / 10, 5_000))
    steps = duration_in_steps(config, "total", num_examples=round(trained))
    assert config.optimizer.warmup_steps < steps / 5
    # Only a saved step can be kept as the best of about ten evaluations.
    assert config.evaluation.every_steps % config.checkpoint.every_steps == 0
    assert 8 <= steps // config.evaluation.every_steps <= 15


def test_larger_sets_get_larger_models_where_there_is_an_accelerator(monkeypatch):
    def models(machine):
        monkeypatch.setattr(common, "find_machine", lambda topology: MACHINES[machine])
        return [load_recipe(RECIPE, f"pairs={pairs}").model.name for pairs in PAIRS]

    assert models("laptop") == ["small_64px"] * 6
    assert models("node") == ["small_64px"] * 4 + ["diht_vitb32_224px", "diht_vitb16_224px"]


def test_the_number_of_pairs_is_that_of_the_data(tmp_path, monkeypatch):
    folder = make.write_records(tmp_path / "pairs", 30, lengths=[10, 20])
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_recipe(RECIPE, "data=~/pairs")
    assert config.data.train == str(folder)
    expected = load_recipe(RECIPE, "pairs=30")
    expected.data.train = str(folder)
    assert config.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("arg", "named"),
    [
        ("", "own_data:data="),
        ("data=nowhere", "'data=nowhere': no record shard"),
        ("data=empty", "'data=empty': expected at least one pair, found 0"),
        ("pairs=-3", "'pairs=-3': expected at least one pair, found -3"),
        ("pairs=1000,topology=rtx4090:1", "'topology=rtx4090:1': unknown topology"),
    ],
)
def test_missing_data_and_wrong_machines_are_named_as_they_are_typed(
    arg, named, tmp_path, monkeypatch
):
    (tmp_path / "empty").mkdir()
    make.write_shard(tmp_path / "empty" / "none.tfrecord", [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"recipe argument .*{named}"):
        load_recipe(RECIPE, arg)


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, (True, 3, 8.0)), ("0,1", (True, 2, 80.0))]
)
def test_gpus_are_counted_before_jax_looks(visible, expected, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        "printf '81920\\n81559\\n'\n"
        "case \"$*\" in *--id=0,1*) ;; *) printf '8192\\n';; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = common.find_machine(None)
    assert (found.has_accelerator, found.num_devices, found.device_gib) == expected
