"""Images that cannot be decoded, or are too large or too small."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from data_prep.steps.base import IMAGE_ERROR, Candidate, Columns, Step, check_integers
from diht_jax.input import decode


class ImageStep(Step):
    """Drops pairs whose image is no image or has no good size."""

    name = "image"
    order = 20
    reads = ("image",)
    reasons = {
        "empty": "no bytes",
        "unreadable": "unreadable",
        "too_large": "too large",
        "too_small": "too small",
    }
    timer = "images"
    section = "image"

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        c = config.image = ml_collections.ConfigDict()
        c.max_pixels = decode.MAX_PIXELS  # width times height; larger ones are not decoded
        c.min_side = 1  # px; smaller ones are dropped
        # px; larger ones are shrunk and written as JPEG; None keeps all bytes
        c.max_side = placeholder(int)
        c.jpeg_quality = 90  # of those that are shrunk

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        c = config.image
        names = ("max_pixels", "min_side", "max_side")
        check_integers({f"image.{name}": (c[name], 1) for name in names})
        if not 1 <= c.jpeg_quality <= 95:
            raise ValueError(f"config.image.jpeg_quality={c.jpeg_quality}; expected 1 to 95")

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        return {}  # its rules are a part of the filter's format version

    @classmethod
    def package_versions(cls, config: ml_collections.ConfigDict) -> dict[str, str]:
        return {"pillow": importlib.metadata.version("pillow")}

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        columns: dict[str, list] = {n: [] for n in ("format", "width", "height", IMAGE_ERROR)}
        for candidate in batch:
            data, error, header = candidate.pair.image, None, (None, None, None)
            try:
                header = decode.check_readable(data, max_pixels=self.config.image.max_pixels)
            except decode.ImageError as found:
                error = found.reason
            for name, value in zip(columns, (*header, error), strict=True):
                columns[name].append(value)
        return columns

    @classmethod
    def decide(cls, columns: Columns, config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
        width, height = columns.numbers("width"), columns.numbers("height")
        too_large = columns.is_text(IMAGE_ERROR, "too_large")
        return {
            "too_large": too_large | (width * height > config.image.max_pixels),
            "empty": columns.is_text(IMAGE_ERROR, "empty"),
            "unreadable": columns.is_text(IMAGE_ERROR, "unreadable"),
            "too_small": np.fmin(width, height) < config.image.min_side,
        }

    @classmethod
    def find_unknown(
        cls, columns: Columns, before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
    ) -> np.ndarray:
        old, new = before.image, now.image
        unknown = np.zeros(len(columns), bool)
        if new.max_pixels > old.max_pixels:  # nobody has tried to decode these
            unknown |= columns.is_text(IMAGE_ERROR, "too_large")
        if new.max_side != old.max_side:  # only an image to be shrunk is decoded at its full size
            dropped = cls.decide(columns, now)
            longer = np.fmax(columns.numbers("width"), columns.numbers("height"))
            was_shrunk = columns.is_text("outcome", "kept") & (longer > (old.max_side or np.inf))
            shrinks = (longer > (new.max_side or np.inf)) & ~was_shrunk
            unknown |= (shrinks & ~dropped["too_small"]) | (dropped["unreadable"] & (longer > 0))
            unknown &= ~dropped["too_large"]
        return unknown
