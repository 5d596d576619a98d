"""The cache of readings: what a killed run and a damaged file leave."""

import json

from data_prep.text_spotting.readings import Lines, Reading, SpotCache

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
    assert len(again) == 2
    again.put("d", _READING)
    again.flush()
    assert {name: SpotCache(tmp_path, {}, "s").get(name) == _READING for name in "abcd"} == {
        "a": True,
        "b": True,
        "c": False,
        "d": True,
    }


def test_a_damaged_line_is_spotted_again(tmp_path):
    cache = SpotCache(tmp_path, {}, "s")
    cache.put("a", _READING)
    cache.put("b", _READING)
    cache.flush()
    whole = cache.path.read_bytes()
    for place in range(whole.index(b"\n")):
        cache.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        again = SpotCache(tmp_path, {}, "s")
        assert again.get("a") in (_READING, Reading()), place
        assert again.get("b") == _READING, place


def test_settings_and_shards_do_not_mix(tmp_path):
    cache = SpotCache(tmp_path, {"canvas_size": 256}, "00000.tar")
    cache.put("a", _READING)
    cache.flush()
    assert len(SpotCache(tmp_path, {"canvas_size": 320}, "00000.tar")) == 0
    assert len(SpotCache(tmp_path, {"canvas_size": 256}, "00001.tar")) == 0
    settings = json.loads((cache.path.parent / "settings.json").read_text())
    assert settings == {"canvas_size": 256}
