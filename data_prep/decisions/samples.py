"""Pairs of every outcome to look at: picture, caption, graph, and the text that was spotted.

They are chosen while a shard is filtered and written next to it. Which pairs are chosen depends on
the pairs alone: those of the lowest random rank, so that the choices of shards together are the
choice of the whole. Each line of a file has outcome, rank and a JSON object, with tabs between.
"""

from __future__ import annotations

import base64
import bisect
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from data_prep.captions.graph import CaptionGraph, format_edges, format_objects
from data_prep.text_spotting.spotter import Spot
from diht_jax.input.decode import ImageError, decode_rgb
from diht_jax.storage import files

SUFFIX = ".samples.tsv"

_THUMBNAIL = 256  # px of the longer side
_QUALITY = 80
_MAX_CHARS = 500
_MAX_SPOTS = 40


@dataclasses.dataclass(frozen=True)
class Sample:
    """A pair that may be looked at.

    Attributes:
        key: of the pair.
        caption: its first one, or what is known of it.
        image: encoded; empty where there is none.
        graph: of the caption.
        spots: what the spotter has found.
        match: the spotted text that repeats the caption.
        evidence: for people, what of the pair decided.
    """

    key: str
    caption: str
    image: bytes = b""
    graph: CaptionGraph | None = None
    spots: Sequence[Spot] = ()
    match: str | None = None
    evidence: str | None = None


class SampleLog:
    """Chooses some pairs of each outcome of a shard."""

    def __init__(self, texts: int, pictures: int, seed: int, max_pixels: int):
        """Begins without any.

        Args:
            texts: pairs of each outcome of which key and caption are kept.
            pictures: pairs of each outcome of which everything is kept.
            seed: decides which.
            max_pixels: of a picture that is still decoded.
        """
        self._pictures, self._most = pictures, max(texts, pictures)
        self._seed = seed
        self._max_pixels = max_pixels
        self._chosen: dict[str, list[tuple[str, str, Sample]]] = {}

    def add(self, outcome: str, sample: Sample) -> None:
        """Takes a pair if its rank is low enough, and lets go of the one of the highest rank.

        Args:
            outcome: "kept", or "STAGE/REASON".
            sample: the pair.
        """
        chosen = self._chosen.setdefault(outcome, [])
        entry = rank(self._seed, sample.key, sample.caption), sample.key
        place = bisect.bisect(chosen, entry, key=lambda known: known[:2])
        if place >= self._most:
            return
        chosen.insert(place, (*entry, sample))
        del chosen[self._most :]
        if len(chosen) > self._pictures:  # held without its picture from here on
            last = chosen[self._pictures]
            chosen[self._pictures] = (*last[:2], Sample(last[2].key, last[2].caption))

    def write(self, path: str) -> None:
        """Writes the samples; equal pairs give equal bytes."""
        lines = []
        for outcome, chosen in sorted(self._chosen.items()):
            for number, (found, _, sample) in enumerate(chosen):
                described = self._describe(sample, number < self._pictures)
                text = json.dumps(described, ensure_ascii=False, sort_keys=True)
                lines.append(f"{outcome}\t{found}\t{text}\n")
        # A lone surrogate may stand in the caption of a pair that was dropped.
        files.write_bytes(path, "".join(lines).encode("utf-8", "replace"))

    def _describe(self, sample: Sample, is_whole: bool) -> dict[str, Any]:
        described = {"key": sample.key, "caption": sample.caption[:_MAX_CHARS]}
        if not is_whole:
            return described
        described |= {
            "graph": None,
            "spots": [
                [[round(x, 1) for x in map(float, spot.box)], spot.text, spot.confidence]
                for spot in sample.spots[:_MAX_SPOTS]
            ],
            "match": sample.match,
            **self._shrink(sample.image),
        }
        if sample.evidence is not None:
            described["evidence"] = sample.evidence[:_MAX_CHARS]
        if sample.graph is not None and sample.graph.drop_reason is None:
            described["graph"] = {
                "objects": format_objects(sample.graph),
                "actions": format_edges(sample.graph.actions),
                "relations": format_edges(sample.graph.relations),
                "complexity": sample.graph.complexity,
            }
        return described

    def _shrink(self, data: bytes) -> dict[str, Any]:
        """Size of the image, and a small version of it; or why there is none."""
        if not data:
            return {"size": None, "image": None, "error": None}
        try:
            image = decode_rgb(data, max_pixels=self._max_pixels)
        except ImageError as error:
            return {"size": None, "image": None, "error": error.reason}
        size = list(image.size)
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
        text = base64.b64encode(buffer.getvalue()).decode()
        return {"size": size, "image": text, "error": None}


def rank(seed: int, key: str, text: str) -> str:
    """Random rank of a pair, the same for any order and number of shards."""
    data = f"{seed}\n{key}\n{text}".encode("utf-8", "replace")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def choose_samples(contents: Iterable[bytes], most: int) -> dict[str, list[dict[str, Any]]]:
    """Samples of the lowest ranks of any number of shards.

    Args:
        contents: of the files of `SampleLog.write`.
        most: samples of each outcome.

    Returns:
        Outcome -> its samples in the order of their ranks, which they have as "rank".
    """
    chosen: dict[bytes, list[tuple[bytes, bytes]]] = {}
    for content in contents:
        for line in content.splitlines():
            outcome, found, text = line.split(b"\t", 2)
            known = chosen.setdefault(outcome, [])
            if len(known) < most or found < known[-1][0]:
                bisect.insort(known, (found, text))
                del known[most:]
    return {
        outcome.decode(): [{"rank": found.decode()} | json.loads(text) for found, text in known]
        for outcome, known in sorted(chosen.items())
    }
