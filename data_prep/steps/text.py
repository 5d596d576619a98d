"""Captions that their picture shows as text: T of CAT (DiHT, arXiv 2301.02280).

How text is spotted and matched belongs in `data_prep.text_spotting`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep.steps.base import IMAGE_ERROR, Candidate, Columns, Step
from data_prep.steps.captions import compare_captions
from data_prep.text_spotting import settings as spotter_settings
from data_prep.text_spotting.looks import longest_match
from data_prep.text_spotting.networks import easyocr_version
from data_prep.text_spotting.ocr import resolve_for_networks
from data_prep.text_spotting.spotter import Verdict, open_spotter
from diht_jax.readers.base import SourceShard

_COLUMNS = ("matches", "looked", "match", "match_chars", "match_confidence", IMAGE_ERROR)


class TextStep(Step):
    """Drops pairs of whose captions every one stands in the picture."""

    name = "text"
    order = 30
    reads = ("caption", "image")
    reasons = {"shows_caption": "T: shows its caption"}
    limits = ("min_chars", "min_confidence")
    section = "spotter"
    not_hashed = spotter_settings.NOT_HASHED

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        config.text_spotting = True  # T of CAT: drop captions that their picture shows as text
        config.spotter = spotter_settings.default_spotter()

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        spotter_settings.check_spotter(config.spotter)

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        return config.text_spotting

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        return {"spotting_rules": spotter_settings.RULES_VERSION, "easyocr": easyocr_version()}

    @classmethod
    def package_versions(cls, config: ml_collections.ConfigDict) -> dict[str, str]:
        return {"easyocr": easyocr_version()}

    @classmethod
    def batch_size(cls, config: ml_collections.ConfigDict) -> int | None:
        return config.spotter.window

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        name = os.path.basename(source.path.rstrip("/"))  # independent of the folder of the shard
        part = zlib.crc32(f"{name}\n{source.start}\n{source.stop}".encode())
        max_pixels = config.image.max_pixels
        self._spotter = open_spotter(config.spotter, max_pixels, f"{name}-{part:08x}")
        self._machine: dict[str, str] | None = None

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        verdicts = self._spotter.judge(
            [candidate.pair.image for candidate in batch],
            [candidate.captions for candidate in batch],
        )
        columns: dict[str, list] = {name: [] for name in _COLUMNS}
        for candidate, verdict in zip(batch, verdicts, strict=True):
            values = self._describe(candidate, verdict)
            for name, column in columns.items():
                column.append(values.get(name))
        return columns

    @classmethod
    def decide(cls, columns: Columns, config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
        return {"shows_caption": columns.has("match")}

    @classmethod
    def find_unknown(
        cls, columns: Columns, before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
    ) -> np.ndarray:
        old, new = before.spotter, now.spotter
        unknown = super().find_unknown(columns, before, now)
        several, dropped = columns.numbers("captions") > 1, columns.has("match")
        # By stricter limits of a match only pairs that were dropped may pass, by laxer ones only
        # pairs that passed may be dropped.
        if new.min_chars < old.min_chars or new.min_confidence < old.min_confidence:
            unknown |= ~dropped
        if new.min_chars != old.min_chars:
            unknown |= dropped & (columns.numbers("match_chars") < new.min_chars)
        if new.min_confidence != old.min_confidence:
            least = np.float32(new.min_confidence)
            is_sure = (columns.numbers("match_confidence") >= least) & ~several
            unknown |= dropped & ~is_sure
        # Of several captions others may come here now than those that were looked for.
        fewer, more = compare_captions(before, now)
        if more:
            unknown |= several & dropped
        if fewer:
            unmatched = columns.numbers("matches") == 0
            unknown |= several & ~dropped & ~(unmatched & (not more))
        return unknown

    def close(self) -> dict[str, Any]:
        return {"spotter": self._machine}

    def _describe(self, candidate: Candidate, verdict: Verdict) -> dict[str, Any]:
        """The columns of one pair."""
        if verdict.error is not None:
            return {IMAGE_ERROR: verdict.error.reason}
        if self._machine is None and verdict.looked != "no_run":
            ocr = resolve_for_networks(self._spotter.settings.ocr)
            device = ocr.device.partition(":")[0]
            self._machine = {"precision": ocr.precision, "device": device}
        candidate.spots = verdict.spots
        candidate.of_captions = {"match": list(verdict.matches)}
        looked = "missed" if verdict.missed else "audited" if verdict.audited else verdict.looked
        shown = [match for match in verdict.matches if match is not None]
        values = {"matches": len(shown), "looked": looked}
        if len(shown) < len(verdict.matches):
            return values
        # What the longest of several captions shares with the picture does not decide alone.
        shared = [
            longest_match(text, caption, self._spotter.settings)
            for text, caption in zip(shown, candidate.captions, strict=True)
        ]
        confidence = next((s.confidence for s in verdict.spots if s.text == shown[0]), None)
        return values | {
            "match": shown[0],
            "match_chars": min(shared),
            "match_confidence": confidence,
        }
