"""What the parts choose on a simulated accelerator: batches, profiles, rows of the table."""

import shlex
import types

import jax
import pytest

from benchmarks.first_hour import loop, steps
from benchmarks.first_hour.kernels import compare_tower
from benchmarks.first_hour.plan import Setting
from diht_jax.models.attention import TowerAttention

GIB = 2**30


@pytest.mark.parametrize("memory_gib, at_once", [(80, 512), (140, 512), (40, 256), (24, 128)])
def test_a_gpu_takes_as_many_examples_as_its_memory_is_meant_for(monkeypatch, memory_gib, at_once):
    stats = {"bytes_limit": int(0.75 * memory_gib * GIB)}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    for micro_batches in (1, 2):
        config = steps.recipe_config(Setting("gpu", False, ""), "diht_vitb16", micro_batches)
        assert config.data.batch_size == micro_batches * at_once * jax.device_count()
        assert config.micro_batch == (None, at_once * jax.device_count())[micro_batches - 1]
        assert config.model.remat == "none" and config.model.dtype == "bfloat16"


def test_a_kernel_in_bfloat16_is_as_far_from_float32_as_its_digits():
    tower = TowerAttention(9, 2, 8, causal=True, dtype="bfloat16", kernel="xla")
    found = compare_tower(tower, 3, {"rounds": 1, "calls": 1})["of_xla"]
    assert found["same_bits_twice"] and set(found["difference"]) == {
        "value", "q_gradient", "k_gradient", "v_gradient",
    }  # fmt: skip
    assert {n: value for n, value in found["difference"].items() if not 1e-4 < value < 2e-2} == {}


def test_the_runs_on_a_gpu_share_their_choice_of_kernels_in_any_folder(monkeypatch, tmp_path):
    seen = []

    def run(command, env, **_):
        seen.extend(shlex.split(env["XLA_FLAGS"]))  # as XLA parses it
        raise InterruptedError

    monkeypatch.setattr(loop.subprocess, "run", run)
    with pytest.raises(InterruptedError):
        loop.stop_and_resume(Setting("gpu", True, str(tmp_path / "my output")), "diht_vitb16")
    kept = tmp_path / "my output" / "loop" / "autotuned"
    assert kept.is_dir() and f"--xla_gpu_per_fusion_autotune_cache_dir={kept}" in seen
