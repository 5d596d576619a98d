"""The laboratory's report, from result files that are made up with known differences."""

import json
import re

import numpy as np
import pytest

from benchmarks.lab import page, statistics, verdicts
from benchmarks.lab.experiments import (
    CONTRASTS,
    EXPERIMENTS,
    STUDENTS,
)
from benchmarks.lab.measure import pack_bits
from benchmarks.lab.run import Run, definition
from benchmarks.record import RESULTS

SEEDS = {"raw": 8, "cat": 8, "random": 3, "only_c": 2, "cat_beta_025": 8}
SHARE = {"raw": 0.40, "cat": 0.50, "random": 0.495, "only_c": 0.45, "cat_beta_025": 0.5}
ITEMS = 2000


def write(folder, name, seed, share, **changes):
    """A result whose metric is `share` exactly, as both directions' mean."""
    run = Run(EXPERIMENTS[name], seed)
    rng = np.random.default_rng(seed)
    hits = [rng.permutation(ITEMS) < round(share * ITEMS) for _ in range(2)]
    metric = STUDENTS[run.experiment.student].metric
    beside = dict.fromkeys(("scenes/t2i_r1", "scenes/i2t_r1", "color/top1", "shape/top1"), 0.25)
    result = {
        "experiment": {"name": name},
        "definition": definition(run),
        "revision": "0123456789",
        "date_utc": "2026-11-26T18:00:00+00:00",
        "machine": {"cores": 2, "cpu": "abacus"},
        "metrics": {**beside, metric: float(np.mean(hits))},
        "items": {metric: [pack_bits(each) for each in hits]},
        **changes,
    }
    (folder / f"{run.name}.json").write_text(json.dumps(result))


def find(rows, treated, control):
    return next(r for r in rows if (r.contrast.treated, r.contrast.control) == (treated, control))


def test_known_differences_get_their_verdicts(tmp_path):
    for name, seeds in SEEDS.items():
        for seed in range(seeds):
            # Equal seeds share what moves a run; contrasts differ by a little more.
            share = SHARE[name] + 0.01 * seed + 0.002 * (seed % 2) * (name > "d")
            write(tmp_path, name, seed, share)
    write(tmp_path, "oracle", 0, 0.9, definition="of another recipe")
    results = verdicts.read_results(tmp_path)
    rows = verdicts.judge(results)
    assert len(rows) == len(CONTRASTS) and len(results) == sum(SEEDS.values())
    gain = find(rows, "cat", "raw")
    assert gain.verdict == "confirmed" and gain.seeds == 8 and gain.corrected < 0.05
    assert gain.found.mean == pytest.approx(0.1 - 0.001)
    low, high = gain.found.resampled
    assert low < gain.found.mean < high
    # Half a point where two are the margin; and no difference at all.
    assert find(rows, "cat", "random").verdict == "refuted"
    assert find(rows, "cat_beta_025", "cat").verdict == "refuted"
    # Two of three seeds are no verdict, and a result of another definition is no run.
    some = find(rows, "only_c", "raw")
    assert (some.verdict, some.seeds, some.corrected) == ("waiting", 2, None)
    assert find(rows, "oracle", "cat").found is None


def test_the_published_page_is_that_of_the_result_files(monkeypatch):
    """But for the column of resampled intervals, which takes minutes and stands in no verdict."""
    monkeypatch.setattr(statistics, "bootstrap_interval", lambda _: None)
    results = verdicts.read_results(RESULTS / "lab")
    outdated = len(list((RESULTS / "lab").glob("*.json"))) - len(results)
    found = page.format_page(verdicts.judge(results), results, outdated)
    published = (RESULTS.parents[1] / "docs" / "experiments.md").read_text("utf-8")
    interval = r"[+-]\S+ to [+-]\S+ \|"
    assert found == re.sub(rf"({interval}) {interval}", r"\1  |", published)
