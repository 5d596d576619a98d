"""The steps: their table, what they decide by themselves, and how a shard goes through them."""

import collections
import io
import json

import pytest
from PIL import Image

from data_prep.captions.graph import CAT_REASONS, GATE_REASONS
from data_prep.filter import run_filter
from data_prep.filtering import config as filter_config
from data_prep.filtering.shard import filter_shard
from data_prep.jobs import shards
from data_prep.reports.funnel import Funnel, stage_reasons
from data_prep.sources.list import list_sources
from data_prep.steps import registry
from data_prep.steps.base import Candidate, Drop, Step, begin
from data_prep.steps.captions import CaptionStep
from data_prep.steps.image import ImageStep
from diht_jax.input.decode import REASONS as DECODE_REASONS
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from tests.data_prep.filtering.jobs import job_config, read_counts, read_outcomes, write_tars

_SOURCE = SourceShard("table", "t.jsonl")


class _ShortStep(Step):
    """Drops pairs whose first caption has fewer characters than the metadata's field n."""

    name = "short"
    order = 5
    reads = ("caption", "metadata")
    reasons = {"too_short": "too few characters"}
    batches: list[int] = []

    @classmethod
    def batch_size(cls, config):
        return 2

    def find_reason(self, candidate):
        too_short = len(candidate.captions[0]) < candidate.pair.metadata.get("n", 8)
        return "too_short" if too_short else None

    def judge(self, candidates):
        self.batches.append(len(candidates))
        return super().judge(candidates)

    def record(self, log):
        self.batches.append(0)


def test_the_table_is_consistent():
    assert all(step.name == name for name, step in registry.STEPS.items())
    names = [step.name for step in registry.ordered_steps()]
    assert names == ["metadata", "duplicates", "caption", "image", "decontaminate", "clip", "text"]
    assert tuple(CaptionStep.reasons) == (*GATE_REASONS, *CAT_REASONS)
    assert set(DECODE_REASONS) < set(ImageStep.reasons)
    assert list(stage_reasons()) == ["source", *names]


def test_active_steps_follow_the_config(tmp_path):
    def names(recipe: str, **changes) -> list[str]:
        config = job_config("a", tmp_path, recipe, **changes)
        return [step.name for step in registry.active_steps(config)]

    assert names("cat", text_spotting=True) == ["caption", "image", "text"]
    assert names("convert") == ["image"]
    assert names("convert", concepts=True) == ["caption", "image"]
    assert names("metadata") == ["caption"]


def test_captions_are_narrowed_and_the_first_reason_counts(tmp_path):
    step = CaptionStep(job_config("a", tmp_path, "cat"), _SOURCE)
    several = {"captions": ["a red car", "a dog runs", "a cat sleeps"]}
    pairs = [Pair("k", b"", "a red car", several), Pair("l", b"", "sunset", {})]
    good, dropped = step.judge(begin(pairs))
    assert good.captions == ["a dog runs", "a cat sleeps"]
    assert [list(graph.objects) for graph in good.graphs] == [["dog"], ["cat"]]
    assert list(good.first_graph.objects) == ["car"]
    assert (dropped.reason, dropped.candidate.pair.key) == ("complexity", "l")


def test_images_are_measured_and_dropped(tmp_path):
    step = ImageStep(job_config("a", tmp_path, image__min_side=20), _SOURCE)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "PNG")
    small = io.BytesIO()
    Image.new("RGB", (40, 19)).save(small, "JPEG")
    images = (buffer.getvalue(), small.getvalue(), b"", b"<html>")
    results = list(step.judge(begin(Pair("k", data, "c", {}) for data in images)))
    assert results[0].header == ("PNG", 40, 20)
    assert [result.reason for result in results[1:]] == ["too_small", "empty", "unreadable"]
    assert results[1].candidate.header == ("JPEG", 40, 19)


def test_a_slow_step_gets_small_batches_and_all_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.STEPS, "short", _ShortStep)
    monkeypatch.setattr(_ShortStep, "batches", [])
    write_tars(tmp_path / "in", 1)  # captions "name 0 0" to "name 0 4", 8 characters
    config = job_config(str(tmp_path / "in"), tmp_path / "out", batch_size=3)
    (source,) = list_sources(config.input, config.source)
    task = shards.ShardTask(source, str(tmp_path / "one.tfrecord"), "hash")
    done = []
    steps = registry.active_steps(config)
    assert [step.name for step in steps] == ["short", "image"]
    stats = filter_shard(task, done.append, config=config, steps=steps)
    assert (stats["output"]["records"], sum(done)) == (5, 5)
    assert _ShortStep.batches == [2, 1, 2, 0]  # in chunks of 3 and 2; recorded once
    assert stats == json.loads((tmp_path / "one.tfrecord.stats.json").read_text())
    run_filter(job_config(str(tmp_path / "in"), tmp_path / "out", batch_size=3))
    data = (tmp_path / "one.tfrecord").read_bytes()
    assert data == (tmp_path / "out" / "pairs-train-00000.tfrecord").read_bytes()


def test_a_step_without_images_runs_on_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.STEPS, "short", _ShortStep)
    rows = [
        {"caption": "a dog runs", "n": 11},
        {"caption": "a dog runs", "n": 10},
        {"caption": "a red car", "n": 1},
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    config = job_config(str(tmp_path / "t.jsonl"), tmp_path / "out", "metadata")
    assert run_filter(config) == {}
    assert (tmp_path / "out" / "t.jsonl").read_text() == lines[1]
    counts = read_counts(tmp_path / "out")["dropped"]
    dropped = {name: found for name, found in counts.items() if found}
    assert dropped == {"short": {"too_short": 1}, "caption": {"no_action": 1}}
    assert read_outcomes(tmp_path / "out") == [
        ("t-00000000", "short", "too_short"),
        ("t-00000001", "kept", None),
        ("t-00000002", "caption", "no_action"),
    ]


def test_reasons_of_unknown_steps_come_last_in_plain_words():
    funnel = Funnel()
    funnel.drop("blur", "too_soft", "k", "")
    funnel.drop("text", "shows_caption", "l", "")
    again = Funnel.from_json(json.loads(json.dumps(funnel.to_json())), 0, 0)
    assert again.rows()[1:3] == [("text", "shows_caption", 1), ("blur", "too_soft", 1)]
    assert "blur     too soft" in again.format_table()
    assert again.dropped["blur"] == collections.Counter({"too_soft": 1})


def test_a_drop_is_no_candidate():
    candidate = Candidate(Pair("k", b"", "c", {}), ["c"])
    assert not isinstance(Drop(candidate, "reason"), Candidate)
    assert candidate.choose([False]).captions == []


def test_keys_of_steps_are_in_the_default_config():
    config = filter_config.default_config()
    assert {"complexity", "min_complexity", "action", "image", "text_spotting", "spotter"} <= set(
        config.keys()
    )
    with pytest.raises(ValueError, match=r"config\.min_complexity=-1; expected an integer"):
        config.min_complexity = -1
        filter_config.check_config(config)
