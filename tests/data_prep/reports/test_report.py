"""The report: numbers against a hand-made table, parts against the whole, and the page itself."""

import collections
import html.parser
import importlib.metadata
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_prep.captions.graph import CaptionGraph, Edge, ObjectNode
from data_prep.filter import run_filter
from data_prep.filtering.job import print_funnel
from data_prep.reports import page as report_page
from data_prep.reports import statistics
from data_prep.reports.funnel import Funnel, spell_reason
from data_prep.reports.noise_scores import score_filters, table_rows
from data_prep.reports.samples import SampleLog, choose_samples, read_samples
from data_prep.reports.statistics import BINS, Measures
from data_prep.reports.summary import FilterReport, merge_reports, read_report
from data_prep.text_spotting.spotter import Spot
from diht_jax.config import load_recipe

_REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
_ROWS = [
    ("A black cat is chasing a small brown bird", "good"),
    ("a man riding a horse", "good"),
    ("a red car <b>& more</b>", "good"),
    ("sunset", "bad"),
    ("IMG_2041.JPG", "bad"),
    ("a boy throws a red ball", "bad"),
]


def _make_source(folder: pathlib.Path) -> str:
    folder.mkdir()
    Image.new("RGB", (300, 90), "red").save(folder / "i.jpg")
    rows = [{"image": "i.jpg", "caption": text, "quality": kind} for text, kind in _ROWS]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "t.jsonl")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> pathlib.Path:
    """`whole`: all rows in one job; `parts`: the same in shards of two rows."""
    folder = tmp_path_factory.mktemp("report")
    source = _make_source(folder / "in")
    for output, rows_per_shard in (("whole", 100), ("parts", 2)):
        config = load_recipe(_REPOSITORY / "configs" / "prep" / "cat.py")
        config.update({"input": source, "output": str(folder / output), "num_workers": 0})
        config.update({"text_spotting": False, "label_field": "quality", "clean_label": "good"})
        config.source.rows_per_shard = rows_per_shard
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
    # Jobs merge as shards do; the command is the way to it.
    command = [sys.executable, "-m", "data_prep.reports", f"--output={work}/both"]
    command += [f"--inputs={work}/whole,{work}/parts"]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    both = read_report(work / "both")
    assert (both.funnel.read, both.funnel.kept, len(both.jobs)) == (12, 6, 2)
    assert both.measures.histograms["complexity"]["kept"] == {1: 2, 2: 2, 3: 2}
    installed = {name: importlib.metadata.version(name) for name in ("spacy", "pillow")}
    for name, version in installed.items():
        assert both.versions[name] == {version: 4}  # shards
        assert f"{name} {version}" in (work / "both" / "report.html").read_text()
    assert both.to_json() == merge_reports([work / "whole", work / "parts"]).to_json()
    with pytest.raises(ValueError, match="report.json: no report of"):
        read_report(work / "in")


class _Tags(html.parser.HTMLParser):
    """Counts tags, and checks that all are closed in order."""

    _OPEN = {"meta", "br", "img", "rect", "line", "polygon"}

    def __init__(self, text: str):
        super().__init__()
        self.stack: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        # A paragraph and the cells of a table may stay open.
        if tag not in self._OPEN:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self._OPEN:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_needs_nothing_else(work):
    text = (work / "whole" / "report.html").read_text()
    tags = _Tags(text)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:)\w""", text)
    pictures = [attrs for tag, attrs in tags.found if tag == "img"]
    assert len(pictures) == 6 and all(p["src"].startswith("data:image/jpeg") for p in pictures)
    assert "a red car <b>& more</b>" in tags.text  # as text, not as markup
    labels = re.findall(r'<text x="([\d.]+)" y="150" text-anchor="(\w+)">([\d+]+)<', text)
    assert "2048+" in {label for _, _, label in labels}
    for x, anchor, label in labels:
        width = 7 * len(label)  # px; no digit of 11 px is wider
        right = float(x) + {"end": 0, "middle": width / 2}[anchor]
        assert right - width >= 0 and right <= 400, label
    for shown in (
        "chase(cat,bird)",
        "Dropped, caption: A: no action",
        "cat[black]:2",
        "recall: bad",
    ):
        assert shown in tags.text


def test_spotted_boxes_are_drawn(tmp_path):
    log = SampleLog(4, 10**6)
    buffer = io.BytesIO()
    Image.new("RGB", (400, 200), "white").save(buffer, "PNG")
    spots = (
        Spot((10.0, 110.0, 20.0, 50.0), "hello there", 0.9),
        Spot((0.0, 0.0, 40.0, 10.0, 40.0, 30.0, 0.0, 20.0), None, None),
    )
    log.add(
        "text/shows_caption", "00", key="k", caption="hello there", image=buffer.getvalue(),
        graph=CaptionGraph({"dog": ObjectNode((), 1)}, [Edge("dog", "run", None)]), spots=spots,
        match="hello there",
    )  # fmt: skip
    log.add("image/unreadable", "00", key="u", caption="a dog", image=b"no image")
    log.write(str(tmp_path / "s"))
    samples = choose_samples(read_samples(str(tmp_path / "s")), 4)
    assert [s["error"] for s in samples] == ["unreadable", None]
    funnel = Funnel()
    funnel.drop("text", "shows_caption", "k", "")
    funnel.drop("image", "unreadable", "u", "")
    page = report_page.render_report(FilterReport([], funnel, samples=samples))
    tags = _Tags(page)
    polygons = [attrs for tag, attrs in tags.found if tag == "polygon"]
    assert [(p["points"], p.get("class")) for p in polygons] == [
        ("10,20 110,20 110,50 10,50", "m"),
        ("0,0 40,10 40,30 0,20", None),
    ]
    assert ("svg", {"viewbox": "0 0 400 200", "preserveaspectratio": "none"}) in tags.found
    assert "hello there 0.90" in tags.text and "picture: unreadable" in tags.text
    assert "run(dog)" in tags.text


def test_the_lowest_ranks_are_chosen(tmp_path):
    funnel = Funnel(seed=3)
    ranks = {f"k{i}": funnel.rank(f"k{i}", "c") for i in range(40)}
    expected = sorted(ranks, key=ranks.get)[:5]
    logs = [SampleLog(5, 10**6) for _ in range(3)]
    for i, (key, rank) in enumerate(ranks.items()):
        if logs[i % 3].wants("kept", rank):
            logs[i % 3].add("kept", rank, key=key, caption="c")
    for number, log in enumerate(logs):
        log.write(str(tmp_path / str(number)))
    found = choose_samples((s for n in "201" for s in read_samples(str(tmp_path / n))), 5)
    assert [sample["key"] for sample in found] == expected


def test_measures_of_shards_add_up():
    graph = CaptionGraph({"dog": ObjectNode((), 30)}, [Edge("dog", "run", None)])
    parts = [Measures() for _ in range(2)]
    for part in parts:
        part.add_caption("kept", "a dog runs", graph)
        part.add_caption("dropped", "url", CaptionGraph(drop_reason="url"))
        part.add_image("kept", 4000, 2100)
        part.add_label("kept", None)
    parts[0].merge(Measures.from_json(json.loads(json.dumps(parts[1].to_json()))))
    found = parts[0].to_json()
    last = str(BINS["complexity"][-1])
    assert found["histograms"]["complexity"] == {"kept": {last: 2}, "dropped": {}}
    assert found["histograms"]["image_side"]["kept"] == {str(BINS["image_side"][-1]): 2}
    assert found["histograms"]["caption_words"] == {"kept": {"2": 2}, "dropped": {"0": 2}}
    assert found["names"]["actions"]["kept"] == {"run": 2}
    assert found["labels"] == {"kept": {"None": 2}}


def test_counts_of_many_names_are_bounded_and_say_so(monkeypatch):
    monkeypatch.setattr(statistics, "_MAX_NAMES", 20)
    monkeypatch.setattr(statistics, "_MAX_MERGED", 60)
    rng = np.random.default_rng(0)
    exact: collections.Counter[str] = collections.Counter()
    merged, most = Measures(), 0
    for _ in range(100):
        part = Measures()
        for _ in range(10):
            names = {f"n{i}" for i in rng.zipf(1.6, 20) if i < 10**6}
            graph = CaptionGraph({name: ObjectNode((), 0) for name in names})
            part.add_caption("kept", "", graph)
            exact.update(names)
        merged.merge(Measures.from_json(json.loads(json.dumps(part.to_json()))))
        most = max(most, len(merged.names["objects"]["kept"]))
    assert len(exact) > 600 and most <= 60
    data = merged.to_json()
    counts, missed = data["names"]["objects"]["kept"], data["missed"]["objects"]["kept"]
    assert len(counts) == 20 and missed > 0
    for name, count in exact.items():
        assert count - missed <= counts.get(name, 0) <= count
    # What is frequent beyond that error is found, in its order.
    first, second, third = exact.most_common(3)
    assert missed < third[1] / 2
    assert list(merged.most_common("objects", "kept", 2)) == [first, second]
    assert data["missed"]["actions"] == {"kept": 0, "dropped": 0}
    page = report_page.render_report(FilterReport([], Funnel(), merged))
    missed = merged.missed["objects"]["kept"]
    assert f"Counts may be too low, by {missed} at most." in page


def test_shards_of_unlike_machines_are_reported(caplog):
    def make(precision: str) -> FilterReport:
        counts = Funnel().to_json() | {"measures": Measures().to_json(), "download": None}
        report = FilterReport([], Funnel())
        for spotter in ({"precision": precision, "device": "cpu"}, None):
            report.add_counts(counts | {"spotter": spotter})
        return report

    report = make("float32")
    report.merge(make("float32"))
    assert report.spotters == {"float32 on cpu": 2} and report.warnings() == []
    report.merge(make("bfloat16"))
    data = json.loads(json.dumps(report.to_json()))
    assert data["spotters"] == {"bfloat16 on cpu": 1, "float32 on cpu": 2}
    (warning,) = data["warnings"]
    assert "bfloat16 on cpu (1 shards), float32 on cpu (2 shards)" in warning
    assert FilterReport.from_json(data).warnings() == [warning]
    tags = _Tags(report_page.render_report(report))
    assert ("p", {"class": "warning"}) in tags.found and warning in tags.text
    print_funnel(report)
    assert warning in caplog.text


def test_reasons_stand_in_the_order_of_the_work():
    funnel = Funnel()
    for stage, reason, count in (
        ("text", "shows_caption", 9),
        ("image", "unreadable", 1),
        ("caption", "no_action", 7),
        ("caption", "odd", 1),
        ("caption", "complexity", 3),
        ("caption", "empty", 5),
        ("source", "no_caption", 1),
    ):
        for i in range(count):
            funnel.drop(stage, reason, str(i), "")
    expected = [
        ("read", ""), ("source", "no caption"), ("caption", "no words"),
        ("caption", "C: complexity"), ("caption", "A: no action"), ("caption", "odd"),
        ("image", "unreadable"), ("text", "T: shows its caption"), ("kept", ""),
    ]  # fmt: skip
    assert [(stage, spell_reason(stage, reason)) for stage, reason, _ in funnel.rows()] == expected
    tags = _Tags(report_page.render_report(FilterReport([], funnel)))
    places = [tags.text.index(reason) for _, reason in expected if reason]
    assert places == sorted(places)


def test_filters_are_scored_against_the_labels():
    labels = {
        "kept": {"clean": 90, "text": 2, "title": 1},
        "text/shows_caption": {"clean": 2, "text": 18},
        "caption/complexity": {"title": 4, "clean": 6},
        "caption/no_action": {"title": 5},
    }
    scores, kinds = score_filters(labels, "clean")
    assert kinds == ["text", "title"]
    by_name = {score.name: score for score in scores}
    assert [s.name for s in scores] == [
        "C: complexity", "A: no action", "T: shows its caption", "all filters"
    ]  # fmt: skip
    c, a, t, everything = scores
    assert (c.drops, c.precision, c.recall["title"]) == (10, 0.4, 0.4)
    assert c.clean_lost == pytest.approx(6 / 98)
    assert (a.precision, a.recall["title"]) == (1.0, 5 / 6)  # of the six that came to it
    assert (t.precision, t.recall) == (0.9, {"text": 0.9, "title": 0.0})
    assert everything.recall == {"text": 0.9, "title": 0.9}
    assert everything.precision == pytest.approx(27 / 35)
    assert table_rows(labels, "clean")[3][:3] == ["T: shows its caption", "20", "90.0%"]
    assert by_name["all filters"].clean_lost == pytest.approx(8 / 98)
