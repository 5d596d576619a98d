"""Images that cannot be decoded, or are too large or too small."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from data_prep.steps.base import Candidate, Drop, Step, check_integers
from data_prep.steps.recorded import AS_RECORDED, NOT_KNOWN, PASSES, Recorded
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

    @classmethod
    def replay(
        cls,
        recorded: Recorded,
        before: ml_collections.ConfigDict,
        now: ml_collections.ConfigDict,
    ) -> np.ndarray:
        old, new = before.image, now.image
        width, height = recorded.numbers("width"), recorded.numbers("height")
        longer, is_sized = np.fmax(width, height), ~np.isnan(width)
        dropped = recorded.is_text("outcome", cls.name)
        too_large = dropped & recorded.is_text("reason", "too_large")
        unreadable = dropped & recorded.is_text("reason", "unreadable")
        number = {reason: i for i, reason in enumerate(cls.reasons, 1)}
        found = np.full(len(recorded), AS_RECORDED)
        if new.max_pixels > old.max_pixels:
            found[too_large] = NOT_KNOWN
        is_read = is_sized & ~unreadable
        found[is_read] = PASSES
        found[is_read & (np.fmin(width, height) < new.min_side)] = number["too_small"]
        if new.max_side != old.max_side:
            # Only an image that is to be shrunk is decoded at its full size.
            shrinks = is_sized & (longer > (new.max_side or np.inf))
            was_shrunk = recorded.is_text("outcome", "kept") & (longer > (old.max_side or np.inf))
            found[(shrinks & ~was_shrunk & (found == PASSES)) | (unreadable & is_sized)] = NOT_KNOWN
        found[is_sized & (width * height > new.max_pixels)] = number["too_large"]
        return found

    def judge(self, candidates: Sequence[Candidate]) -> Iterator[Candidate | Drop]:
        limits = self.config.image
        for candidate in candidates:
            try:
                header = decode.check_readable(candidate.pair.image, max_pixels=limits.max_pixels)
            except decode.ImageError as error:
                yield Drop(candidate, error.reason)
                continue
            candidate = candidate._replace(header=header)
            yield candidate if min(header[1:]) >= limits.min_side else Drop(candidate, "too_small")
