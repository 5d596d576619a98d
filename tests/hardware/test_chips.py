"""The table of device peaks, looked up by the names that JAX reports."""

import pytest

from diht_jax.hardware.chips import peak_flops


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU7x", 2307 / 2),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("v5e", 197),
    ],
)
def test_peak_of_known_kinds(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "NVIDIA GeForce GTX 1080", "", "TPU v5 lite+"])
def test_unknown_kinds_have_no_peak(kind):
    assert peak_flops(kind) is None
