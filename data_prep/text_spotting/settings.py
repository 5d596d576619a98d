"""Settings of the text spotter: what they mean, their section of a config, their ranges."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import ml_collections

from data_prep.text_spotting.networks import PRECISIONS, OcrSettings, not_installed
from data_prep.text_spotting.ocr import CANVAS_STEPS, resolve_for_networks
from diht_jax.config.keys import COUNT, NOT_NEGATIVE, Key, OneOf, Range, build_config
from diht_jax.input import transforms as images
from diht_jax.storage.files import refuse_url

# What is decided about a picture that EasyOCR has read, and how it is read: raised whenever a
# decision may come out differently. tests/data_prep/text_spotting/test_rules_version.py fails when
# decisions change and this number does not.
RULES_VERSION = 3

# Keys of the section that decide where and how fast, but not what is written.
NOT_HASHED = ("cache", "device", "window", "batch_size", "stop_at_match")

_COUNTS = ("canvas_size", "min_chars", "misread_min_chars", "window", "batch_size")
_SHARES = ("min_confidence", "text_threshold", "low_text", "link_threshold", "gate_score")
_SHARES += ("closer_score", "audit_share")
_RANGES = {
    **dict.fromkeys(_COUNTS, COUNT),
    **dict.fromkeys(("gate_size", "closer_size", "closer_chars"), NOT_NEGATIVE),
    **dict.fromkeys(_SHARES, Range(0, 1)),
    "precision": OneOf(PRECISIONS),
}


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
        closer_chars: characters read with confidence (`match.SURE`) from which a picture was
            read well.
        min_confidence: of a line (0 to 1) to count.
        min_chars: length of the run that a line must share with the caption.
        misread_min_chars: length of such a run with one character misread; None allows none.
        weigh_words: whether the words that lines share with the caption are weighed
            (`match.weigh_texts`); else any run is a match, as recalled of the paper.
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


def easyocr_version() -> str:
    """The installed version, which boxes and texts depend on.

    Raises:
        ValueError: EasyOCR is not installed.
    """
    try:
        return importlib.metadata.version("easyocr")
    except importlib.metadata.PackageNotFoundError:
        raise not_installed() from None


_DEFAULTS = dataclasses.asdict(Settings())
_DEFAULTS |= _DEFAULTS.pop("ocr")
del _DEFAULTS["max_pixels"]  # of the section `image`

# The config section `spotter`: the fields of `Settings` and `OcrSettings`, and `cache`.
KEYS: dict[str, Any] = {
    **{n: Key(int if v is None else v, _RANGES.get(n)) for n, v in _DEFAULTS.items()},
    "cache": str,  # folder that keeps what was read; None: nothing is kept
}


def default_spotter() -> ml_collections.ConfigDict:
    """The config section `spotter`."""
    return build_config(KEYS)


def check_spotter(config: ml_collections.ConfigDict) -> None:
    """Checks what types and ranges cannot tell.

    Raises:
        ValueError: a value does not go with others, or is no local folder.
    """
    refuse_url(config.cache, "config.spotter.cache")
    if config.gate_size >= config.canvas_size:
        raise ValueError(
            f"config.spotter.gate_size={config.gate_size}; expected less than canvas_size="
            f"{config.canvas_size}, or 0 for no first look"
        )
