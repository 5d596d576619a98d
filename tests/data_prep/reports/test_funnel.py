"""The funnel: parts make the whole, and the table for a terminal."""

import json
import pathlib
import re

from data_prep.reports.funnel import Funnel, stage_reasons


def _fill(funnel: Funnel, numbers) -> Funnel:
    for i in numbers:
        if i % 3:
            funnel.keep(f"k{i}", f"caption {i}", "PNG")
        else:
            funnel.drop("caption", "no_action", f"k{i}", f"caption {i}")
    return funnel


def test_funnel_of_parts_is_that_of_the_whole():
    whole = _fill(Funnel(5, seed=1), range(100)).to_json()
    merged = Funnel(5, seed=1)
    for part in (range(70, 100), range(3), range(3, 70)):
        stored = json.loads(json.dumps(_fill(Funnel(5, seed=1), part).to_json()))
        merged.merge(Funnel.from_json(stored, 5, 1))
    assert json.loads(json.dumps(merged.to_json())) == json.loads(json.dumps(whole))
    assert (whole["read"], whole["kept"]) == (100, 66)
    assert whole["dropped"]["caption"] == {"no_action": 34}
    assert [len(samples) for samples in whole["samples"].values()] == [5, 5]
    assert whole["samples"] != _fill(Funnel(5, seed=2), range(100)).to_json()["samples"]


def test_funnel_table():
    funnel = Funnel()
    for i in range(1200):
        funnel.drop("image", "unreadable", str(i), "")
    funnel.drop("caption", "url", "u", "")
    funnel.keep("k", "", "JPEG")
    assert funnel.format_table().splitlines() == [
        "stage    reason     pairs   share",
        "read                1,202  100.0%",
        "caption  url            1    0.1%",
        "image    unreadable 1,200   99.8%",
        "kept                    1    0.1%",
    ]


def test_the_guide_lists_the_reasons_of_all_steps():
    guide = pathlib.Path(__file__).resolve().parents[3] / "docs" / "filter.md"
    rows = re.findall(r"^\| (\w+) \| (`.*`) \|$", guide.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {stage: re.findall(r"`(\w+)`", reasons) for stage, reasons in rows}
    known = {stage: list(reasons) for stage, reasons in stage_reasons().items()}
    assert {stage: listed.get(stage) for stage in known} == known
