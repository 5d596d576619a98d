"""How XLA compiles in tests, here and in the processes that tests start: as quickly as it can."""

from __future__ import annotations

import importlib.metadata

# For programs that run for milliseconds: most of a test's time would go into optimising them.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def xla_flags(num_devices: int | None = None) -> str:
    """The value of `XLA_FLAGS`.

    Args:
        num_devices: of the CPU; None for the default, one.
    """
    flags = []
    if num_devices is not None:
        flags.append(f"--xla_force_host_platform_device_count={num_devices}")
    # XLA's older code for the CPU, without an MLIR context for each fusion: compiling takes half
    # the time. A process with a flag that its version does not know ends.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
        # One module for LLVM, not 32 for as many threads: what it costs to divide small programs
        # is a tenth of compiling them.
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
    return " ".join(flags)
