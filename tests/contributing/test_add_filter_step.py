"""Worked example of a filter step: it drops extreme aspect ratios, and the report counts them."""

import json
import pathlib
import re

import pytest

from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from data_prep.filtering import config as filter_config
from data_prep.filtering.replay import Replay
from data_prep.steps import registry
from tests import make
from tests.contributing.blocks import load_example
from tests.data_prep.filtering.jobs import job_config, read_outcomes, read_records, snapshot

# Width, height, and whether one side is more than three times as long as the other.
_SIZES = [(40, 20, False), (100, 10, True), (30, 30, False), (10, 31, True), (10, 30, False)]


@pytest.fixture(autouse=True)
def example(tmp_path, monkeypatch):
    """Registers the example: one file, and one line in the table."""
    module = load_example("aspect_ratio", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # for the import in workers
    monkeypatch.setitem(registry.STEPS, "aspect", module.AspectStep)
    return module


def _write_tar(path: pathlib.Path) -> str:
    members = {}
    for number, (width, height, _) in enumerate(_SIZES):
        image = make.encoded(make.plain("red", (width, height)))
        members |= make.pair_members(str(number), f"{width} by {height}", image)
    return make.write_tar(path, members)


def test_extreme_shapes_are_dropped_and_counted(tmp_path, capsys):
    output, source = tmp_path / "out", _write_tar(tmp_path / "in.tar")
    config = job_config(source, output, aspect__max_ratio=3.0, num_workers=1)
    assert run_filter(config) == {}
    kept = [f"{width} by {height}" for width, height, is_extreme in _SIZES if not is_extreme]
    assert [record.caption for record in read_records(output)] == kept
    assert re.search("aspect +extreme shape +2 +40.0%", capsys.readouterr().out)
    report = read_report(output)
    rows = [(row["stage"], row["reason"], row["pairs"]) for row in report["funnel"]]
    assert rows == [("read", "", 5), ("aspect", "extreme", 2), ("kept", "", 3)]
    page = (output / "report.html").read_text()
    assert "<td>extreme shape</td>" in page and "Dropped, aspect: extreme shape" in page
    assert [key for key, stage, _ in read_outcomes(output) if stage == "aspect"] == ["1", "3"]
    settings = json.loads((output / "parts" / "settings.json").read_text())
    assert (settings["aspect"], settings["aspect_rules"]) == ({"max_ratio": 3.0}, 1)
    before = snapshot(output)
    assert run_filter(config) == {}  # nothing to do
    assert snapshot(output) == before


def test_the_step_is_off_by_default_and_finished_folders_stay_valid(tmp_path, monkeypatch):
    config = job_config("in.tar", tmp_path)
    settings = [filter_config.describe_settings(config)]
    config.aspect.max_ratio = 3.0
    settings.append(filter_config.describe_settings(config))
    monkeypatch.delitem(registry.STEPS, "aspect")
    settings.append(filter_config.describe_settings(job_config("in.tar", tmp_path)))
    assert settings[0] == settings[2] != settings[1]


def test_a_replay_decides_by_another_ratio(tmp_path):
    source = _write_tar(tmp_path / "in.tar")
    assert run_filter(job_config(source, tmp_path / "out", aspect__max_ratio=3.0)) == {}
    for ratio in (1.5, 3.05, 20.0):
        config = job_config(source, tmp_path / "new", aspect__max_ratio=ratio)
        result = Replay(str(tmp_path / "out"), config).run()
        expected = sum(max(w, h) > ratio * min(w, h) for w, h, _ in _SIZES)
        assert result.funnel.dropped()["aspect"] == ({"extreme": expected} if expected else {})
        assert not result.not_known
