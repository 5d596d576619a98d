"""Pairs of every outcome to look at: picture, caption, graph, and the text that was spotted.

They are chosen while a shard is filtered and written beside it. Which pairs are chosen depends on
the pairs alone: those of the lowest random rank, so that the choices of shards together are the
choice of the whole.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import heapq
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from data_prep.captions.graph import CaptionGraph, format_edges, format_objects
from data_prep.text_spotting.spotter import Spot
from diht_jax.input.decode import ImageError, decode_rgb
from diht_jax.storage import files

SAMPLES_SUFFIX = ".samples.json"

_THUMBNAIL = 256  # px of the longer side
_QUALITY = 80
_MAX_CHARS = 500
_MAX_SPOTS = 40


@dataclasses.dataclass(frozen=True)
class _Chosen:
    rank: str
    key: str
    caption: str
    image: bytes
    graph: CaptionGraph | None
    spots: Sequence[Spot]
    match: str | None
    evidence: str | None


class SampleLog:
    """Chooses up to so many pairs of each outcome."""

    def __init__(self, per_outcome: int, max_pixels: int):
        """Begins without any.

        Args:
            per_outcome: pairs that are kept.
            max_pixels: of a picture that is still decoded.
        """
        self._per_outcome = per_outcome
        self._max_pixels = max_pixels
        self._chosen: dict[str, list[_Chosen]] = {}

    def wants(self, outcome: str, rank: str) -> bool:
        """Whether a pair of this rank would be among the chosen, as things stand."""
        chosen = self._chosen.get(outcome, ())
        if len(chosen) < self._per_outcome:
            return True
        return bool(chosen) and rank < chosen[-1].rank

    def add(
        self,
        outcome: str,
        rank: str,
        *,
        key: str,
        caption: str,
        image: bytes = b"",
        graph: CaptionGraph | None = None,
        spots: Sequence[Spot] = (),
        match: str | None = None,
        evidence: str | None = None,
    ) -> None:
        """Takes a pair, and lets go of the one whose rank is too high now.

        Args:
            outcome: "kept", or "STAGE/REASON".
            rank: random, of `Funnel.rank`.
            key: of the pair.
            caption: its first one.
            image: encoded; nothing where there is none.
            graph: of the caption.
            spots: what the spotter has found.
            match: the spotted text that repeats the caption.
            evidence: for people, what of the pair decided.
        """
        chosen = self._chosen.setdefault(outcome, [])
        chosen.append(_Chosen(rank, key, caption, image, graph, spots, match, evidence))
        chosen.sort(key=lambda sample: (sample.rank, sample.key))
        del chosen[self._per_outcome :]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the samples, one JSON object a line; equal pairs give equal bytes."""
        lines = [
            json.dumps(self._describe(outcome, sample), ensure_ascii=False, sort_keys=True)
            for outcome, chosen in sorted(self._chosen.items())
            for sample in chosen
        ]
        text = "".join(f"{line}\n" for line in lines)
        # A lone surrogate may stand in the caption of a pair that was dropped.
        files.write_bytes(os.fspath(path), text.encode("utf-8", "replace"))

    def _describe(self, outcome: str, sample: _Chosen) -> dict[str, Any]:
        described = {
            "outcome": outcome,
            "rank": sample.rank,
            "key": sample.key,
            "caption": sample.caption[:_MAX_CHARS],
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


def read_samples(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The samples of one shard, as `SampleLog.write` wrote them; none where the file is missing."""
    with contextlib.suppress(FileNotFoundError):
        yield from map(json.loads, files.read_bytes(os.fspath(path)).splitlines())


def choose_samples(samples: Iterable[dict[str, Any]], per_outcome: int) -> list[dict[str, Any]]:
    """Those of the lowest ranks of each outcome, of any number of shards.

    Args:
        samples: of `read_samples`, in any order; no more than the chosen ones are held.
        per_outcome: how many.

    Returns:
        In the order of outcome and rank.
    """
    chosen: dict[str, list[dict[str, Any]]] = {}

    def order(sample: dict[str, Any]) -> tuple[str, str]:
        return sample["rank"], sample["key"]

    for sample in samples:
        of_outcome = chosen.setdefault(sample["outcome"], [])
        of_outcome.append(sample)
        if len(of_outcome) > 4 * per_outcome:
            chosen[sample["outcome"]] = heapq.nsmallest(per_outcome, of_outcome, key=order)
    return [
        sample
        for _, of_outcome in sorted(chosen.items())
        for sample in sorted(of_outcome, key=order)[:per_outcome]
    ]
