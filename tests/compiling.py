"""Compilation in tests: flags that make it fast, and a mark for tests of the TPU compiler."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is absent: pip install 'jax[tpu]'",
)

# Test programs run for milliseconds; optimising them would take most of a test's time.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def xla_flags(num_devices: int | None = None) -> str:
    """Returns the value of `XLA_FLAGS`.

    Args:
            num_devices: Number of CPU devices; None for the default of one.
    """
    flags = []
    if num_devices is not None:
        flags.append(f"--xla_force_host_platform_device_count={num_devices}")
    # The older CPU code generator, without an MLIR context for each fusion, halves compile time.
    # XLA aborts a process with a flag that its version does not know.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
        # One LLVM module instead of 32 for parallel code generation: splitting small programs costs
        # a tenth of their compile time.
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
    return " ".join(flags)
