"""Results of the spotting rules by version: a changed result must raise `RULES_VERSION`.

    python -m tests.data_prep.text_spotting.test_rules_version

rewrites the golden file after the version was raised. The file holds the settings, the canvases
of pictures, match decisions on fixed texts, and verdicts on known lines. No network runs here:
`test_spotter.py` checks boxes and texts against EasyOCR.
"""

import dataclasses
import io
import itertools
import pathlib

import numpy as np
from PIL import Image

from data_prep.text_spotting import match, ocr, readings, spotter
from data_prep.text_spotting.match import can_match, caption_matches
from data_prep.text_spotting.readings import Lines, Reading
from data_prep.text_spotting.settings import NOT_HASHED, RULES_VERSION
from data_prep.text_spotting.spotter import Settings
from tests.data_prep import golden

_GOLDEN = pathlib.Path(__file__).parent / "rules_golden.json"
_CAPTIONS = (
    "Happy Birthday to you", "a red car", "Straße in Wien", "ﬁne art prints", "50% off today",
    "東京タワーの夜景", "stop sign at night", "now or never", "İstanbul'da bir gün", "a b c d e f",
)  # fmt: skip
_SPOTTED = (
    "happy", "HAPPY BIRTHDAY", "hapqy birqhday", "redca", "red car", "STRASSE", "fine art",
    "ＦＩＮＥ ＡＲＴ", "50%off", "ST0P SIGN", "stop", "n0w 0r never", "bir gun", "abcdef", "",
)  # fmt: skip


def _match_decisions() -> dict[str, str]:
    """Maps each setting to a digit per caption and text: whether they match."""
    settings = ((5, None), (4, None), (6, None), (9, 8), (5, 6))
    found = {}
    for min_chars, misread in settings:
        name = f"min_chars={min_chars} misread_min_chars={misread}"
        found[name] = "".join(
            str(int(caption_matches([text], caption, min_chars, misread_min_chars=misread)))
            for caption, text in itertools.product(_CAPTIONS, _SPOTTED)
        )
    for other in ("", "the white dog"):
        found[f"weighed beside '{other}'"] = "".join(
            str(int(caption_matches([text, other], caption, weigh_words=True)))
            for caption, text in itertools.product(
                (*_CAPTIONS, "a pilgrimage of a person"), (*_SPOTTED, "happv birthdav", "PERSON")
            )
        )
    found["can_match"] = "".join(str(int(can_match(caption))) for caption in _CAPTIONS)
    return found


def _verdicts() -> list[str]:
    """Verdicts on pictures with known lines, and the lines that are read next."""
    settings = Settings(gate_size=160)
    boxes = [(0, 90, 0, 20), (0, 40, 30, 60), (0, 12, 0, 40), (5, 5, 60, 8, 58, 30, 3, 27)]
    texts = [("HAPPY BIRTH", 0.9), ("red car", 0.09), None, ("stop sign", 0.4)]
    found = []
    for gate, caption in itertools.product((0.01, 0.03, 0.5), _CAPTIONS[:7]):
        picture = spotter._Picture(b"data", [caption, "another text"], settings)
        picture.reading = Reading({160: gate, 256: 0.9}, {256: Lines(list(boxes), list(texts))})
        verdict = picture.verdict()
        following = picture.next_lines(256, 4)
        found.append(
            f"{gate} {caption}: {verdict.looked} {verdict.matches} audited={verdict.audited} "
            f"open={picture.is_open()} next={following} "
            f"order={readings.rank_lines(picture.reading.looks[256])}"
        )
    return found


def _closer_looks() -> list[str]:
    """Which pictures get a closer look, and the resulting verdicts."""
    settings = Settings()
    boxes = [(0, 90, 0, 20), (0, 90, 30, 50)]
    closer = Lines(boxes, [("happy birthdav", 0.3), ("to you", 0.9)])
    found = []
    for side, peak, text in itertools.product(
        (200, 400), (0.2, 0.3), (("hap", 0.9), ("a sign with many words", 0.9), ("tbirthda", 0.2))
    ):
        data = io.BytesIO()
        Image.new("RGB", (side, 90)).save(data, "PNG")
        picture = spotter._Picture(data.getvalue(), ["Happy Birthday to you"], settings)
        first = Lines(boxes[:1], [text])
        picture.reading = Reading({160: 1.0, 256: peak}, {256: first, 512: closer})
        found.append(f"{side} {peak} {text}: {picture.needs_look(512)} {picture.verdict().matches}")
    return found


def _describe_rules() -> dict:
    settings = dataclasses.asdict(Settings())
    ocr_settings = settings.pop("ocr")
    kept = {k: v for k, v in (settings | ocr_settings).items() if k not in NOT_HASHED}
    blank = np.zeros((30, 400, 3), np.uint8)
    shrunk = [ocr.shrink(blank[:h, :w], 160) for h, w in ((30, 400), (7, 90), (1, 400))]
    return {
        "settings": kept,
        "recognizable": "".join(sorted(match.RECOGNIZABLE)),
        "shrunk": [[*s.pixels.shape, s.scale] for s in shrunk],
        "canvases": [
            ocr.canvas_shape(size, side)
            for size in ((160, 160), (160, 107), (90, 256), (512, 300))
            for side in (160, 256, 512)
        ],
        "matches": _match_decisions(),
        "verdicts": _verdicts(),
        "closer_looks": _closer_looks(),
    }


def test_decisions_change_only_with_the_version():
    golden.require_unchanged(_GOLDEN, RULES_VERSION, _describe_rules())


if __name__ == "__main__":
    golden.write(_GOLDEN, RULES_VERSION, _describe_rules())
