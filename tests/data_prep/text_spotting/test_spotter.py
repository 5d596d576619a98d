"""Text-spotting with the real networks: same results as EasyOCR, without unneeded work."""

import dataclasses
import json

import numpy as np
import pytest

easyocr = pytest.importorskip("easyocr")

import torch  # noqa: E402

from benchmarks.text_spotting_testset import make_test_set  # noqa: E402
from data_prep.filter import run_filter  # noqa: E402
from data_prep.text_spotting import ocr as text_spotting_ocr  # noqa: E402
from data_prep.text_spotting import spotter as text_spotting  # noqa: E402
from data_prep.text_spotting.match import RECOGNIZABLE, fold_text  # noqa: E402
from data_prep.text_spotting.networks import OcrSettings, find_weights, resolve  # noqa: E402
from data_prep.text_spotting.ocr import Ocr, crop_line, shrink  # noqa: E402
from data_prep.text_spotting.readings import SpotCache  # noqa: E402
from data_prep.text_spotting.spotter import Settings, TextSpotter  # noqa: E402
from diht_jax.input.transforms import decode_rgb  # noqa: E402
from tests.data_prep.filtering.jobs import (  # noqa: E402
    job_config,
    read_counts,
    read_dropped,
    read_records,
    write_table,
)

# Shares no five consecutive characters with the texts in the pictures.
_OTHER = "two zebras jump over my fence"
_OCR = OcrSettings(canvas_size=176, precision="float32", device="cpu")
_SETTINGS = Settings(ocr=_OCR, gate_size=0, closer_size=0, min_confidence=0.2)


@pytest.fixture(scope="module")
def pictures() -> dict:
    """One synthetic picture of each kind, by kind."""
    return {picture.kind: picture for picture in make_test_set(10, seed=1)}


@pytest.fixture(scope="module")
def reader():
    folder = str(find_weights()[0].parent)
    return easyocr.Reader(
        ["en"],
        gpu=False,
        model_storage_directory=folder,
        user_network_directory=folder,
        download_enabled=False,
        quantize=False,
        verbose=False,
    )


def _bgr(data: bytes) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(decode_rgb(data))[..., ::-1])


def _judge(settings: Settings, *pairs, cache=None) -> list:
    spotter = TextSpotter(settings, cache)
    return spotter.judge([image for image, _ in pairs], [captions for _, captions in pairs])


@pytest.fixture
def read_lines(monkeypatch) -> list[int]:
    """Counts the lines that the networks read."""
    counts = []
    read = Ocr.read

    def count(self, crops, batch_size=16):
        counts.append(len(crops))
        return read(self, crops, batch_size)

    monkeypatch.setattr(Ocr, "read", count)
    return counts


@pytest.fixture(scope="module")
def ocr() -> Ocr:
    return text_spotting_ocr.Ocr(_OCR)


def test_recognizable_characters_are_those_of_the_network(reader):
    assert {fold_text(c) for c in reader.character} - {""} == RECOGNIZABLE
    assert set(reader.character) <= set(reader.lang_char)  # none is ignored


def test_boxes_and_texts_are_those_of_easyocr(pictures, reader, ocr):
    chosen = [pictures[kind] for kind in ("band", "rotated")]
    arrays = [_bgr(picture.image) for picture in chosen]
    maps = ocr.heat_maps([shrink(array, _OCR.canvas_size) for array in arrays])
    found = 0
    for array, heat in zip(arrays, maps, strict=True):
        level, turned = reader.detect(array, canvas_size=_OCR.canvas_size)
        expected_boxes = [list(map(int, box)) for box in level[0]]
        expected_boxes += [np.ravel(box).tolist() for box in turned[0]]
        boxes = ocr.find_boxes(heat)
        assert [list(box) for box in boxes] == expected_boxes
        grey = np.asarray(np.rint(array @ [0.114, 0.587, 0.299]), np.uint8)
        texts = ocr.read([crop_line(grey, box) for box in boxes])
        expected = reader.recognize(grey, level[0], turned[0], reformat=False)
        assert [text for text, _ in texts] == [text for _, text, _ in expected]
        np.testing.assert_allclose([c for _, c in texts], [c for _, _, c in expected], atol=1e-3)
        found += len(boxes)
    assert found >= 3


def test_reading_stops_at_the_first_match(pictures, read_lines):
    picture = pictures["band"]
    lines = len(picture.drawn.split("\n"))
    assert lines > 1
    stopped = _judge(_SETTINGS, (picture.image, [picture.caption]))[0]
    assert 0 < sum(read_lines) < len(stopped.spots)
    assert sum(spot.text is not None for spot in stopped.spots) == sum(read_lines)
    complete = dataclasses.replace(_SETTINGS, stop_at_match=False)
    whole = _judge(complete, (picture.image, [picture.caption]))[0]
    assert len(whole.spots) >= lines and all(spot.text is not None for spot in whole.spots)
    assert whole.matches == stopped.matches != (None,)


def test_batches_do_not_change_verdicts(pictures):
    pairs = [(p.image, [p.caption]) for p in (pictures["band"], pictures["unrelated"])] * 2
    settings = dataclasses.replace(_SETTINGS, ocr=dataclasses.replace(_OCR, canvas_size=96))
    one, many = (_judge(dataclasses.replace(settings, batch_size=size), *pairs) for size in (1, 4))
    assert [v.matches for v in one] == [v.matches for v in many]
    assert [v.spots for v in one] == [v.spots for v in many]


def test_a_closer_look_where_hardly_any_text_was_read(pictures, tmp_path, monkeypatch):
    picture, bare = pictures["band"], pictures["nothing"]
    pairs = [(picture.image, [picture.caption, _OTHER]), (bare.image, [bare.caption])]
    far = dataclasses.replace(_SETTINGS, ocr=dataclasses.replace(_OCR, canvas_size=80))
    near = dataclasses.replace(far, closer_size=176)
    sizes = []
    heat_maps = Ocr.heat_maps

    def count(self, pictures, side=None, batch_size=8):
        sizes.append((side, len(pictures)))
        return heat_maps(self, pictures, side, batch_size)

    monkeypatch.setattr(Ocr, "heat_maps", count)
    whole = dataclasses.replace(near, stop_at_match=False)
    cache = SpotCache(tmp_path, whole.describe_readings(), "shard")
    verdicts = _judge(whole, *pairs, cache=cache)
    # The picture without text needs no closer look.
    assert sizes == [(80, 2), (176, 1)]
    assert [[match is not None for match in v.matches] for v in verdicts] == [
        [True, False],
        [False],
    ]
    assert verdicts[0].spots == _judge(dataclasses.replace(whole, ocr=_OCR), pairs[0])[0].spots
    # The cache now holds all readings, including those that were not needed.
    monkeypatch.setattr(text_spotting, "Ocr", None)
    again = SpotCache(tmp_path, whole.describe_readings(), "shard")
    assert [v.matches for v in _judge(near, *pairs, cache=again)] == [v.matches for v in verdicts]
    for changes in ({"closer_size": 0}, {"closer_chars": 0}, {"closer_score": 2.0}):
        closed = dataclasses.replace(near, **changes)
        assert _judge(closed, *pairs, cache=again)[0].matches == (None, None)


def test_thresholds_are_replayed_without_reading(pictures, tmp_path, monkeypatch):
    settings = dataclasses.replace(
        _SETTINGS, gate_size=96, gate_score=0.0, stop_at_match=False, batch_size=2
    )
    pairs = [(p.image, [p.caption]) for p in (pictures["band"], pictures["unrelated"])]

    def open_cache():
        return SpotCache(tmp_path, settings.describe_readings(), "shard")

    fresh = _judge(settings, *pairs, cache=open_cache())
    assert [v.matches[0] is not None for v in fresh] == [True, False]

    def fail(_):
        raise AssertionError("a picture was read")

    monkeypatch.setattr(text_spotting, "Ocr", fail)
    assert _judge(settings, *pairs, cache=open_cache()) == fresh
    strict = dataclasses.replace(settings, min_confidence=1.001)
    assert [v.matches for v in _judge(strict, *pairs, cache=open_cache())] == [(None,), (None,)]
    longer = dataclasses.replace(settings, min_chars=500, misread_min_chars=None)
    assert _judge(longer, *pairs, cache=open_cache())[0].matches == (None,)
    closed = dataclasses.replace(settings, gate_score=2.0, audit_share=0.0)
    assert [v.looked for v in _judge(closed, *pairs, cache=open_cache())] == ["gated"] * 2
    # Another caption of a picture whose lines are all known.
    drawn = pictures["unrelated"].drawn
    assert _judge(settings, (pairs[1][0], [drawn]), cache=open_cache())[0].matches != (None,)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "sees no MPS device"),
        ("cuda:1", "sees only 1 CUDA device"),
        ("cuda:x", "expected 'auto'"),
        ("tpu", "expected 'auto'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, message, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=f"device='{device}'.*{message}"):
        resolve(OcrSettings(device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_decides_as_the_cpu(pictures):
    pairs = [(p.image, [p.caption]) for p in pictures.values()]
    gpu = dataclasses.replace(_SETTINGS, ocr=OcrSettings(canvas_size=176, device="cuda"))
    assert [v.matches for v in _judge(gpu, *pairs)] == [
        v.matches for v in _judge(_SETTINGS, *pairs)
    ]


def test_filter_drops_captions_that_stand_in_the_picture(pictures, tmp_path):
    band, bare = pictures["band"], pictures["nothing"]
    rows = [
        ("band.jpg", band.caption),
        ("bare.jpg", _OTHER),
        ("band.jpg", [band.caption, _OTHER]),
        ("cut.jpg", _OTHER),
        ("band.jpg", "東京タワーの夜景"),
    ]
    files = {"band.jpg": band.image, "bare.jpg": bare.image, "cut.jpg": bare.image[:500]}
    table = [{"image": image, "caption": text} for image, text in rows]
    source, output = write_table(tmp_path / "in", table, files), tmp_path / "out"
    config = job_config(source, output, text_spotting=True)
    config.spotter.update({"canvas_size": 192, "closer_size": 0, "gate_size": 128})
    config.spotter.update({"gate_score": 0.3, "precision": "float32", "audit_share": 0.0})
    config.spotter.cache = str(tmp_path / "c")
    assert run_filter(config) == {}
    counts = read_counts(output)
    assert read_dropped(output) == {"image": {"unreadable": 1}, "text": {"shows_caption": 1}}
    assert counts["text_spotting"] == {"gated": 1, "no_run": 1, "read": 2}
    (part,) = (output / "parts").glob("*.stats.json")
    spotter = json.loads(part.read_text())["counts"]["spotter"]
    assert spotter == {
        "precision": "float32",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    assert [key for _, key, _ in counts["samples"]["text/shows_caption"]] == ["t-00000000"]
    assert [(r.key, r.caption) for r in read_records(output)] == [
        ("t-00000001", _OTHER),
        ("t-00000002", _OTHER),
        ("t-00000004", "東京タワーの夜景"),
    ]
    assert list((tmp_path / "c").glob("*/t.jsonl-*.jsonl"))
