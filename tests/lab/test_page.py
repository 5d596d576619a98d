"""The laboratory's published pages, checked against the result files."""

import base64
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


def read_items(results, metric):
    """Returns each run's results on the test items, from the bits in its file: float [items]."""
    runs = []
    for result in results:
        lists = [
            packed
            if isinstance(packed, list)
            else np.unpackbits(
                np.frombuffer(base64.b64decode(packed["bits"]), np.uint8), count=packed["count"]
            )
            for packed in result["items"][metric]
        ]
        runs.append(np.mean(np.asarray(lists, float), axis=0))
        assert runs[-1].mean() == pytest.approx(result["metrics"][metric], abs=1e-6)
    return runs


def resample(treated, control, paired, own_items):
    """Bootstraps differences of means over runs and items, in a plain loop."""
    rng = np.random.default_rng(20)
    means = []
    for _ in range(400):
        runs = rng.integers(len(treated), size=len(treated))
        others = runs if paired else rng.integers(len(control), size=len(control))
        if own_items:
            drawn = [
                (treated[run] - control[run])[
                    rng.integers(len(treated[run]), size=len(treated[run]))
                ]
                for run in runs
            ]
            means.append(np.mean([each.mean() for each in drawn]))
        else:
            items = rng.integers(len(treated[0]), size=len(treated[0]))
            ours = np.mean([treated[run][items].mean() for run in runs])
            means.append(ours - np.mean([control[run][items].mean() for run in others]))
    return means


def judge(low, high, margin):
    """Returns the label of an interval that does not end at 0."""
    if low <= 0 <= high:
        return "none within the margin" if max(-low, high) < margin else "undecided"
    near, far, word = (low, high, "gain") if low > 0 else (-high, -low, "harm")
    if near >= margin:
        return f"{word} of at least the margin"
    return f"{word}, smaller than the margin" if far < margin else word


@pytest.mark.parametrize("contrast", CLAIMS, ids=lambda contrast: "-".join(key_of(contrast)))
def test_a_claim_is_recomputed_from_the_files(contrast):
    """Uses numpy, scipy and the bits in the files, and none of the laboratory's statistics."""
    metrics = metrics_of(contrast)
    arms = [
        {
            path.stem.rpartition("_seed")[2]: json.loads(path.read_text())
            for path in (RESULTS / "lab").glob(f"{name}_seed*.json")
        }
        for name in (contrast.treated, contrast.control)
    ]
    same_data = EXPERIMENTS[contrast.treated].data == EXPERIMENTS[contrast.control].data
    paired = same_data or contrast.block == "drawn"
    if paired:
        arms = [[arm[seed] for seed in sorted(arms[0]) if seed in arms[1]] for arm in arms]
    else:
        arms = [list(arm.values()) for arm in arms]
    items = [read_items(arm, metric) for arm, metric in zip(arms, metrics, strict=True)]
    means = [[each.mean() for each in arm] for arm in items]
    if paired:
        truth = scipy.stats.ttest_rel(*means)
    else:
        truth = scipy.stats.ttest_ind(*means, equal_var=False)
    t = truth.confidence_interval(0.95)
    drawn = resample(*items, paired, EXPERIMENTS[contrast.treated].student == "concepts")
    ends = min(t.low, np.percentile(drawn, 2.5)), max(t.high, np.percentile(drawn, 97.5))

    [row] = [
        line
        for line in (PAGES / "index.md").read_text("utf-8").splitlines()
        if f": {contrast.claim} |" in line
    ]
    difference, low, high = map(float, re.findall(r"[+-]\d+\.\d", row)[:3])
    assert difference == pytest.approx(100 * (np.mean(means[0]) - np.mean(means[1])), abs=0.051)
    # The resamples differ from the laboratory's: their ends differ by a few percent of the width.
    slack = 0.051 + 0.1 * (high - low)
    assert low == pytest.approx(100 * ends[0], abs=slack) and low <= 100 * t.low + 0.051
    assert high == pytest.approx(100 * ends[1], abs=slack) and high >= 100 * t.high - 0.051
    assert f"| {len(arms[0])} and {len(arms[1])} |" in row
    margin = 100 * contrast.margin  # ends on the page are rounded
    labels = {judge(low, high, margin + rounding) for rounding in (-0.051, 0.051)}
    assert row.split(" | ")[-1].removesuffix(" |").removesuffix(", not after correction") in labels


def test_the_numbers_of_the_readme_are_those_of_the_pages():
    readme = (PAGES.parents[1] / "README.md").read_text("utf-8")
    [table] = re.findall(r"\| part \| gain .*?\n\n", readme, re.DOTALL)
    index = (PAGES / "index.md").read_text("utf-8")
    gains = re.findall(r"\| ([\d.]+) \(([\d.]+) to ([\d.]+)\)", table)
    assert len(gains) == 3
    for gain in gains:
        assert "| +{} | +{} to +{} |".format(*gain) in index
    for other in ("-21.3", "-7.0", "10.3"):
        assert other in table and f"{other} (" in index
