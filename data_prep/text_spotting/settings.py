"""Settings of the text spotter."""

from __future__ import annotations

import dataclasses
from typing import Any

from data_prep.text_spotting.networks import OcrSettings
from data_prep.text_spotting.ocr import CANVAS_STEPS, resolve_for_networks
from data_prep.text_spotting.weights import easyocr_version
from diht_jax.input import decode as images


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of reading and matching; the defaults are calibrated.

    docs/benchmarks/text_spotting.md shows the curves that they come from.

    Attributes:
        ocr: of the networks.
        gate_size: px of the longer side at the first look; 0 for no first look.
        gate_score: character score (0 to 1) at the first look from which a picture is read.
        audit_share: of the pictures that the first look skips, how many are read anyway.
        closer_size: px of the longer side at which a picture is read once more, where detection
            saw text of which hardly any could be read, and nothing matched; 0 for no closer look.
        closer_score: character score (0 to 1) of detection from which it saw text.
        closer_chars: characters read with confidence (`evidence.SURE`) from which a picture was
            read well.
        min_confidence: of a line (0 to 1) to count.
        min_chars: length of the run that a line must share with the caption.
        misread_min_chars: length of such a run with one character misread; None allows none.
        weigh_words: whether the words that lines share with the caption are weighed
            (`evidence.weigh_texts`); else any run is a match, as recalled of the paper.
        join_lines: whether lines that stand under one another are matched as one text as well.
        stop_at_match: leave the other lines unread once one has matched.
        window: pictures that are decoded and looked at together, unless they are very large;
            batches are made of those of like size among them.
        batch_size: most pictures that the networks take at once.
        max_pixels: of a picture that is still decoded.
    """

    ocr: OcrSettings = OcrSettings()
    gate_size: int = 0
    gate_score: float = 0.03
    audit_share: float = 0.01
    closer_size: int = 512
    closer_score: float = 0.3
    closer_chars: int = 20
    min_confidence: float = 0.1
    min_chars: int = 5
    misread_min_chars: int | None = None
    weigh_words: bool = True
    join_lines: bool = True
    stop_at_match: bool = True
    window: int = 256
    batch_size: int = 32
    max_pixels: int = images.MAX_PIXELS

    def describe_readings(self) -> dict[str, Any]:
        """All that a reading depends on, JSON-able: the settings of a `SpotCache`.

        Raises:
            ValueError: EasyOCR is missing, or a setting cannot be met.
        """
        ocr = dataclasses.asdict(resolve_for_networks(self.ocr))
        del ocr["device"]  # Another device rounds otherwise, as another processor does.
        return {"easyocr": easyocr_version(), "canvas_steps": list(CANVAS_STEPS), **ocr}
