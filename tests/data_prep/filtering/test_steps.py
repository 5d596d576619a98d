"""The steps: their table, what they decide by themselves, and how a shard goes through them."""

import itertools
import json

from data_prep.captions.graph import cat_reason
from data_prep.filter import run_filter
from data_prep.filtering.shard import filter_shard
from data_prep.jobs import shards
from data_prep.sources.list import list_inputs
from data_prep.steps import registry
from data_prep.steps.base import Candidate, Columns, Step
from data_prep.steps.captions import CaptionStep, caption_limits
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from tests.data_prep.filtering.jobs import job_config, write_tars

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


def test_a_slow_step_gets_small_batches_and_all_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.STEPS, "short", _ShortStep)
    monkeypatch.setattr(_ShortStep, "batches", [])
    write_tars(tmp_path / "in", 1)  # captions "name 0 0" to "name 0 4", 8 characters
    config = job_config(str(tmp_path / "in"), tmp_path / "out", batch_size=3)
    (found,) = list_inputs(config.input, config.source)
    task = shards.ShardTask(found.shard, str(tmp_path / "one.tfrecord"), "hash")
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
