"""The demo's page, from a folder as run_demo.sh leaves it."""

import json
import pathlib
import re

import numpy as np
import pytest

from data_prep.filter import run_filter
from data_prep.reports import demo
from diht_jax.evaluation.results import describe_samples
from tests.data_prep.filtering.jobs import job_config, write_table
from tests.make import encoded, plain

_CAPTIONS = ("a man riding a horse <b>& more</b>", "a red car")  # kept, and dropped: no action


def _results(shift: float) -> dict:
    rng = np.random.default_rng(0)
    results = {}
    for task, metric in demo.METRICS:
        result = results.setdefault(
            task, {"task": task, "metrics": {}, "intervals": {}, "counts": {"images": 9}}
        )
        draws = rng.normal(0.5, 0.1, 200)
        result["metrics"][metric] = 0.5 + shift
        result["intervals"][metric] = [0.4 + shift, 0.6 + shift]
        samples = result.setdefault("samples", {})
        samples[metric] = draws + shift + 0.02 * rng.normal(size=200)
    for result in results.values():
        result["resamples"] = describe_samples(result.pop("samples"), "same", 9)
    return {"results": list(results.values())}


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Two pairs, four students that differ by 0, 10 and 0 points, and their pictures."""
    rows = [{"image": "i.png", "caption": caption} for caption in _CAPTIONS]
    source = write_table(tmp_path, rows, {"i.png": encoded(plain("red"))})
    config = job_config(source, tmp_path / "filtered", "cat")
    assert run_filter(config) == {}
    for name, shift in zip(demo.STUDENTS, (0.0, 0.0, 0.1, 0.1), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "curves.png").write_bytes(encoded(plain("blue")))
        (tmp_path / f"{name}.json").write_text(json.dumps(_results(shift)))
    (tmp_path / f"{list(demo.STUDENTS)[-1]}.html").write_text("<p>Examples</p>")
    return tmp_path


def test_the_page_shows_everything_without_links(folder):
    page = demo.render_demo(folder, demo.read_report(folder / "filtered"))
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) == {"data:"}
    assert page.count("<img") == len(_CAPTIONS) + len(demo.STUDENTS)
    assert 'srcdoc="&lt;p&gt;Examples' in page
    assert "a man riding a horse &lt;b&gt;&amp; more" in page and "no action" in page
    for title in demo.STUDENTS.values():
        assert title in page


def test_differences_are_to_the_row_above_with_paired_intervals(folder):
    """Resamples of one draw differ by the noise of 0.028 alone, though each spreads by 0.1."""
    results = {n: demo._read_results(folder / f"{n}.json") for n in demo.STUDENTS}
    rows = [cells[1:] for cells in demo._describe_differences(results)]
    cell = re.compile(r'class="(\w*)">([+-][\d.]+) \((.+?) to (.+?)\)')
    changes = [[cell.search(text).groups() for text in row] for row in rows]
    assert [{change for _, change, _, _ in row} for row in changes] == [
        {"+0.0"},
        {"+10.0"},
        {"+0.0"},
    ]
    assert {css for css, *_ in changes[1]} == {"beyond"} and {css for css, *_ in changes[0]} == {""}
    for _, _, low, high in changes[1]:
        assert float(low) == pytest.approx(10, abs=0.1) == pytest.approx(float(high), abs=0.1)
