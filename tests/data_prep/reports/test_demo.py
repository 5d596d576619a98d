"""The page of the demo, rendered from a folder like the one that run_demo.sh leaves."""

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
_POINTS = (0.0, 0.0, 0.1, 0.1)  # each student's lead over the first one


def _results(points: float) -> dict:
    """Results with widely spread resamples, in the same way for every student."""
    draws = np.random.default_rng(0).normal(0.5, 0.1, 200) + points
    results = {}
    for task, metric in demo.METRICS:
        result = results.setdefault(task, {"task": task, "metrics": {}, "intervals": {}})
        result["metrics"][metric] = 0.5 + points
        result["intervals"][metric] = [0.4 + points, 0.6 + points]
        result.setdefault("samples", {})[metric] = draws
    for result in results.values():
        result["resamples"] = describe_samples(result.pop("samples"), "same", 9)
    return {"results": list(results.values())}


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A filtered folder of two pairs, and the results and pictures of four students."""
    rows = [{"image": "i.png", "caption": caption} for caption in _CAPTIONS]
    source = write_table(tmp_path, rows, {"i.png": encoded(plain("red"))})
    assert run_filter(job_config(source, tmp_path / "filtered", "cat")) == {}
    for name, points in zip(demo.STUDENTS, _POINTS, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "curves.png").write_bytes(encoded(plain("blue")))
        (tmp_path / f"{name}.json").write_text(json.dumps(_results(points)))
    (tmp_path / f"{list(demo.STUDENTS)[-1]}.html").write_text("<p>Examples</p>")
    return tmp_path


def test_the_page_shows_everything_without_links(folder):
    page = demo.render_demo(folder, demo.read_report(folder / "filtered"))
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) == {"data:"}
    assert page.count("<img") == len(_CAPTIONS) + len(demo.STUDENTS)
    assert 'srcdoc="&lt;p&gt;Examples' in page
    assert "a man riding a horse &lt;b&gt;&amp; more" in page and "no action" in page
    # Differences are paired with the row above: the common spread cancels.
    changes = re.findall(r'class="(\w*)">([+-][\d.]+) \((.+?) to (.+?)\)', page)
    unchanged, better = ("", "+0.0", "+0.0", "+0.0"), ("beyond", "+10.0", "+10.0", "+10.0")
    columns = len(demo.METRICS)
    assert changes == [unchanged] * columns + [better] * columns + [unchanged] * columns
