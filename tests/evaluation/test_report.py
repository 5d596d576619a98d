"""The results file and its tables."""

import pytest

from diht_jax.evaluation.report import (
    format_comparison,
    format_results,
    read_results,
    write_results,
)


def _results(model, top1, r1, *, images=1000, extra=()):
    def result(task, metrics):
        counts = {"images": images, "dropped": {"image_unreadable": 2, "no_caption": 1}}
        return {"task": task, "metrics": metrics, "counts": counts, "protocol": {"ties": "x"}}

    shared = [
        result("shapes", {"top1": top1}),
        result("emoji", {"t2i_r1": r1, "t2i_median_rank": 1203.5}),
    ]
    return {"model": model, "step": 1500, "results": [*shared, *extra]}


def test_table_of_one_result():
    lines = format_results(_results("runs/a", 0.51235, 0.1)).splitlines()
    assert lines[0] == "runs/a, step 1,500"
    cells = [line.split("  ") for line in lines[3:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    assert cells == [
        ["shapes", "top-1", "51.23%", "1,000 images, 3 dropped"],
        ["emoji", "text to image R@1", "10.00%", "1,000 images, 3 dropped"],
        ["text to image median rank", "1,203.5"],
    ]


def test_comparison_is_second_minus_first_in_points(tmp_path):
    only_second = {
        "task": "new",
        "metrics": {"top1": 0.3},
        "counts": {"images": 5, "dropped": {}},
        "protocol": {},
    }
    first = _results("a", 0.5, 0.25)
    second = _results("b", 0.625, 0.2, images=900, extra=[only_second])
    for name, results in (("a.json", first), ("b.json", second)):
        write_results(tmp_path / "sub" / name, results)
    text = format_comparison(*(read_results(tmp_path / "sub" / n) for n in ("a.json", "b.json")))
    rows = [line.split() for line in text.splitlines()]
    assert ["A:", "a,", "step", "1,500"] in rows
    assert ["shapes", "top-1", "50.00%", "62.50%", "+12.50"] in rows
    assert ["emoji", "text", "to", "image", "R@1", "25.00%", "20.00%", "-5.00"] in rows
    assert ["new", "top-1", "-", "30.00%", "-"] in rows
    assert "note: 'emoji' differs in images: 1000 and 900" in text
    assert "differs in ties" not in text


@pytest.mark.parametrize("content", [None, "", "{}", '{"results": [{}]}', "[]"])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json: expected a results file"):
        read_results(path)
