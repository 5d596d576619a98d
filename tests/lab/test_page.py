"""The laboratory's published pages, from the result files."""

import json
import re

import numpy as np
import pytest
import scipy.stats

from benchmarks.lab import page, verdicts
from benchmarks.lab.experiments import (
    CONTRASTS,
    EXPERIMENTS,
    PRIMARY,
    SECONDARY,
    key_of,
    metrics_of,
)
from benchmarks.record import RESULTS

PAGES = RESULTS.parents[1] / "docs" / "experiments"
CLAIMS = [contrast for contrast in CONTRASTS if key_of(contrast) in (*PRIMARY, *SECONDARY)]


def test_the_published_pages_are_those_of_the_result_files():
    results = verdicts.read_results(RESULTS / "lab")
    outdated = len(list((RESULTS / "lab").glob("*.json"))) - len(results)
    found = page.format_pages(verdicts.judge(results), results, outdated)
    assert found == {path.name: path.read_text("utf-8") for path in PAGES.glob("*.md")}


@pytest.mark.parametrize("contrast", CLAIMS, ids=lambda contrast: "-".join(key_of(contrast)))
def test_a_claim_is_recomputed_from_the_files(contrast):
    """By scipy, from the JSON files themselves: nothing of the laboratory's statistics."""
    arms = [
        {
            path.stem.rpartition("_seed")[2]: json.loads(path.read_text())["metrics"][metric]
            for path in (RESULTS / "lab").glob(f"{name}_seed*.json")
        }
        for name, metric in zip(
            (contrast.treated, contrast.control), metrics_of(contrast), strict=True
        )
    ]
    same_data = EXPERIMENTS[contrast.treated].data == EXPERIMENTS[contrast.control].data
    if same_data or contrast.block == "drawn":
        arms = [[arm[seed] for seed in sorted(arms[0]) if seed in arms[1]] for arm in arms]
        truth = scipy.stats.ttest_rel(*arms)
    else:
        arms = [list(arm.values()) for arm in arms]
        truth = scipy.stats.ttest_ind(*arms, equal_var=False)
    interval = truth.confidence_interval(0.95)
    [row] = [
        line
        for line in (PAGES / "index.md").read_text("utf-8").splitlines()
        if f": {contrast.claim} |" in line
    ]
    difference, low, high = map(float, re.findall(r"[+-]\d+\.\d", row)[:3])
    assert difference == pytest.approx(100 * (np.mean(arms[0]) - np.mean(arms[1])), abs=0.051)
    assert low <= 100 * interval.low + 0.051
    assert high >= 100 * interval.high - 0.051
    assert f"| {len(arms[0])} and {len(arms[1])} |" in row
