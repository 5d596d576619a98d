"""The laboratory's report, from result files that are made up with known differences."""

import json
import xml.etree.ElementTree

import numpy as np
import pytest

from benchmarks.lab import page, statistics, verdicts
from benchmarks.lab.experiments import (
    CONTRASTS,
    CUT_SIZES,
    EXPERIMENTS,
    SHOTS,
    STUDENTS,
)
from benchmarks.lab.figures import draw_contrasts
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


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for name, seeds in SEEDS.items():
        for seed in range(seeds):
            # Equal seeds share what moves a run; contrasts differ by a little more.
            write(folder, name, seed, SHARE[name] + 0.01 * seed + 0.002 * (seed % 2) * (name > "d"))
    write(folder, "oracle", 0, 0.9, definition="of another recipe")
    results = verdicts.read_results(folder)
    rows = verdicts.judge(results)
    return rows, results


def find(rows, treated, control):
    return next(r for r in rows if (r.contrast.treated, r.contrast.control) == (treated, control))


def test_known_differences_get_their_verdicts(judged):
    rows, results = judged
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


def test_figures_are_svg_with_a_dot_for_each_run(judged):
    rows, _ = judged
    drawn = [(r.contrast, r.found, r.verdict) for r in rows if r.found]
    svg = draw_contrasts(drawn, "a < b")
    root = xml.etree.ElementTree.fromstring(svg)
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == sum(len(found.differences) + 1 for _, found, _ in drawn)
    _, _, width, height = map(float, root.get("viewBox").split())
    for circle in circles:
        assert 0 < float(circle.get("cx")) < width and 0 < float(circle.get("cy")) < height


def test_every_block_can_be_shown(tmp_path):
    shots = {f"{m}_{k}": 0.5 for m in ("prompts", "scratch", "penalty") for k in SHOTS}
    metrics = {"emoji/t2i_r1": 0.1, "emoji/i2t_r1": 0.1, "zero_shot": 0.4, **shots}
    composed = [f"swap_{what}" for what in ("color", "shape", "objects")] + ["replacements"]
    metrics |= {f"composition/{name}": 0.5 for name in composed}
    photos = ["averaged_cifar10/top1", "cifar10/top1"]
    metrics |= dict.fromkeys(photos, 0.3)
    cut = [*(f"scenes_{size}/r10" for size in CUT_SIZES), "averaged_scenes/r10"]
    metrics |= dict.fromkeys([*cut, "scenes/r10"], 0.2)
    for number, name in enumerate(EXPERIMENTS):
        write(tmp_path, name, 0, 0.3 + 0.001 * number)
        path = tmp_path / f"{name}_seed0.json"
        result = json.loads(path.read_text())
        result["metrics"] |= {k: v for k, v in metrics.items() if k not in result["metrics"]}
        others = ("zero_shot", "composition/replacements", *shots)
        result["items"] |= {k: [[0.4, 0.6]] for k in others}
        result["items"] = {k: [[0.4, 0.6]] for k in photos} | result["items"]
        items = result["items"].get("scenes/r10") or result["items"].get("long/r10")
        result["items"] |= dict.fromkeys([*cut, "scenes/r10"], items)
        path.write_text(json.dumps(result))
    results = verdicts.read_results(tmp_path)
    rows = verdicts.judge(results)
    assert all(row.found is not None and row.seeds == 1 for row in rows)
    text = page.format_page(rows, results, 0)
    assert "has not been run yet" not in text and "| one run |" in text
    few_shot = text.partition("## Few-shot")[2].partition("\n## ")[0]
    assert "| 64 | 50.0% | 50.0% | 50.0% |" in few_shot and "Zero-shot: 40.0%." in few_shot
    grid = text.partition("## Hyper-parameters\n")[2].partition("\n## ")[0]
    best = [name for name in EXPERIMENTS if name.startswith("grid_")][-1]
    assert grid.count("\n| `grid_") == 10 and grid.index(best) == grid.index("`grid_") + 1


def test_the_published_verdicts_are_those_of_the_result_files(monkeypatch):
    monkeypatch.setattr(statistics, "bootstrap_interval", lambda _: None)  # stands in no verdict
    rows = verdicts.judge(verdicts.read_results(RESULTS / "lab"))
    published = (RESULTS.parents[1] / "docs" / "experiments.md").read_text("utf-8")
    assert page._format_verdicts(rows) in published
