"""Caption steps: their decisions from columns are those of the graphs."""

import itertools

from data_prep.captions.graph import cat_reason
from data_prep.steps.base import Candidate, Columns
from data_prep.steps.cat import CaptionStep, caption_limits
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from tests.data_prep.filtering.jobs import job_config

_SOURCE = SourceShard("table", "t.jsonl")


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
