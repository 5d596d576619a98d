"""The command `python -m tests.fuzz`; see the package for what it does.

Exits with 1 where any case fails.
"""

from __future__ import annotations

import collections
import sys

from absl import flags
from tqdm import tqdm

from diht_jax import command_line
from tests.fuzz import runner
from tests.fuzz.judge import OUTCOMES
from tests.fuzz.worker import Result


def define_flags() -> None:
    """The command line of `main`."""
    flags.DEFINE_integer("cases", 2000, "Cases, over all kinds.")
    flags.DEFINE_integer("seed", 0, "Of the cases; the same seed gives the same ones.")
    flags.DEFINE_list(
        "kinds", list(runner.WEIGHTS), "Some kinds or properties: tars,tables:bad_lines."
    )


def main() -> None:
    """Runs the cases that the command line names and prints a table."""
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
    failures = {name: result.failure for name, result in results.items() if result.failure}
    for name, failure in failures.items():
        print(f"--- {name}\n{failure}")
    print(format_table(results))
    slowest = max(results, key=lambda name: results[name].slowest)
    print(f"seed {given.seed}; slowest case: {results[slowest].slowest:.1f} s in {slowest}")
    sys.exit(1 if failures else 0)


def format_table(results: dict[str, Result]) -> str:
    """Cases by outcome, failed properties and seconds, by kind."""
    rows: dict[str, collections.Counter] = {"all": collections.Counter()}
    for name, result in results.items():
        counts = collections.Counter(result.outcomes)
        counts.update(failed=bool(result.failure), seconds=result.secs)
        for row in (name.partition(":")[0], "all"):
            rows.setdefault(row, collections.Counter()).update(counts)
    lines = [f"{'kind':14}" + "".join(f"{name:>9}" for name in (*OUTCOMES, "failed", "seconds"))]
    for row in [*(row for row in rows if row != "all"), "all"]:
        counts = "".join(f"{rows[row][name]:9}" for name in (*OUTCOMES, "failed"))
        lines.append(f"{row:14}{counts}{rows[row]['seconds']:9.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
