"""Settings of the text spotter: documentation, config section, and valid ranges."""

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

# Version of the rules for reading a picture and deciding about it. Raise it with every change that
# may alter a decision; tests/data_prep/text_spotting/test_rules_version.py fails if decisions
# change and it does not.
RULES_VERSION = 3

# Keys that affect where and how fast the spotter runs, but not its output.
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
    """Settings for reading and matching text.

    docs/benchmarks/text_spotting.md shows the curves from which the defaults were calibrated.

    Attributes:
        ocr: settings of the networks.
        gate_size: px of the longer side for the first look; 0 disables it.
        gate_score: minimum character score (0 to 1) in the first look for a picture to be read.
        audit_share: share of the pictures skipped by the first look that are read anyway.
        closer_size: px of the longer side for a closer look; 0 disables it. It follows if text
            was detected, hardly any of it could be read, and nothing matched.
        closer_score: minimum character score (0 to 1) at which text counts as detected.
        closer_chars: number of characters read with confidence (`match.SURE`) from which a
            picture counts as read well.
        min_confidence: minimum confidence (0 to 1) of a line to count.
        min_chars: minimum length of the run that a line shares with the caption.
        misread_min_chars: minimum length of a run with one misread character; None allows none.
        weigh_words: whether words shared with the caption are weighed (`match.weigh_texts`);
            otherwise any run is a match, as recalled from the paper.
        join_lines: whether lines that stand below one another are also matched as one text.
        stop_at_match: whether to stop reading lines once one has matched.
        window: number of pictures decoded together (fewer if they are very large), from which
            batches of similar size are formed.
        batch_size: maximum batch size of the networks.
        max_pixels: maximum number of pixels of a picture to decode.
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
        """Returns everything that readings depend on, as JSON: the settings for a `SpotCache`.

        Raises:
            ValueError: EasyOCR is missing, or a setting is not supported.
        """
        ocr = dataclasses.asdict(resolve_for_networks(self.ocr))
        del ocr["device"]  # Devices differ only in rounding, as processors do.
        return {"easyocr": easyocr_version(), "canvas_steps": list(CANVAS_STEPS), **ocr}


def easyocr_version() -> str:
    """Returns EasyOCR's installed version, on which boxes and texts depend.

    Raises:
        ValueError: EasyOCR is not installed.
    """
    try:
        return importlib.metadata.version("easyocr")
    except importlib.metadata.PackageNotFoundError:
        raise not_installed() from None


_DEFAULTS = dataclasses.asdict(Settings())
_DEFAULTS |= _DEFAULTS.pop("ocr")
del _DEFAULTS["max_pixels"]  # belongs to the section `image`

# The config section `spotter`: the fields of `Settings` and `OcrSettings`, and `cache`.
KEYS: dict[str, Any] = {
    **{n: Key(int if v is None else v, _RANGES.get(n)) for n, v in _DEFAULTS.items()},
    "cache": str,  # folder for the cache of text read in pictures; None: no cache
}


def default_spotter() -> ml_collections.ConfigDict:
    """Returns the default config section `spotter`."""
    return build_config(KEYS)


def check_spotter(config: ml_collections.ConfigDict) -> None:
    """Checks constraints between values, and paths.

    Raises:
        ValueError: values contradict each other, or a path is not a local folder.
    """
    refuse_url(config.cache, "config.spotter.cache")
    if config.gate_size >= config.canvas_size:
        raise ValueError(
            f"config.spotter.gate_size={config.gate_size}; expected less than canvas_size="
            f"{config.canvas_size}, or 0 for no first look"
        )
