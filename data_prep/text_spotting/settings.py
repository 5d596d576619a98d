"""Settings of the text spotter: what they mean, their section of a config, their ranges."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep.text_spotting.networks import PRECISIONS, OcrSettings, not_installed
from data_prep.text_spotting.ocr import CANVAS_STEPS, resolve_for_networks
from diht_jax.input import transforms as images
from diht_jax.storage.files import refuse_url

# What is decided about a picture that EasyOCR has read, and how it is read: raised whenever a
# decision may come out differently. tests/data_prep/text_spotting/test_rules_version.py fails when
# decisions change and this number does not.
RULES_VERSION = 3

# Keys of the section that decide where and how fast, but not what is written.
NOT_HASHED = ("cache", "device", "window", "batch_size", "stop_at_match")

# Least values of counts; names of shares, from 0 to 1.
_LEAST = {
    **dict.fromkeys(("canvas_size", "min_chars", "misread_min_chars", "window", "batch_size"), 1),
    **dict.fromkeys(("closer_size", "closer_chars"), 0),
}
_SHARES = (
    "min_confidence",
    "text_threshold",
    "low_text",
    "link_threshold",
    "gate_score",
    "closer_score",
    "audit_share",
)


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


def default_spotter() -> ml_collections.ConfigDict:
    """The config section `spotter`: the fields of `Settings` and `OcrSettings`, and `cache`."""
    values = dataclasses.asdict(Settings())
    values |= values.pop("ocr")
    del values["max_pixels"]  # of the section `image`
    c = ml_collections.ConfigDict()
    for name, value in values.items():
        c[name] = placeholder(int) if value is None else value
    c.cache = placeholder(str)  # folder that keeps what was read; None: nothing is kept
    return c


def check_spotter(config: ml_collections.ConfigDict) -> None:
    """Checks what types cannot tell.

    Raises:
        ValueError: a value is out of its range.
    """
    refuse_url(config.cache, "config.spotter.cache")
    for name, least in _LEAST.items():
        if config[name] is not None and config[name] < least:
            raise ValueError(f"config.spotter.{name}={config[name]}; expected at least {least}")
    if not 0 <= config.gate_size < config.canvas_size:
        raise ValueError(
            f"config.spotter.gate_size={config.gate_size}; expected less than canvas_size="
            f"{config.canvas_size}, or 0 for no first look"
        )
    for name in _SHARES:
        if not 0 <= config[name] <= 1:
            raise ValueError(f"config.spotter.{name}={config[name]}; expected 0 to 1")
    if config.precision not in PRECISIONS:
        raise ValueError(
            f"config.spotter.precision='{config.precision}'; expected one of "
            f"{', '.join(PRECISIONS)}"
        )
