"""Runs `diht_jax.train`, which sends itself a SIGTERM when the metrics of STEP are written.

    python -m benchmarks.first_hour.stopped_train STEP --config RECIPE --workdir DIR

With STEP 0, no signal is sent.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from diht_jax.training.monitoring.metrics import MetricWriter


def main() -> None:
    """Takes STEP from the command line, and runs the command with the rest."""
    stop_at, write = int(sys.argv.pop(1)), MetricWriter.write

    def write_and_stop(self: MetricWriter, step: int, scalars: dict[str, float]) -> None:
        write(self, step, scalars)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    MetricWriter.write = write_and_stop
    runpy.run_module("diht_jax.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
