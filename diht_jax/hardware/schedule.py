"""Lower bound on the time of a compiled program whose instructions run in sequence.

XLA runs a device's instructions in order: a LayerNorm does not overlap with the next product. The
time of an instruction is the maximum of its memory traffic, its products and, for a TPU (Mosaic)
kernel, its cycles. Only asynchronous operations (copies, collectives) overlap with the instructions
between their start and end, in the memory or link bandwidth that these leave free.

A TPU kernel that waits for its products or for the vector units takes longer than its traffic and
FLOPs. Optimised HLO does not contain its time, but the compiler can dump each kernel's instruction
bundles, of which a core issues one a cycle. Bundles are multiplied by the trip counts of their
loops, and all branches count as taken. Stalls for memory are not included.
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import functools
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from typing import Any

from diht_jax.hardware.chips import Chip
from diht_jax.hardware.hlo_traffic import Collective, Work

_LABELS = "final_bundles|deduplication-map"
_LINE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:([A-Z]{2}))?\s*:\s*(>*)\s*(>*)\s*(\{.*)$")
_EXIT_TEST = re.compile(r"%(p\d+)_p\d+ = scmp\.ge\.s32\.totalorder %s\d+_s\d+, (\d+)")
_BACK = re.compile(r"sbr\.rel \(!%(p\d+)_p\d+\)")


def scheduled_secs(
    work: Iterable[Work], chip: Chip, collective_secs: Callable[[Collective], float]
) -> dict[str, float]:
    """Returns the least seconds of a program by the `kind` of `Work`, largest first.

    Args:
        collective_secs: returns the seconds of one collective, including latency.
    """
    timeline = _Timeline(chip, collective_secs)
    timeline.run(work)
    return dict(timeline.secs.most_common())


class _Timeline:
    """Simulates one execution of a computation."""

    def __init__(self, chip: Chip, collective_secs: Callable[[Collective], float]):
        self._chip, self._collective_secs = chip, collective_secs
        self.secs: Any = collections.Counter()  # by kind; Any, because a Counter's type is int
        # Seconds for which the memory or the links were idle.
        self.free = {"copies": 0.0, "collectives": 0.0}
        # Asynchronous operations in flight, in order, with their remaining seconds.
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
                memory = item.memory_bytes / self._chip.hbm_bytes_per_sec
                self._spend(item.kind, max(memory, self._core_secs(item)), busy={"copies": memory})

    def _run_loop(self, loop: Work) -> None:
        trip = _Timeline(self._chip, self._collective_secs)
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
        memory = item.memory_bytes / self._chip.hbm_bytes_per_sec
        if item.collective is None:
            return memory
        return max(memory, self._collective_secs(item.collective))

    def _core_secs(self, item: Work) -> float:
        chip = self._chip
        if chip.clock_hz:
            return item.cycles / chip.clock_hz
        float32_secs = item.float32_flops / (chip.float32_flops or chip.peak_flops)
        return item.flops / chip.peak_flops + float32_secs


@functools.cache
def request_dump() -> pathlib.Path | None:
    """Makes the TPU compiler dump instruction bundles, and returns the folder of the dump.

    Must be called before libtpu is loaded, because it reads its flags only then. Returns None if
    the user's `LIBTPU_INIT_ARGS` already request a dump.
    """
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "xla_jf_dump" in given:
        return None
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tpu_kernels_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = (
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        f"--xla_jf_dump_llo_pass_label_regex={_LABELS}",
    )
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *flags]).strip()
    return folder


def read_kernels(names: Collection[str]) -> dict[str, int]:
    """Returns the cycles of kernels of the last compiled program by name; empties the dump."""
    folder = request_dump() if names else None
    if folder is None:
        return {}
    cycles = read_cycles(folder, names)
    for path in folder.iterdir():
        path.unlink()
    return cycles


def read_cycles(folder: pathlib.Path, names: Collection[str]) -> dict[str, int]:
    """Returns the cycles of the kernels with these names that are known from a dump."""
    written = {}
    for path in folder.glob("*-final_bundles.txt"):
        found = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
        if found:
            written[found.group(1)] = path
    same_as = {}
    for path in folder.glob("*-deduplication-map.txt"):
        same_as |= _read_same(path.read_text())
    cycles = {}
    for name in names:
        path = written.get(name) or written.get(same_as.get(name, ""))
        counted = count_cycles(path.read_text()) if path else None
        if counted is not None:
            cycles[name] = counted
    return cycles


def _read_same(text: str) -> dict[str, str]:
    """Maps each deduplicated instruction to the equal one that was compiled."""
    same, compiled = {}, ""
    for line in text.splitlines():
        if line.startswith("key:"):
            compiled = line.removeprefix("key:")
        elif line.startswith("  "):
            same[line.strip()] = compiled
    return same


@dataclasses.dataclass
class _Loop:
    """Bundles of a loop's body, with inner loops multiplied by their trip counts."""

    depth: int
    cycles: int = 0
    trips: int | None = None
    grid: int | None = None
    left: bool = False


def count_cycles(text: str) -> int | None:
    """Counts the bundles that one run of a kernel issues, from the text of its `final_bundles`.

    The trip count of a loop comes from its exit test, but is at most the number of windows of its
    copies: a pipelined loop has two more iterations, for the first copy in and the last copy out.

    Returns:
        The cycles, or None if the trip count of a loop is unknown.
    """
    loops, tests = [_Loop(0)], {}
    for line in text.splitlines():
        windows = re.match(r"iteration_bounds: \(([\d, ]+)\)", line)
        if windows:
            loops[-1].grid = math.prod(map(int, windows.group(1).split(",")))
        found = _LINE.match(line)
        if not found:
            continue
        label, depth, bundle = found.group(1), len(found.group(2) + found.group(3)), found.group(4)
        is_empty = bundle.startswith("{}")
        while loops[-1].left and depth < loops[-1].depth and not is_empty:
            if not _close(loops):
                return None
        if label == "LB":
            while loops[-1].depth >= depth:
                if not _close(loops):
                    return None
            loops.append(_Loop(depth))
        loops[-1].cycles += 1
        tests |= {name: int(bound) for name, bound in _EXIT_TEST.findall(bundle)}
        back = _BACK.search(bundle)
        if back and len(loops) > 1 and back.group(1) in tests:
            loops[-1].left, loops[-1].trips = True, tests[back.group(1)]
    while len(loops) > 1:
        if not _close(loops):
            return None
    return loops[0].cycles


def _close(loops: list[_Loop]) -> bool:
    """Adds the innermost loop to the enclosing one; returns False if its trips are unknown."""
    inner = loops.pop()
    if inner.trips is None or not loops:
        return False
    loops[-1].cycles += inner.cycles * min(inner.trips, inner.grid or inner.trips)
    return True
