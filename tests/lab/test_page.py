"""The laboratory's published report, from the result files."""

import re

from benchmarks.lab import page, statistics, verdicts
from benchmarks.record import RESULTS


def test_the_published_page_is_that_of_the_result_files(monkeypatch):
    """But for the column of resampled intervals, which takes minutes and stands in no verdict."""
    monkeypatch.setattr(statistics, "bootstrap_interval", lambda _: None)
    results = verdicts.read_results(RESULTS / "lab")
    outdated = len(list((RESULTS / "lab").glob("*.json"))) - len(results)
    found = page.format_page(verdicts.judge(results), results, outdated)
    published = (RESULTS.parents[1] / "docs" / "experiments.md").read_text("utf-8")
    interval = r"[+-]\S+ to [+-]\S+ \|"
    assert found == re.sub(rf"({interval}) {interval}", r"\1  |", published)
