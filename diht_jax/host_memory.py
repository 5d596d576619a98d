"""How the C library treats freed memory, for programs that compute on the CPU.

Called by `diht_jax.train` and by the CPU benchmark, before JAX is imported.
"""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def computes_on_cpu() -> bool:
    """Whether JAX was told to take the CPU; nothing is imported to find out."""
    return os.environ.get("JAX_PLATFORMS") == "cpu"


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, for its next allocation.

    XLA allocates the temporaries of a step as one block and frees it at the step's end. glibc maps
    so large a block anew each time, and the kernel clears every page of it at its first use: for
    ViT-B/32 at batch 32, 3.5 GB and a tenth of the step. A process that trains needs the same
    block a moment later.

    All threads share one arena, since others cannot hold such blocks; so this is not for programs
    whose own threads allocate a lot beside an accelerator.

    Nothing happens where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        mallopt(name, value)
