"""The laboratory's published report, from the result files."""

import re

from benchmarks.lab import page, statistics, verdicts
from benchmarks.lab.experiments import BLOCKS
from benchmarks.record import RESULTS


def test_the_published_pages_are_those_of_the_result_files(monkeypatch):
    """But for the column of resampled intervals, which takes minutes and stands in no verdict."""
    monkeypatch.setattr(statistics, "bootstrap_interval", lambda _: None)
    results = verdicts.read_results(RESULTS / "lab")
    outdated = len(list((RESULTS / "lab").glob("*.json"))) - len(results)
    found = page.format_pages(verdicts.judge(results), results, outdated)
    folder = RESULTS.parents[1] / "docs" / "experiments"
    interval = r"[+-]\S+ to [+-]\S+ \|"
    published = {
        path.name: re.sub(rf"({interval}) {interval}", r"\1  |", path.read_text("utf-8"))
        for path in folder.glob("*.md")
    }
    assert found == published


def test_every_block_is_on_one_page():
    on_pages = [block for _, blocks in page.PAGES.values() for block in blocks]
    assert sorted(on_pages) == sorted(BLOCKS)
