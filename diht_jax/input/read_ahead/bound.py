"""Memory of the read-ahead: what the blocks of a host need, and what they may take."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from diht_jax.input.block_order import BlockOrder
from diht_jax.input.in_flight import available_memory, describe_bytes
from diht_jax.input.workers import SHARED_MEMORY

# Blocks whose size is looked at, to know that of all.
_SAMPLED_BLOCKS = 64


@dataclasses.dataclass(frozen=True)
class ReadAheadOptions:
    """The keys of `config.data` for the read-ahead.

    Attributes:
        read_threads: blocks that are requested at the same time.
        cache_dir: folder on a local disk for the blocks; None: shared memory.
        read_ahead_gib: bound of the blocks; None: half of what is free in `cache_dir`; of shared
            memory also at most a quarter of the memory that this process may still take.
        read_timeout_secs: how long a store may fail.
        num_sources: that share the bound.
    """

    read_threads: int = 32
    cache_dir: str | None = None
    read_ahead_gib: float | None = None
    read_timeout_secs: float = 600.0
    num_sources: int = 1

    @property
    def parent(self) -> pathlib.Path:
        """Of the folder with the blocks.

        Raises:
            ValueError: there is no such folder.
        """
        parent = pathlib.Path(self.cache_dir or SHARED_MEMORY)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ValueError(
                f"config.data.cache_dir={self.cache_dir}: {parent} is no folder that can be "
                "written to; expected one on a local disk, for the blocks that are fetched ahead"
            )
        return parent

    def bound_bytes(self) -> int:
        """That the blocks of one source may take."""
        return self._bytes_of_all() // self.num_sources

    def _bytes_of_all(self) -> int:
        if self.read_ahead_gib is not None:
            return int(self.read_ahead_gib * 2**30)
        stats = os.statvfs(self.parent)
        free = stats.f_bavail * stats.f_frsize // 2
        memory = available_memory()
        return free if self.cache_dir or memory is None else min(free, memory // 4)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What the blocks of one host need at most, as a function of the order's keys.

    A stream holds one window of W blocks. Beside these, the blocks are held that the positions
    ahead need from the next windows, and the windows that these positions have begun.

    Attributes:
        block_bytes: of a block, on average.
        num_blocks: of the data set, which is the most that can be needed.
        further_blocks: of the positions ahead.
        batch_size: global.
        process_count: hosts that share the streams.
    """

    block_bytes: float
    num_blocks: int
    further_blocks: int
    batch_size: int
    process_count: int

    def needed_bytes(self, num_streams: int, window_blocks: int) -> int:
        """With V streams and windows of W blocks."""
        windows = -(-num_streams * window_blocks // self.process_count) + window_blocks
        return int(self.block_bytes * min(self.num_blocks, windows + self.further_blocks))

    def check(self, order: BlockOrder, options: ReadAheadOptions) -> None:
        """Compares what is needed with its bound.

        Raises:
            ValueError: it is more; names the keys, and values of them that would fit.
        """
        streams, window = order.num_streams, order.window_blocks
        needed, bound = self.needed_bytes(streams, window), options.bound_bytes()
        if needed <= bound:
            return
        lower = [
            *(f"config.data.num_streams={n}" for n in self._fitting_streams(order, bound)),
            *(f"config.data.window_blocks={n}" for n in self._fitting_windows(order, bound)),
        ]
        n = options.num_sources
        mixes_less = f"{' or '.join(lower)} (which mixes less), " if lower else ""
        raise ValueError(
            f"the blocks that are fetched ahead need {describe_bytes(needed)} on this host "
            f"(config.data.num_streams={streams} over {self.process_count} processes, windows of "
            f"config.data.window_blocks={window} blocks of {describe_bytes(self.block_bytes)}, "
            f"and {self.further_blocks} blocks on their way), but may take {describe_bytes(bound)} "
            f"in {options.parent} (config.data.read_ahead_gib={options.read_ahead_gib}"
            f"{f' for {n} sources' if n > 1 else ''}). Set "
            f"{mixes_less}or config.data.cache_dir to a folder on a local disk with "
            f"{describe_bytes(2 * needed * n)} free, or config.data.read_ahead_gib="
            f"{np.ceil(needed * n / 2**30 * 1000) / 1000:.3f} where there is room for it; on more "
            "hosts each needs less"
        )

    def _fitting_streams(self, order: BlockOrder, bound: int) -> list[int]:
        """The largest smaller number of streams that fits, if one does."""
        counts = (
            count
            for count in range(order.num_streams - 1, 0, -1)
            if self.batch_size % count == 0 and count % self.process_count == 0
        )
        fitting = (c for c in counts if self.needed_bytes(c, order.window_blocks) <= bound)
        return [count for count in [next(fitting, None)] if count is not None]

    def _fitting_windows(self, order: BlockOrder, bound: int) -> list[int]:
        """The largest shorter window that fits, if one does."""
        counts = range(order.window_blocks - 1, 0, -1)
        fitting = (c for c in counts if self.needed_bytes(order.num_streams, c) <= bound)
        return [count for count in [next(fitting, None)] if count is not None]


def measure_footprint(
    source: Any, order: BlockOrder, *, ahead: int, batch_size: int, process_count: int
) -> Footprint:
    """Of the blocks of a source; looks at the sizes of some of them.

    Args:
        source: records with `extent`.
        order: of the run.
        ahead: positions whose blocks are fetched ahead.
        batch_size: global.
        process_count: number of hosts.
    """
    starts = order.block_starts
    num_blocks = len(starts) - 1
    sampled = np.unique(np.linspace(0, num_blocks - 1, _SAMPLED_BLOCKS).astype(int))
    extents = [source.extent(int(starts[b]), int(starts[b + 1])) for b in sampled]
    block_records = order.num_records / num_blocks
    return Footprint(
        block_bytes=sum(end - start for _, start, end in extents) / len(extents),
        num_blocks=num_blocks,
        further_blocks=int(np.ceil(ahead / process_count / block_records)),
        batch_size=batch_size,
        process_count=process_count,
    )
