"""The table of device peaks, looked up by the names that JAX reports."""

import pytest

from diht_jax.hardware.chips import CHIPS, find_chip, peak_flops


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 2307 / 2),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("v5e", 197),
    ],
)
def test_peak_of_known_kinds(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "NVIDIA GeForce GTX 1080", "", "TPU v5 lite+"])
def test_unknown_kinds_have_no_peak(kind):
    assert peak_flops(kind) is None


def test_the_memory_of_variants_differs():
    assert find_chip("NVIDIA A100-SXM4-40GB").hbm_bytes == 40 * 2**30
    assert find_chip("NVIDIA A100-SXM4-80GB").hbm_bytes == 80 * 2**30


def test_names_are_unique_and_rows_complete():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        # No device computes less than 10 or more than 1000 operations per byte it can read.
        assert 10 < chip.peak_flops / chip.hbm_bytes_per_sec < 1000
