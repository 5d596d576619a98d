"""The command `python -m tests.fuzz`; see the package for what it does.

Exits with 1 where any case fails.
"""

from __future__ import annotations

import argparse
import sys
import time

from tqdm import tqdm

from tests.fuzz.cases import OUTCOMES
from tests.fuzz.runner import WEIGHTS, Summary, run, share_out


def main() -> int:
    """Runs the cases that the command line names and prints a table."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="how many, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(WEIGHTS), help="some of them, with commas")
    parser.add_argument("--only", help="one case, such as tars:17")
    args = parser.parse_args()
    if args.only:
        kind, number = args.only.split(":")
        jobs = {kind: range(int(number), int(number) + 1)}
    else:
        counts = share_out(args.cases, {kind: WEIGHTS[kind] for kind in args.kinds.split(",")})
        jobs = {kind: range(count) for kind, count in counts.items()}
    start = time.perf_counter()
    with tqdm(total=sum(map(len, jobs.values())), unit="case", dynamic_ncols=True) as progress:
        summary = run(jobs, args.seed, progress)
    for name, mutation, failure in summary.failures:
        print(f"--- {name} ({mutation})\n{failure}")
    print(_format(summary))
    secs, name = summary.slowest
    print(
        f"seed {args.seed}, {time.perf_counter() - start:.0f} s; slowest: {name} with {secs:.1f} s"
    )
    return 1 if summary.failures else 0


def _format(summary: Summary) -> str:
    columns = (*OUTCOMES, "failed")
    lines = [f"{'kind':14}" + "".join(f"{name:>9}" for name in (*columns, "seconds"))]
    counts = dict(summary.outcomes)
    for name, _, _ in summary.failures:
        key = name.partition(":")[0], "failed"
        counts[key] = counts.get(key, 0) + 1
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    for kind in kinds:
        row = "".join(f"{counts.get((kind, c), 0):9}" for c in columns)
        lines.append(f"{kind:14}{row}{summary.secs[kind]:9.1f}")
    totals = [sum(counts.get((kind, c), 0) for kind in kinds) for c in columns]
    lines.append(f"{'all':14}" + "".join(f"{total:9}" for total in totals))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
