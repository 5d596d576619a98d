"""Matches of lines that stand under one another, on boxes written by hand."""

from data_prep.text_spotting.readings import Lines, find_match
from data_prep.text_spotting.settings import Settings


def _match(boxes, texts, caption, **settings) -> str | None:
    return find_match(Lines(boxes, texts), caption, Settings(**settings))


def test_the_spotter_joins_lines():
    boxes = [(10, 90, 0, 20), (200, 300, 0, 18), (20, 80, 25, 45)]
    texts = [("GIVE", 0.9), ("OPEN", 0.9), ("WAY", 0.9)]
    caption = "a give way sign"
    assert _match(boxes, texts, caption) == "GIVE WAY"
    assert _match(boxes, texts, caption, join_lines=False) is None
    assert _match(boxes, [*texts[:2], ("WAY", 0.05)], caption) is None  # not read for sure
    assert _match(boxes, [*texts[:2], None], caption) is None  # not read yet


def test_what_is_known_beyond_the_match_does_not_change_it():
    boxes = [(0, 200, 0, 40), (0, 150, 50, 80), (0, 90, 90, 110)]
    texts = [("sunset", 0.9), ("red balloon", 0.9), ("giant sunset", 0.9)]
    caption = "a giant red balloon at sunset"
    early = _match(boxes, [*texts[:2], None], caption)
    assert early == _match(boxes, texts, caption) == "red balloon"
    # Words of two lines that do not stand together.
    apart = [(0, 200, 0, 40), (300, 400, 200, 230), (600, 700, 400, 420)]
    words = [("sunset", 0.9), ("balloon", 0.9)]
    assert _match(apart, [*words, None], "balloon at sunset") == "sunset / balloon"
    assert _match(apart, [words[0], None, None], "balloon at sunset") is None


def test_little_is_a_match_when_all_lines_are_known():
    boxes = [(0, 200, 0, 40), (300, 400, 200, 230), (600, 900, 400, 420)]
    words = [("sunset", 0.9), ("beach", 0.9)]  # two that many captions hold
    caption = "beach at sunset"
    assert _match(boxes, [*words, None], caption) is None
    assert _match(boxes, [*words, ("xqz", 0.2)], caption) == "sunset / beach / xqz"
    much = ("a long summer day in the open air", 0.9)
    assert _match(boxes, [*words, much], caption) is None
    assert _match(boxes, [*words, (much[0], 0.4)], caption) is not None  # not read for sure
