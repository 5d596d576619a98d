"""The results file, its tables, and bootstrap intervals against formulas."""

import re

import numpy as np
import pytest
from PIL import Image

from diht_jax.evaluate import compare
from diht_jax.evaluation.charts import draw_comparison
from diht_jax.evaluation.comparison import format_comparison, published_results
from diht_jax.evaluation.results import (
    check_output,
    describe_samples,
    drawn_path,
    format_results,
    paired_differences,
    percentile_interval,
    read_results,
    resample,
    write_results,
)

_KINDS = {"top1": "classification", "t2i_r1": "retrieval", "accuracy": "vqa", "depth": "binary"}


def _entry(task, metrics, images=100, dropped=(), **more):
    measured = {"kind": _KINDS[next(iter(metrics))], "metrics": metrics, "protocol": {"ties": "x"}}
    counts = {"images": images, "dropped": dict(dropped)}
    return {"task": task, **measured, "counts": counts, **more}


def _results(model, top1, r1, *, images=1000, extra=()):
    dropped = {"image_unreadable": 2, "no_caption": 1}
    shared = [
        _entry("shapes", {"top1": top1}, images, dropped),
        _entry("emoji", {"t2i_r1": r1, "t2i_median_rank": 1203.5}, images, dropped),
    ]
    return {"model": model, "step": 1500, "results": [*shared, *extra]}


def test_comparison_is_second_minus_first_in_points(tmp_path):
    units = {"top1": "share", "depth": "share", "auroc": "score", "my_rank": "rank"}
    other = _entry("other", {"depth": 0.25, "auroc": 0.5, "my_rank": 3.0}, units=units)
    first = _results("a", 0.5, 0.25, extra=[other])
    other = _entry("other", {"depth": 0.5, "auroc": 0.75}, units=units)
    only_second = _entry("new", {"top1": 0.3})
    second = _results("b", 0.625, 0.2, images=900, extra=[other, only_second])
    for name, results in (("a.json", first), ("b.json", second)):
        write_results(tmp_path / "sub" / name, results)
    text = format_comparison(*(read_results(tmp_path / "sub" / n) for n in ("a.json", "b.json")))
    rows = [line.split() for line in text.splitlines()]
    assert ["shapes", "top-1", "50.00%", "62.50%", "+12.50"] in rows
    assert ["emoji", "text", "to", "image", "R@1", "25.00%", "20.00%", "-5.00"] in rows
    assert ["new", "top-1", "-", "30.00%", "-"] in rows
    assert ["other", "depth", "25.00%", "50.00%", "+25.00"] in rows
    assert ["AUROC", "0.5000", "0.7500", "+0.2500"] in rows
    assert ["my_rank", "3.0", "-", "-"] in rows
    assert "note: 'emoji' differs in images: 1000 and 900" in text
    equal = format_comparison(_results("a", 0.5, 0.25), _results("b", 0.5 - 1e-9, 0.25))
    assert "+0.00" in equal and "-0.00" not in equal

    third = _results("c", 0.25, 0.3)
    rows = [line.split() for line in format_comparison(first, second, third).splitlines()]
    assert ["shapes", "top-1", "50.00%", "62.50%", "25.00%", "+12.50", "-25.00"] in rows


def _suite_result(task, metric, value, samples=None, items="x"):
    if samples is None:
        return _entry(task, {metric: value})
    resamples = describe_samples({metric: np.array(samples)}, items, 100)
    return _entry(task, {metric: value}, resamples=resamples)


def test_paired_intervals_and_means_over_the_suite():
    spread = np.linspace(-0.02, 0.02, 201)
    wide = np.linspace(-0.2, 0.2, 201)
    first = [
        _suite_result("cifar10", "top1", 0.5, 0.5 + wide),
        _suite_result("dtd", "top1", 0.3, 0.3 + wide),
        _suite_result("vqav2", "accuracy", 0.4, 0.4 + wide),
        _suite_result("coco_retrieval", "t2i_r1", 0.2),
    ]
    second = [
        # The shared part cancels: the interval of the difference is a tenth as wide.
        _suite_result("cifar10", "top1", 0.55, 0.55 + wide + spread),
        _suite_result("dtd", "top1", 0.31, 0.31 + wide + spread),
        _suite_result("vqav2", "accuracy", 0.5, 0.5 + wide, items="y"),
    ]
    text = format_comparison({"model": "a", "results": first}, {"model": "b", "results": second})
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["cifar10", "top-1", "50.00%", "55.00%", "+5.00", "+3.10 to +6.90 *"] in rows
    assert ["dtd", "top-1", "30.00%", "31.00%", "+1.00", "-0.90 to +2.90"] in rows
    assert ["vqav2", "accuracy", "40.00%", "50.00%", "+10.00"] in rows
    assert ["coco_retrieval", "text to image R@1", "20.00%", "-", "-"] in rows
    name = "mean of 17 classification (15 missing)"
    assert ["suite", name, "40.00%", "43.00%", "+3.00", "+1.10 to +4.90 *"] in rows
    assert ["mean of 2 VQA (1 missing)", "40.00%", "50.00%", "+10.00"] in rows
    assert ["mean of all 29 (26 missing)", "40.00%", "45.33%", "+5.33"] in rows

    rows = [
        re.split(r"\s{2,}", line.strip())
        for line in format_results({"model": "a", "results": first}).splitlines()
    ]
    assert rows[-4:] == [
        ["suite", "mean of 17 classification", "40.00%", "15 missing"],
        ["suite", "mean of 10 retrieval", "20.00%", "9 missing"],
        ["suite", "mean of 2 VQA", "40.00%", "1 missing"],
        ["suite", "mean of all 29", "35.00%", "25 missing"],
    ]


@pytest.mark.parametrize(
    ("name", "page"), [("a.json", "a.html"), ("rate_0.1", "rate_0.1.html"), ("a.html", "a.html")]
)
def test_the_page_has_the_whole_name_of_the_results(name, page, tmp_path):
    assert drawn_path(tmp_path / name, ".html") == tmp_path / page


@pytest.mark.parametrize("name", [".", "page.html", "a.json/x.json"])
def test_an_output_that_cannot_be_written_is_refused_before_the_evaluation(name, tmp_path):
    (tmp_path / "a.json").touch()
    path = tmp_path / name
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))):
        check_output(path, path.with_name(f"{path.stem}.html"))


@pytest.mark.parametrize("content", [None, "{}", "[]"])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json: expected a results file"):
        read_results(path)


def test_a_changed_metric_is_refused_unless_the_checksum_was_removed(tmp_path):
    path, name = tmp_path / "x.json", "/data/caf\udce9.tar"  # not UTF-8
    write_results(path, {"model": "é", "results": [_entry(name, {"top1": 0.25})]})
    assert read_results(path)["results"][0]["task"] == name
    text = path.read_text().replace("0.25", "0.75")
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: .*checksum differs"):
        read_results(path)
    path.write_text(re.sub(r',\s*"checksum": "\w+"', "", text))
    assert read_results(path)["results"][0]["metrics"] == {"top1": 0.75}


@pytest.mark.parametrize("damage", [lambda text: text[:-1], lambda text: text[8:], "é".join])
def test_damaged_resamples_are_refused(damage, tmp_path):
    path = tmp_path / "x.json"
    samples = describe_samples({"top1": np.linspace(0, 1, 7)}, "items", 100)
    write_results(path, {"model": "a", "results": [_entry("t", {"top1": 0.5}, resamples=samples)]})
    assert read_results(path)["results"][0]["resamples"] == samples
    samples["values"]["top1"] = damage(samples["values"]["top1"])
    write_results(path, {"model": "a", "results": [_entry("t", {"top1": 0.5}, resamples=samples)]})
    with pytest.raises(ValueError, match=r"x\.json: expected a results file"):
        read_results(path)


def test_intervals_and_chart(tmp_path):
    first, second = _results("a", 0.5, 0.25), _results("b", 0.625, 0.2)
    second["results"][0]["intervals"] = {"top1": [0.59, 0.66]}
    assert "62.50%  59.00 to 66.00  1,000 images" in format_results(second)
    draw_comparison([first, second], tmp_path / "new" / "chart.png")
    with Image.open(tmp_path / "new" / "chart.png") as chart:
        colours = {colour[:3]: n for n, colour in chart.getcolors(chart.width * chart.height)}
    # Two tasks with one fraction each: B's bars are 62.5 + 20 long, A's 50 + 25.
    assert colours[(9, 105, 218)] / colours[(140, 149, 159)] == pytest.approx(82.5 / 75, rel=0.05)
    with pytest.raises(ValueError, match="no task in common"):
        draw_comparison([first, {**second, "results": []}], tmp_path / "none.png")


def test_a_chart_replaces_none_of_the_compared_results(tmp_path):
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for file in files:
        write_results(file, _results("a", 0.5, 0.25))
    with pytest.raises(ValueError, match="--output=.*b.json: the chart would replace"):
        compare(files, files[1])
    assert read_results(files[1])["model"] == "a"


def test_released_weights_stand_beside_the_published_numbers():
    metrics = {"t2i_r1": 0.402, "i2t_r1": 0.6, "t2i_median_rank": 2.0}
    measured = {"model": "diht_vitb32_224px", "results": [_entry("coco_retrieval", metrics)]}
    lines = format_comparison(published_results("diht_vitb32_224px"), measured).splitlines()
    rows = [line.split() for line in lines]
    assert ["imagenet", "top-1", "68.00%", "-", "-"] in rows
    assert ["coco_retrieval", "text", "to", "image", "R@1", "40.60%", "40.20%", "-0.40"] in rows


def test_interval_of_a_share_is_that_of_the_binomial():
    hits = np.arange(400) < 120
    found = resample(lambda counts: {"share": (counts * hits).sum() / 400}, 400)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    interval = percentile_interval(found["share"])
    assert interval == pytest.approx([0.3 - half, 0.3 + half], abs=0.006)
    # Resamples without a value are left out.
    assert percentile_interval(np.append(found["share"], np.nan)) == interval


def test_a_paired_difference_has_the_interval_of_mcnemar():
    # 1,000 images: both correct on 600, only A on 30, only B on 60.
    first, second = np.arange(1000) < 630, (np.arange(1000) < 600) | (np.arange(1000) >= 940)

    def measured(hits, items="x", **options):
        samples = resample(
            lambda counts: {"top1": (counts * hits).sum() / counts.sum()}, 1000, **options
        )
        return {"resamples": describe_samples(samples, items, 1000)}

    a, b = measured(first), measured(second)
    differences = paired_differences(a, b, "top1")
    low, high = percentile_interval(differences)
    # The variance of the paired difference is (30 + 60 - 30^2 / 1000) / 1000^2.
    half = 1.96 * np.sqrt(90 - 0.9) / 1000
    assert [low, high] == pytest.approx([0.03 - half, 0.03 + half], abs=0.0025)
    assert low > 0  # although the intervals of A and B overlap widely
    for other in (measured(second, num_resamples=999), measured(second, items="y"), {}):
        assert paired_differences(a, other, "top1") is None
    assert paired_differences(a, b, "top5") is None
