"""What parts decide on an accelerator that is not there: batches, profiles, rows of the table."""

import gzip
import json
import types

import jax
import pytest

from benchmarks.first_hour import steps, table
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


def test_the_longest_operations_are_those_of_the_devices(tmp_path):
    names = {1: "/device:GPU:0 NVIDIA", 2: "/host:CPU"}
    events = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        for pid, name in names.items()
    ]
    for pid, name, micros in (
        (1, "gemm", 3e6),
        (1, "softmax", 1e6),
        (1, "gemm", 2e6),
        (2, "x", 9e6),
    ):
        events.append({"ph": "X", "pid": pid, "name": name, "dur": micros})
    path = tmp_path / "perfetto_trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert steps._longest(path, "gpu") == [
        {"name": "gemm", "secs": 5.0},
        {"name": "softmax", "secs": 1.0},
    ]
    assert steps._longest(path, "cpu") == [{"name": "x", "secs": 9.0}]


def test_a_profiler_that_fails_is_recorded(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("no permission for CUPTI")

    monkeypatch.setattr(jax.profiler, "trace", fail)
    found = steps._profile(lambda: None, Setting("cpu", True, str(tmp_path)), "x")
    assert found["files"] == [] and "CUPTI" in found["error"]


def test_a_kernel_in_bfloat16_is_as_far_from_float32_as_its_digits():
    tower = TowerAttention(9, 2, 8, causal=True, dtype="bfloat16", kernel="xla")
    found = compare_tower(tower, 3, {"rounds": 1, "calls": 1})["of_xla"]
    assert found["same_bits_twice"] and set(found["difference"]) == {
        "value", "q_gradient", "k_gradient", "v_gradient",
    }  # fmt: skip
    assert all(1e-4 < value < 2e-2 for value in found["difference"].values())


def test_a_row_of_kernels_shows_the_worst_number_and_other_bits():
    def measured(difference, same):
        return {"difference": {"value": difference, "q_gradient": 1e-3}, "same_bits_twice": same,
                "secs": 0.002}  # fmt: skip

    tower = {"kernel": "cudnn", "of_cudnn": measured("inf", False), "of_xla": measured(3e-3, True)}
    entry = {"status": "done", "secs": 1, "towers": {"text": tower}}
    text = table._describe("kernels_l14", entry)
    assert "cudnn 2 ms" in text and "off by inf" in text and "OTHER BITS" in text
