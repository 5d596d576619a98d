"""The command `python -m tests.fuzz`; the package's docstring explains it.

Exits with 1 if any case fails.
"""

from __future__ import annotations

import collections
import sys

from absl import flags
from tqdm import tqdm

from diht_jax import command_line
from tests.fuzz import runner
from tests.fuzz.judge import OUTCOMES


def define_flags() -> None:
    """Defines the flags of `main`."""
    flags.DEFINE_integer("cases", 2000, "Cases, over all kinds.")
    flags.DEFINE_integer("seed", 0, "Of the cases; the same seed gives the same ones.")
    flags.DEFINE_list(
        "kinds", list(runner.WEIGHTS), "Some kinds or properties: tars,tables:bad_lines."
    )


def main() -> None:
    """Runs the cases that the command line selects, and prints a table."""
    given = flags.FLAGS
    unknown = {job.partition(":")[0] for job in given.kinds} - runner.WEIGHTS.keys()
    if unknown:
        raise ValueError(
            f"--kinds={','.join(given.kinds)}: expected some of {', '.join(runner.WEIGHTS)}"
        )
    weights = {job: runner.WEIGHTS.get(job.partition(":")[0], 1) for job in given.kinds}
    jobs = runner.share_out(given.cases, weights)
    with tqdm(total=sum(jobs.values()), unit="case", dynamic_ncols=True) as progress:
        results = runner.run(jobs, given.seed, "long", progress.update)
    print(f"{'property':44}" + "".join(f"{name:>9}" for name in OUTCOMES))
    totals: collections.Counter = collections.Counter()
    for name, result in results.items():
        totals.update(result.outcomes)
        counts = "".join(f"{result.outcomes[outcome]:9}" for outcome in OUTCOMES)
        print(f"{name:44}{counts}")
    print(f"{f'all, seed {given.seed}':44}" + "".join(f"{totals[name]:9}" for name in OUTCOMES))
    failures = {name: result.failure for name, result in results.items() if result.failure}
    for name, failure in failures.items():
        print(f"--- {name}\n{failure}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
