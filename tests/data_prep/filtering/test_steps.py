"""The steps: their table, what they decide by themselves, and how a shard goes through them."""

import io
import itertools
import json

import pytest
from PIL import Image

from data_prep.captions.graph import CAT_REASONS, GATE_REASONS, cat_reason
from data_prep.decisions.funnel import stage_reasons
from data_prep.filter import run_filter
from data_prep.filtering import config as filter_config
from data_prep.filtering.chain import apply_step
from data_prep.filtering.shard import filter_shard
from data_prep.jobs import shards
from data_prep.sources.list import list_sources
from data_prep.steps import registry
from data_prep.steps.base import Candidate, Step
from data_prep.steps.captions import CaptionStep, caption_limits
from data_prep.steps.columns import Columns
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

    def measure(self, batch):
        self.batches.append(len(batch))
        return {
            self.name: [
                "too_short" if len(c.captions[0]) < c.pair.metadata.get("n", 8) else None
                for c in batch
            ]
        }

    def close(self):
        self.batches.append(0)
        return {}


class _Log:
    """Takes the drops of a step."""

    def __init__(self):
        self.drops = []

    def drop(self, candidate, stage, reason, evidence):
        self.drops.append((candidate.pair.key, stage, reason, evidence))


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
    config = job_config("a", tmp_path, "cat")
    several = {"captions": ["a red car", "a dog runs", "a cat sleeps"]}
    pairs = [Pair("k", b"", "a red car", several), Pair("l", b"", "sunset", {})]
    log = _Log()
    batch = [Candidate.of(pair) for pair in pairs]
    (good,) = apply_step(CaptionStep(config, _SOURCE), batch, config, log)
    assert good.captions == ["a dog runs", "a cat sleeps"]
    assert [list(graph.objects) for graph in good.graphs] == [["dog"], ["cat"]]
    assert list(good.first_graph.objects) == ["car"]
    assert log.drops == [("l", "caption", "complexity", None)]


def test_captions_decide_from_columns_as_their_graphs_do(tmp_path):
    """The reasons of `cat_reason`, for every caption alone, and the best of several for a pair."""
    texts = ["sunset", "a red car", "a dog runs", "IMG_1.jpg", "", "a black cat is chasing a bird"]
    config = job_config("a", tmp_path, "cat")
    step = CaptionStep(config, _SOURCE)
    for complexity, least, action in itertools.product((True, False), (0, 1, 2, 3), (True, False)):
        config.update({"complexity": complexity, "min_complexity": least, "action": action})
        batch = [Candidate.of(Pair("k", b"", t, {"captions": [t, *texts]})) for t in texts]
        batch += [Candidate.of(Pair("k", b"", t, {})) for t in texts]
        measured = step.measure(batch)
        found = [None] * len(batch)
        for reason, holds in step.decide(Columns(measured, len(batch)), config).items():
            found = [f or (reason if h else None) for f, h in zip(found, holds, strict=True)]
        limits = caption_limits(config)
        for candidate, reason in zip(batch, found, strict=True):
            truth = [cat_reason(graph, **limits) for graph in candidate.graphs]
            is_asked = complexity or action
            assert reason == (None if None in truth or not is_asked else truth[0])


def test_images_are_measured_and_dropped(tmp_path):
    config, log = job_config("a", tmp_path, image__min_side=20), _Log()
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "PNG")
    small = io.BytesIO()
    Image.new("RGB", (40, 19)).save(small, "JPEG")
    images = {"good": buffer.getvalue(), "small": small.getvalue(), "none": b"", "text": b"<html>"}
    batch = [Candidate.of(Pair(key, data, "c", {})) for key, data in images.items()]
    (good,) = apply_step(ImageStep(config, _SOURCE), batch, config, log)
    assert good.values | {"format": "PNG", "width": 40, "height": 20} == good.values
    assert [(key, reason) for key, _, reason, _ in log.drops] == [
        ("small", "too_small"), ("none", "empty"), ("text", "unreadable")
    ]  # fmt: skip
    assert batch[1].values | {"format": "JPEG", "width": 40, "height": 19} == batch[1].values


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


def test_keys_of_steps_are_in_the_default_config():
    config = filter_config.default_config()
    assert {"complexity", "min_complexity", "action", "image", "text_spotting", "spotter"} <= set(
        config.keys()
    )
    with pytest.raises(ValueError, match=r"config\.min_complexity=-1; expected an integer"):
        config.min_complexity = -1
        filter_config.check_config(config)
