"""Readings: the cache that a killed run leaves, and matches of known lines."""

import json

from data_prep.text_spotting.readings import Lines, Reading, SpotCache, find_match
from data_prep.text_spotting.settings import Settings

_READING = Reading(
    {128: 0.25, 256: 0.5},
    {
        256: Lines(
            [(1, 20, 3, 30), (0.5, 1.0, 9.25, 2.0, 9.0, 8.0, 1.0, 7.5)], [("Grüße €", 0.75), None]
        ),
        512: Lines([], []),
    },
)


def test_a_killed_run_loses_only_its_last_line(tmp_path):
    cache = SpotCache(tmp_path, {}, "s")
    for name in "abc":
        cache.put(name, _READING)
    cache.flush()
    data = cache.path.read_bytes()
    cache.path.write_bytes(data[:-20])
    again = SpotCache(tmp_path, {}, "s")
    again.put("d", _READING)
    again.flush()
    assert {name: SpotCache(tmp_path, {}, "s").get(name) == _READING for name in "abcd"} == {
        "a": True,
        "b": True,
        "c": False,
        "d": True,
    }


def test_settings_and_shards_do_not_mix(tmp_path):
    cache = SpotCache(tmp_path, {"canvas_size": 256}, "00000.tar")
    cache.put("a", _READING)
    cache.flush()
    assert SpotCache(tmp_path, {"canvas_size": 320}, "00000.tar").get("a") == Reading()
    assert SpotCache(tmp_path, {"canvas_size": 256}, "00001.tar").get("a") == Reading()
    settings = json.loads((cache.path.parent / "settings.json").read_text())
    assert settings == {"canvas_size": 256}


def _match(boxes, texts, caption, **settings) -> str | None:
    return find_match(Lines(boxes, texts), caption, Settings(**settings))


def test_the_spotter_joins_lines():
    boxes = [(10, 90, 0, 20), (200, 300, 0, 18), (20, 80, 25, 45)]
    texts = [("GIVE", 0.9), ("OPEN", 0.9), ("WAY", 0.9)]
    caption = "a give way sign"
    assert _match(boxes, texts, caption) == "GIVE WAY"
    assert _match(boxes, texts, caption, join_lines=False) is None
    assert _match(boxes, [*texts[:2], ("WAY", 0.05)], caption) is None  # not read reliably
    assert _match(boxes, [*texts[:2], None], caption) is None  # not read yet


def test_what_is_known_beyond_the_match_does_not_change_it():
    boxes = [(0, 200, 0, 40), (0, 150, 50, 80), (0, 90, 90, 110)]
    texts = [("sunset", 0.9), ("red balloon", 0.9), ("giant sunset", 0.9)]
    caption = "a giant red balloon at sunset"
    early = _match(boxes, [*texts[:2], None], caption)
    assert early == _match(boxes, texts, caption) == "red balloon"
    # Words of two lines that are not adjacent.
    apart = [(0, 200, 0, 40), (300, 400, 200, 230), (600, 700, 400, 420)]
    words = [("sunset", 0.9), ("balloon", 0.9)]
    assert _match(apart, [*words, None], "balloon at sunset") == "sunset / balloon"
    assert _match(apart, [words[0], None, None], "balloon at sunset") is None


def test_little_is_a_match_when_all_lines_are_known():
    boxes = [(0, 200, 0, 40), (300, 400, 200, 230), (600, 900, 400, 420)]
    words = [("sunset", 0.9), ("beach", 0.9)]  # two words common in captions
    caption = "beach at sunset"
    assert _match(boxes, [*words, None], caption) is None
    assert _match(boxes, [*words, ("xqz", 0.2)], caption) == "sunset / beach / xqz"
    much = ("a long summer day in the open air", 0.9)
    assert _match(boxes, [*words, much], caption) is None
    assert _match(boxes, [*words, (much[0], 0.4)], caption) is not None  # not read reliably
