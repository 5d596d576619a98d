"""The funnel: the reasons in the guide, and the scores of filters against known noise."""

import pytest

from data_prep.decisions.funnel import (
    score_filters,
    table_rows,
)


def test_filters_are_scored_against_the_labels():
    labels = {
        "kept": {"clean": 90, "text": 2, "title": 1},
        "text/shows_caption": {"clean": 2, "text": 18},
        "caption/complexity": {"title": 4, "clean": 6},
        "caption/no_action": {"title": 5},
    }
    scores, kinds = score_filters(labels, "clean")
    assert kinds == ["text", "title"]
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
    assert everything.clean_lost == pytest.approx(8 / 98)
