"""The least time of a compiled program that runs one instruction after the other.

XLA runs a device's instructions in order: a LayerNorm does not run under the next product. Each
takes the longest of its memory traffic, its products and, for a TPU's own kernels, its cycles; only
what the program itself starts and waits for later (copies, collectives) goes on under what stands
between. Copies take the memory's time that those instructions leave, collectives the links'.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from diht_jax.hardware.hlo_traffic import Collective, Work


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peak rates of a device, in a second."""

    hbm_bytes: float  # read from or written to memory
    cycles: float  # of a TPU's core; 0 for other devices
    flops: float  # of matrix products
    float32_flops: float  # of those of float32 numbers in full precision
    collective_secs: Callable[[Collective], float]  # of one collective, latency included


def scheduled_secs(work: Iterable[Work], rates: Rates) -> dict[str, float]:
    """Seconds that the program takes at least, by the `kind` of `Work`, largest first."""
    timeline = _Timeline(rates)
    timeline.run(work)
    return dict(timeline.secs.most_common())


class _Timeline:
    """Runs the work of one computation once."""

    def __init__(self, rates: Rates):
        self._rates = rates
        self.secs: Any = collections.Counter()  # by kind; fractions, which its type does not know
        # Time in which memory, or the links, were free for what goes on besides.
        self.free = {"copies": 0.0, "collectives": 0.0}
        # What goes on, in order, with the seconds that it still needs.
        self._pending: dict[str, dict[str, float]] = {"copies": {}, "collectives": {}}

    def run(self, work: Iterable[Work]) -> None:
        """Adds the seconds of some work."""
        for item in work:
            if item.body:
                self._run_loop(item)
            elif item.waits_for is not None:
                self._wait(item.waits_for)
            elif item.starts is not None:
                channel = "collectives" if item.collective else "copies"
                self._pending[channel][item.starts] = self._transfer_secs(item)
            elif item.collective:
                secs = self._transfer_secs(item)
                self._spend(item.kind, secs, busy={"collectives": secs})
            else:
                memory = item.memory_bytes / self._rates.hbm_bytes
                self._spend(item.kind, max(memory, self._core_secs(item)), busy={"copies": memory})

    def _run_loop(self, loop: Work) -> None:
        trip = _Timeline(self._rates)
        trip.run(loop.body)
        secs = loop.trips * trip.secs.total()
        busy = {name: secs - loop.trips * free for name, free in trip.free.items()}
        for kind, part in trip.secs.items():
            self.secs[kind] += loop.trips * part
        self._let_go_on(secs, busy)

    def _wait(self, name: str) -> None:
        for channel, pending in self._pending.items():
            if name in pending:
                names = list(pending)
                before = names[: names.index(name) + 1]
                secs = sum(pending.pop(earlier) for earlier in before)
                self._spend(channel, secs, busy={channel: secs})

    def _spend(self, kind: str, secs: float, busy: dict[str, float]) -> None:
        self.secs[kind] += secs
        self._let_go_on(secs, busy)

    def _let_go_on(self, secs: float, busy: dict[str, float]) -> None:
        for channel, pending in self._pending.items():
            free = max(0.0, secs - busy.get(channel, 0.0))
            for name in pending:
                used = min(free, pending[name])
                pending[name] -= used
                free -= used
            self.free[channel] += free

    def _transfer_secs(self, item: Work) -> float:
        memory = item.memory_bytes / self._rates.hbm_bytes
        if item.collective is None:
            return memory
        return max(memory, self._rates.collective_secs(item.collective))

    def _core_secs(self, item: Work) -> float:
        if self._rates.cycles:
            return item.cycles / self._rates.cycles
        return item.flops / self._rates.flops + item.float32_flops / self._rates.float32_flops
