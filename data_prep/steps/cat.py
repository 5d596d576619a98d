"""CAT filter steps: complexity and action of captions, readable images, and text-spotting.

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". Of a pair's captions,
the good ones are kept. Captions are parsed in `data_prep.captions`; text is spotted and matched in
`data_prep.text_spotting`.
"""

from __future__ import annotations

import collections
import functools
import importlib.metadata
import itertools
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep import captions
from data_prep.captions.graph import GATE_REASONS, CaptionGraph
from data_prep.steps.base import IMAGE_ERROR, Candidate, Columns, Step
from data_prep.text_spotting import settings as spotter_settings
from data_prep.text_spotting.match import SURE
from data_prep.text_spotting.ocr import resolve_for_networks
from data_prep.text_spotting.readings import longest_match
from data_prep.text_spotting.spotter import TextSpotter, Verdict, open_spotter
from diht_jax.config.keys import COUNT, Key, Range
from diht_jax.input import transforms
from diht_jax.readers.base import SourceShard

_MOST = 255  # higher complexities are recorded, and decided about, as this value
_CAPTION_COLUMNS = ("captions", "gate", "complexity", "actions", "best_complexity")
_CAPTION_COLUMNS += ("best_active_complexity", "object_names", "action_names")

_IMAGE_COLUMNS = ("format", "width", "height", IMAGE_ERROR)
_TEXT_COLUMNS = ("matches", "looked", "match", "match_chars", "match_confidence", IMAGE_ERROR)


class CaptionStep(Step):
    """C and A of CAT: drops pairs without a caption that passes the gates, C and A."""

    name = "caption"
    order = 10
    reasons = {
        "empty": "no words",
        "file_name": "file name",
        "url": "url",
        "not_english": "not english",
        "complexity": "C: complexity",
        "no_action": "A: no action",
    }
    limits = ("complexity", "min_complexity", "action")
    keys = {
        "complexity": True,  # C of CAT: drop captions with a complexity below min_complexity
        # Number of attributes and relations of the caption's most complex object.
        "min_complexity": Key(1, Range(0, _MOST)),
        "action": True,  # A of CAT: drop captions without an action
    }
    timer = "captions"

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        """Whether captions are filtered or described; otherwise the parser is not even loaded."""
        return drops_captions(config) or config.concepts or config.metadata_only

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        is_wanted = drops_captions(config) or config.concepts
        return {"caption_rules": captions.RULES_VERSION} if is_wanted else {}

    @classmethod
    def package_versions(cls, config: ml_collections.ConfigDict) -> dict[str, str]:
        return captions.package_versions()

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        from data_prep.captions.parse import parse_captions  # loads spaCy, only needed here

        self._parse = parse_captions
        self._parse([])  # loads the parser

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        texts: list[str] = []
        for candidate in batch:
            texts += candidate.captions
        parsed = iter(self._parse(texts))
        columns: dict[str, list[Any]] = collections.defaultdict(list)
        for candidate in batch:
            graphs = list(itertools.islice(parsed, len(candidate.captions)))
            candidate.graphs, candidate.first_graph = graphs, graphs[0]
            rows = list(map(_describe, graphs))
            values = rows[0] | {"captions": min(len(graphs), _MOST)}
            if rows[0]["gate"] is None:
                values["object_names"] = list(graphs[0].objects)
                values["action_names"] = sorted({edge.predicate for edge in graphs[0].actions})
            if len(graphs) > 1:
                candidate.of_captions = {name: [row[name] for row in rows] for name in rows[0]}
                found = [row for row in rows if row["gate"] is None]
                for name in ("best_complexity", "best_active_complexity"):
                    values[name] = max((row["complexity"] for row in found), default=None)
                    found = [row for row in found if row["actions"]]
            for name in _CAPTION_COLUMNS:
                columns[name].append(values.get(name))
        return columns

    @classmethod
    def decide(cls, columns: Columns, config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
        if not drops_captions(config):
            return {}
        limits = caption_limits(config)
        complexity, actions = columns.numbers("complexity"), columns.numbers("actions")
        best = np.where(actions > 0, complexity, np.nan) if limits["require_action"] else complexity
        name = "best_active_complexity" if limits["require_action"] else "best_complexity"
        best = np.where(columns.numbers("captions") > 1, columns.numbers(name), best)
        is_bad = ~(best >= limits["min_complexity"])
        is_simple = complexity < limits["min_complexity"]
        reasons = {}
        for reason in GATE_REASONS:
            reasons[reason] = is_bad & columns.is_text("gate", reason)
        return reasons | {"complexity": is_bad & is_simple, "no_action": is_bad}


def caption_limits(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns C and A as arguments of `batches.CaptionFilter` and `captions.graph.cat_reason`."""
    return {
        "min_complexity": config.min_complexity if config.complexity else 0,
        "require_action": config.action,
    }


def drops_captions(config: ml_collections.ConfigDict) -> bool:
    """Returns whether captions are dropped, even if only by the gates."""
    return config.complexity or config.action


def compare_captions(
    before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
) -> tuple[bool, bool]:
    """Returns whether fewer, and whether more, captions of a pair may pass with the new config."""
    old, new = (
        tuple(caption_limits(config).values()) if drops_captions(config) else (-1, False)
        for config in (before, now)
    )
    return (
        any(b > a for a, b in zip(old, new, strict=True)),
        any(b < a for a, b in zip(old, new, strict=True)),
    )


def _describe(graph: CaptionGraph) -> dict[str, Any]:
    """Returns the columns of one caption."""
    if graph.drop_reason is not None:
        return {"captions": 1, "gate": graph.drop_reason, "complexity": None, "actions": None}
    complexity, actions = min(graph.complexity, _MOST), min(len(graph.actions), _MOST)
    return {"captions": 1, "gate": None, "complexity": complexity, "actions": actions}


class ImageStep(Step):
    """Drops pairs whose image is unreadable, too large or too small."""

    name = "image"
    order = 20
    reads = ("image",)
    reasons = {
        "empty": "no bytes",
        "unreadable": "unreadable",
        "too_large": "too large",
        "too_small": "too small",
    }
    keys = {
        # Largest width times height of an image; larger ones are dropped without decoding.
        "image.max_pixels": Key(transforms.MAX_PIXELS, COUNT),
        "image.min_side": Key(1, COUNT),  # px; images with a shorter side are dropped
        # px; larger images are shrunk and written as JPEG; None keeps the original bytes
        "image.max_side": Key(int, COUNT),
        "image.jpeg_quality": Key(90, Range(1, 95)),  # quality of shrunk images
    }
    timer = "images"
    section = "image"

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        return {}  # covered by the filter's format version

    @classmethod
    def package_versions(cls, config: ml_collections.ConfigDict) -> dict[str, str]:
        return {"pillow": importlib.metadata.version("pillow")}

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        columns: dict[str, list] = collections.defaultdict(list)
        for candidate in batch:
            data, error, header = candidate.pair.image, None, (None, None, None)
            try:
                header = transforms.check_readable(data, max_pixels=self.config.image.max_pixels)
            except transforms.ImageError as found:
                error = found.reason
            for name, value in zip(_IMAGE_COLUMNS, (*header, error), strict=True):
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
        if new.max_pixels > old.max_pixels:  # these were never decoded
            unknown |= columns.is_text(IMAGE_ERROR, "too_large")
        if new.max_side != old.max_side:  # only images to be shrunk are decoded at full size
            dropped = cls.decide(columns, now)
            longer = np.fmax(columns.numbers("width"), columns.numbers("height"))
            was_shrunk = columns.is_text("outcome", "kept") & (longer > (old.max_side or np.inf))
            shrinks = (longer > (new.max_side or np.inf)) & ~was_shrunk
            unknown |= (shrinks & ~dropped["too_small"]) | (dropped["unreadable"] & (longer > 0))
            unknown &= ~dropped["too_large"]
        return unknown


class TextStep(Step):
    """T of CAT: drops pairs whose picture shows all of their captions as text."""

    name = "text"
    order = 30
    reads = ("caption", "image")
    reasons = {"shows_caption": "T: shows its caption"}
    limits = ("min_chars", "min_confidence")
    keys = {
        "text_spotting": True,  # T of CAT: drop captions that the picture shows as text
        **{f"spotter.{name}": key for name, key in spotter_settings.KEYS.items()},
    }
    section = "spotter"
    not_hashed = spotter_settings.NOT_HASHED
    switch = "text_spotting"
    _machine: dict[str, str] | None = None

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        spotter_settings.check_spotter(config.spotter)

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        return {
            "spotting_rules": spotter_settings.RULES_VERSION,
            "easyocr": spotter_settings.easyocr_version(),
        }

    @classmethod
    def package_versions(cls, config: ml_collections.ConfigDict) -> dict[str, str]:
        return {"easyocr": spotter_settings.easyocr_version()}

    @classmethod
    def batch_size(cls, config: ml_collections.ConfigDict) -> int | None:
        return config.spotter.window

    @functools.cached_property
    def _spotter(self) -> TextSpotter:
        """The spotter of the shard, opened for the first pair that reaches the step."""
        source, max_pixels = self.source, self.config.image.max_pixels
        name = os.path.basename(source.path.rstrip("/"))  # independent of the folder of the shard
        part = zlib.crc32(f"{name}\n{source.start}\n{source.stop}".encode())
        return open_spotter(self.config.spotter, max_pixels, f"{name}-{part:08x}")

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        verdicts = self._spotter.judge(
            [candidate.pair.image for candidate in batch],
            [candidate.captions for candidate in batch],
        )
        columns: dict[str, list] = collections.defaultdict(list)
        for values in map(self._describe, batch, verdicts):
            for name in _TEXT_COLUMNS:
                columns[name].append(values.get(name))
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
        # With stricter limits only dropped pairs may change (they may pass), with laxer limits only
        # passed pairs (they may be dropped).
        if new.min_chars < old.min_chars or new.min_confidence < old.min_confidence:
            unknown |= ~dropped
        if new.min_chars != old.min_chars:
            unknown |= dropped & (columns.numbers("match_chars") < new.min_chars)
        if new.min_confidence != old.min_confidence:
            least = np.float32(new.min_confidence)
            is_sure = (columns.numbers("match_confidence") >= least) & ~several
            unknown |= dropped & ~is_sure
            # Confident lines count against a match, but only from min_confidence on.
            unknown |= new.weigh_words and max(old.min_confidence, new.min_confidence) > SURE
        # Other captions of a pair may reach this step now than those that were matched then.
        fewer, more = compare_captions(before, now)
        least, least_now = (
            -np.inf if c.clip.min_score is None else c.clip.min_score for c in (before, now)
        )
        fewer, more = fewer or least_now > least, more or least_now < least
        if more:
            unknown |= several & dropped
        if fewer:
            unmatched = columns.numbers("matches") == 0
            unknown |= several & ~dropped & ~(unmatched & (not more))
        return unknown

    def close(self) -> dict[str, Any]:
        return {"spotter": self._machine}

    def _describe(self, candidate: Candidate, verdict: Verdict) -> dict[str, Any]:
        """Returns the columns of one pair."""
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
        # A pair is dropped only if all of its captions match, so the weakest match decides.
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
