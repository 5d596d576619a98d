"""The report: numbers against a hand-made table, merged parts, and scores of the filters."""

import importlib.metadata
import json
import pathlib

import pytest

from data_prep.decisions.log import choose_samples
from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from data_prep.reports.__main__ import merge_reports
from data_prep.reports.page import table_rows, write_report
from tests import make
from tests.data_prep.filtering.jobs import job_config, write_table
from tests.docs.commands import run_commands

_ROWS = [
    ("A black cat is chasing a small brown bird", "good"),
    ("a man riding a horse", "good"),
    ("a red car <b>& more</b>", "good"),
    ("sunset", "bad"),
    ("IMG_2041.JPG", "bad"),
    ("a boy throws a red ball", "bad"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> pathlib.Path:
    """`whole`: all rows in one shard; `parts`: the same rows in shards of two."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"image": "i.jpg", "caption": text, "quality": kind} for text, kind in _ROWS]
    picture = make.encoded(make.plain("red", (300, 90)), "JPEG")
    source = write_table(folder / "in", rows, {"i.jpg": picture})
    for output, rows_per_shard in (("whole", 100), ("parts", 2)):
        config = job_config(source, folder / output, "cat", source__rows_per_shard=rows_per_shard)
        config.update({"label_field": "quality", "clean_label": "good"})
        assert run_filter(config) == {}
    return folder


def test_numbers_are_those_of_the_pairs(work):
    data = json.loads((work / "whole" / "report.json").read_text())
    assert data["funnel"] == [
        {"stage": "read", "reason": "", "pairs": 6, "share": 1.0},
        *(
            {"stage": "caption", "reason": reason, "pairs": 1, "share": 1 / 6}
            for reason in ("file_name", "complexity", "no_action")
        ),
        {"stage": "kept", "reason": "", "pairs": 3, "share": 0.5},
    ]
    histograms = data["measures"]["histograms"]
    assert histograms["complexity"] == {
        "dropped": {"0": 1, "1": 1},
        "kept": {"1": 1, "2": 1, "3": 1},
    }
    assert histograms["actions"] == {"dropped": {"0": 2}, "kept": {"1": 3}}
    assert histograms["image_side"] == {"dropped": {}, "kept": {"64": 3}}  # 90 px
    assert histograms["caption_words"] == {
        "dropped": {"0": 2, "4": 1}, "kept": {"4": 1, "6": 1, "8": 1}
    }  # fmt: skip
    assert data["measures"]["names"]["actions"] == {
        "kept": {"chase": 1, "ride": 1, "throw": 1}, "dropped": {}
    }  # fmt: skip
    assert data["measures"]["names"]["objects"]["dropped"]["sunset"] == 1
    assert data["measures"]["labels"]["kept"] == {"bad": 1, "good": 2}
    assert {"captions", "images", "reading", "writing"} < data["throughput"].keys()
    assert data["jobs"][0]["settings"]["label_field"] == "quality"
    assert data["jobs"][0]["shards"] == 1


def test_parts_make_the_whole(work):
    whole, parts = (
        json.loads((work / name / "report.json").read_text()) for name in ("whole", "parts")
    )
    for name in ("funnel", "measures"):
        assert parts[name] == whole[name]
    samples = [[s["outcome"], s["key"], s["graph"], s["image"]] for s in whole["samples"]]
    assert [[s["outcome"], s["key"], s["graph"], s["image"]] for s in parts["samples"]] == samples
    assert len(samples) == 6
    # Jobs are merged like shards.
    both = merge_reports([work / "whole", work / "parts"])
    assert (both["counts"]["read"], both["counts"]["kept"], len(both["jobs"])) == (12, 6, 2)
    assert both["measures"]["histograms"]["complexity"]["kept"] == {"1": 2, "2": 2, "3": 2}
    for name in ("spacy", "pillow"):
        assert both["versions"][name] == {importlib.metadata.version(name): 4}  # shards
    (work / "both").mkdir()
    write_report(work / "both", both)
    assert read_report(work / "both") == both
    assert merge_reports([work / "both", work / "whole"])["counts"]["read"] == 18
    with pytest.raises(ValueError, match="report.json: no report of"):
        read_report(work / "in")


def test_another_clean_label_makes_the_report_anew(tmp_path):
    picture = make.encoded(make.plain("red"))
    rows = [{"image": "i.png", "caption": kind, "quality": kind} for kind in ("good", "bad")]
    source = write_table(tmp_path / "in", rows, {"i.png": picture})
    for label in ("clean", "good"):
        config = job_config(source, tmp_path / "out", label_field="quality", clean_label=label)
        assert run_filter(config) == {}
        assert read_report(tmp_path / "out")["clean_label"] == label


def test_samples_of_others_are_left_out_where_none_are_wanted():
    assert choose_samples([b"kept\t00\t{}\n"], 0) == {"kept": []}


def test_captions_on_the_terminal_do_not_steer_it(tmp_path, capsys):
    captions = ["dog \x1b[2J\x07", "cat \u202egnp", "a\n10:00:00 forged"]
    source = make.write_pair_tar(tmp_path / "in.tar", captions)
    assert run_filter(job_config(source, tmp_path / "out")) == {}
    capsys.readouterr()
    run_commands([("data_prep.reports", [f"--input={tmp_path / 'out'}"])])
    shown = capsys.readouterr().out
    assert [letter for letter in set(shown) - {"\n"} if not letter.isprintable()] == []
    samples = {line.split(maxsplit=1)[1] for line in shown.split("\n\n")[1].splitlines()}
    assert samples <= {r"dog \x1b[2J\x07", r"cat \u202egnp", r"a\x0a10:00:00 forged"}
    assert len(samples) == 2


def test_filters_are_scored_against_the_labels():
    labels = {
        "kept": {"clean": 90, "text": 2, "title": 1},
        "text/shows_caption": {"clean": 2, "text": 18},
        "caption/complexity": {"title": 4, "clean": 6},
        "caption/no_action": {"title": 5},
    }
    # Recall counts only pairs that reach a filter: filter A drops 5 of the 6 titles that reach it.
    assert table_rows(labels, "clean") == [
        ["filter", "drops", "precision", "recall: text", "recall: title", "clean lost"],
        ["C: complexity", "10", "40.0%", "0.0%", "40.0%", "6.1%"],  # 6 of 98
        ["A: no action", "5", "100.0%", "0.0%", "83.3%", "0.0%"],
        ["T: shows its caption", "20", "90.0%", "90.0%", "0.0%", "2.2%"],  # 2 of 92
        ["all filters", "35", "77.1%", "90.0%", "90.0%", "8.2%"],  # 27 of 35, 8 of 98
    ]
