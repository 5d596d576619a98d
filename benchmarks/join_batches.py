"""Times joining a host's batch: in new memory, in reused memory, and one batch ahead.

    python -m benchmarks.join_batches

Decoded sub-batches of 256 images of 224 px are copied into batches, alternately

  * `new`: into a new allocation, when the batch is requested, as it was done before;
  * `reused`: into memory that was returned;
  * `ahead`: by `diht_jax.input.in_flight.Joiner`, which starts when the previous batch is taken,
    while the devices work on that (here, the consumer sleeps for --step_secs).

Reports gigabytes per second of the joins, and how long a step waits for its batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags

from benchmarks.record import write_result
from diht_jax import command_line
from diht_jax.input.in_flight import BatchMemory, Joiner, join_parts

_ROWS, _SIDE = 256, 224


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_integer("parts", 16, "Sub-batches of a batch, 39 MB each.")
    flags.DEFINE_integer("batches", 4, "Batches of a round and way.")
    flags.DEFINE_integer("rounds", 3, "Rounds in turn; the medians count.")
    flags.DEFINE_float("step_secs", 0.5, "That the consumer of a batch takes.")


def main() -> None:
    """Measures, prints, and writes `benchmarks/results/join_batches.json`."""
    given = flags.FLAGS
    part = {
        "images": np.random.default_rng(0).integers(0, 256, (_ROWS, _SIDE, _SIDE, 3), np.uint8),
        "tokens": np.zeros((_ROWS, 77), np.int32),
    }
    batch_bytes = given.parts * sum(array.nbytes for array in part.values())
    memory, joiner = BatchMemory(), Joiner(lambda: part, given.parts)
    ways: dict[str, Callable[[], Any]] = {
        "new": lambda: join_parts(lambda: part, given.parts, BatchMemory()),
        "reused": lambda: join_parts(lambda: part, given.parts, memory),
        "ahead": joiner.take,
    }
    waits: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, take in ways.items():
            waits[name] += measure(take, given.batches, given.step_secs)
    joiner.close()
    medians = {name: statistics.median(secs) for name, secs in waits.items()}
    payload = {
        "batch_bytes": batch_bytes,
        "step_secs": given.step_secs,
        "wait_secs": {name: [round(s, 4) for s in secs] for name, secs in waits.items()},
        "median_wait_secs": {name: round(secs, 4) for name, secs in medians.items()},
        "bytes_per_sec": {name: round(batch_bytes / medians[name]) for name in ("new", "reused")},
        "times_as_fast": round(medians["new"] / medians["reused"], 2),
        "share_of_the_wait": round(medians["ahead"] / medians["new"], 4),
    }
    print(*describe(payload), sep="\n")
    print(write_result("join_batches", payload))


def measure(take: Callable[[], Any], batches: int, step_secs: float) -> list[float]:
    """Returns the seconds waited for each batch, except the first two, which allocate memory."""
    secs = []
    for _ in range(batches + 2):
        start = time.perf_counter()
        batch = take()
        secs.append(time.perf_counter() - start)
        time.sleep(step_secs)
        del batch
    return secs[2:]


def describe(payload: dict[str, Any]) -> Iterator[str]:
    """Formats the result as lines of text."""
    yield f"batches of {payload['batch_bytes'] / 1e9:.2f} GB, steps of {payload['step_secs']:g} s"
    for name, secs in payload["median_wait_secs"].items():
        rate = payload["bytes_per_sec"].get(name)
        yield f"  {name:8s} waits {secs:.3f} s" + (f", {rate / 1e9:.2f} GB/s" if rate else "")
    yield f"used again: {payload['times_as_fast']:.2f} times as fast as new memory"


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
