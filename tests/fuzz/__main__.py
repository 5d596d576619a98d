"""The command `python -m tests.fuzz`; see the package for what it does.

Exits with 1 where any case fails.
"""

from __future__ import annotations

import argparse
import collections
import sys

from tqdm import tqdm

from tests.fuzz import runner
from tests.fuzz.judge import OUTCOMES
from tests.fuzz.worker import Result


def main() -> int:
    """Runs the cases that the command line names and prints a table."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="how many, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds",
        default=",".join(runner.WEIGHTS),
        help="some kinds or properties, with commas: tars,tables:bad_lines",
    )
    args = parser.parse_args()
    unknown = {job.partition(":")[0] for job in args.kinds.split(",")} - runner.WEIGHTS.keys()
    if unknown:
        parser.error(f"--kinds: expected some of {', '.join(runner.WEIGHTS)}, got {unknown}")
    weights = {job: runner.WEIGHTS.get(job.partition(":")[0], 1) for job in args.kinds.split(",")}
    jobs = runner.share_out(args.cases, weights)
    with tqdm(total=sum(jobs.values()), unit="case", dynamic_ncols=True) as progress:
        results = runner.run(jobs, args.seed, "long", progress.update)
    failures = {name: result.failure for name, result in results.items() if result.failure}
    for name, failure in failures.items():
        print(f"--- {name}\n{failure}")
    print(format_table(results))
    slowest = max(results, key=lambda name: results[name].slowest)
    print(f"seed {args.seed}; slowest case: {results[slowest].slowest:.1f} s in {slowest}")
    return 1 if failures else 0


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
    sys.exit(main())
