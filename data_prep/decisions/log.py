"""All that is recorded while one shard is filtered: its decisions, samples, concepts and times.

The time goes into a file of its own, so that everything else has the same bytes in every run.

Samples are pairs of every outcome to look at: picture, caption, graph, and the text that was
spotted. They depend on the pairs alone: those of the lowest random rank are chosen, so that the
choices of shards together are the choice of the whole. Each line of their file has outcome, rank
and a JSON object, with tabs between. The pairs of the lowest and of the highest scores of a step
are samples as well, kept or dropped: in the place of the outcome stands "SCORE/lowest" or
"SCORE/highest".
"""

from __future__ import annotations

import base64
import bisect
import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import operator
import os
import platform
import struct
import time
import types
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from data_prep.captions.graph import CaptionGraph, format_edges, format_objects
from data_prep.captions.mentions import CONCEPTS_SUFFIX, ConceptLog, find_mentions
from data_prep.decisions import table
from data_prep.decisions.table import KEPT, SOURCE, DecisionWriter, decisions_path, pack_uid
from data_prep.steps import registry
from data_prep.steps.base import Candidate
from data_prep.text_spotting.spotter import Spot
from diht_jax.input.transforms import ImageError, decode_rgb, encode
from diht_jax.readers.base import Skipped
from diht_jax.storage import files

SECONDS_SUFFIX = ".seconds.json"
SAMPLES_SUFFIX = ".samples.tsv"
EXTREMES = {"lowest": 1, "highest": -1}  # of a score; the sign with which it is ranked

_THUMBNAIL = 256  # px of the longer side
_QUALITY = 80
_MAX_CHARS = 500
_MAX_SPOTS = 40
_HASH_CHARS = 33  # of the line behind the samples


class ShardLog:
    """The log of one shard."""

    def __init__(self, config: ml_collections.ConfigDict, pictures: int | None = None):
        """Begins an empty log.

        Args:
            config: of `filtering.config.default_config`.
            pictures: samples with pictures; None for as many as the config asks for.
        """
        pictures = config.report_samples if pictures is None else pictures
        self._samples = SampleLog(
            config.samples_per_outcome, pictures, config.seed, config.image.max_pixels
        )
        self._scores: list[str] = []
        for step in registry.active_steps(config):
            self._scores += step.scores
        self._decisions = DecisionWriter(self._scores)
        self._concepts = ConceptLog() if config.concepts else None
        self._label_field = config.label_field
        self._formats: collections.Counter[str] = collections.Counter()
        self._read = self.kept = 0  # pairs
        self._cpu_secs: dict[str, float] = collections.defaultdict(float)
        self._start = time.perf_counter(), time.process_time()

    @contextlib.contextmanager
    def clock(self, stage: str) -> Generator[None]:
        """Adds the processor time of a block to that of its stage."""
        start_secs = time.process_time()
        try:
            yield
        finally:
            self._cpu_secs[stage] += time.process_time() - start_secs

    def skip(self, entry: Skipped, row: int) -> None:
        """Records an entry of the source that is no pair."""
        self._read += 1
        decided = {"outcome": SOURCE, "reason": entry.reason, "captions": 0}
        self._decisions.add(row, decided | {"key": _clean(entry.key)})
        self._samples.add(f"{SOURCE}/{entry.reason}", Sample(entry.key, entry.detail))

    def drop(
        self, candidate: Candidate, stage: str, reason: str, evidence: str | None = None
    ) -> None:
        """Records a pair that was dropped."""
        self._decide(candidate, {"outcome": stage, "reason": reason, "format": None})
        graph, text = candidate.first_graph, candidate.pair.caption
        self._sample(f"{stage}/{reason}", candidate, text, graph, evidence)

    def keep(self, candidate: Candidate, image_format: str | None = None) -> None:
        """Records a pair that was kept; its image is written in this format."""
        self.kept += 1
        if image_format is not None:
            self._formats[image_format] += 1
        self._decide(candidate, {"outcome": KEPT, "format": image_format})
        if self._concepts is not None:
            self._concepts.add(find_mentions(candidate.graphs))
        graph = candidate.graphs[0] if candidate.graphs else None
        self._sample(KEPT, candidate, candidate.captions[0], graph)

    def write(self, output: str) -> dict[str, Any]:
        """Writes the files next to the output; returns counts, which are the same in every run."""
        counts: dict[str, Any] = {
            "read": self._read,
            "kept": self.kept,
            "image_formats": dict(sorted(self._formats.items())),
        }
        self._decisions.write(decisions_path(output))
        self._samples.write(output + SAMPLES_SUFFIX)
        if self._concepts is not None:
            self._concepts.write(output + CONCEPTS_SUFFIX)
            counts["concepts"] = self._concepts.counts()
        wall_secs, cpu_secs = self._start
        seconds = {
            "worker": f"{platform.node()}:{os.getpid()}",
            "pairs": self._read,
            "kept": self.kept,
            "wall_secs": round(time.perf_counter() - wall_secs, 4),
            "cpu_secs": round(time.process_time() - cpu_secs, 4),
            "cpu_secs_of_stages": {k: round(v, 4) for k, v in sorted(self._cpu_secs.items())},
        }
        files.write_object(output + SECONDS_SUFFIX, seconds)
        return counts

    def _sample(
        self,
        outcome: str,
        candidate: Candidate,
        text: str,
        graph: CaptionGraph | None,
        evidence: str | None = None,
    ) -> None:
        """Takes a pair as a sample of its outcome, and of the ends of each of its scores."""
        values, pair = candidate.values, candidate.pair
        scores = {name: values[name] for name in self._scores if values.get(name) is not None}
        match = values.get("match")
        sample = Sample(
            pair.key, text, pair.image, graph, candidate.spots, match, evidence, outcome, scores
        )
        self._samples.add(outcome, sample)
        for name, score in scores.items():
            if math.isfinite(score):
                for end, sign in EXTREMES.items():
                    self._samples.add(f"{name}/{end}", sample, sortable_digits(sign * score))

    def _decide(self, candidate: Candidate, decided: dict[str, Any]) -> None:
        """Adds the row of a pair."""
        self._read += 1
        pair = candidate.pair
        row: dict[str, Any] = candidate.values | {
            "key": _clean(pair.key),
            "uid": pack_uid(pair.metadata.get("uid")),
            "words": len(pair.caption.split()),
            **decided,
        }
        if self._label_field is not None:
            row["label"] = _clean(str(pair.metadata.get(self._label_field)))
        for name in ("object_names", "action_names"):
            if row.get(name):
                row[name] = list(map(_clean, row[name]))
        if row.get("match") is not None:
            row["match"] = _clean(row["match"])
        self._decisions.add(candidate.row, row)


def _clean(text: str) -> str:
    """Text without lone surrogates, which no file takes."""
    return text.encode("utf-8", "replace").decode()


class Sample(NamedTuple):
    """A pair that may be looked at.

    Attributes:
        caption: the first one, or what is known of it.
        image: encoded; empty where there is none.
        match: the spotted text that repeats the caption.
        evidence: for people, what of the pair decided.
        scores: name -> score, of the steps that gave it one.
    """

    key: str
    caption: str
    image: bytes = b""
    graph: CaptionGraph | None = None
    spots: Sequence[Spot] = ()
    match: str | None = None
    evidence: str | None = None
    outcome: str = ""
    scores: Mapping[str, float] = types.MappingProxyType({})


@dataclasses.dataclass
class SampleLog:
    """Chooses some pairs of each outcome of a shard."""

    texts: int  # pairs of each outcome of which key and caption are kept
    pictures: int  # those of which everything is
    seed: int
    max_pixels: int  # of a picture that is shown
    chosen: dict[str, list[tuple[str, str, Sample]]] = dataclasses.field(default_factory=dict)

    def add(self, outcome: str, sample: Sample, order: str = "") -> None:
        """Takes a pair if its rank is low enough, and lets go of the one of the highest rank.

        `order` ranks it before the random rank, which is the same for any number of shards.
        """
        chosen, most = self.chosen.setdefault(outcome, []), max(self.texts, self.pictures)
        data = f"{self.seed}\n{sample.key}\n{sample.caption}".encode("utf-8", "replace")
        entry = order + hashlib.blake2b(data, digest_size=8).hexdigest(), sample.key
        place = bisect.bisect(chosen, entry, key=operator.itemgetter(0, 1))
        if place >= most:
            return
        chosen.insert(place, (*entry, sample))
        del chosen[most:]
        if len(chosen) > self.pictures:  # held without its picture from here on
            last = chosen[self.pictures]
            chosen[self.pictures] = (*last[:2], Sample(last[2].key, last[2].caption))

    def write(self, path: str) -> None:
        """Writes the samples; equal pairs give equal bytes."""
        lines = []
        for outcome, chosen in sorted(self.chosen.items()):
            for number, (found, _, sample) in enumerate(chosen):
                described = {"key": sample.key, "caption": sample.caption[:_MAX_CHARS]}
                if number < self.pictures:
                    described |= _describe(sample, self.max_pixels)
                text = json.dumps(described, ensure_ascii=False, sort_keys=True)
                lines.append(f"{outcome}\t{found}\t{text}\n")
        # A lone surrogate may stand in the caption of a pair that was dropped.
        data = "".join(lines).encode("utf-8", "replace")
        files.write_bytes(path, data + table.hash_file(path, data).hex().encode() + b"\n")


def _describe(sample: Sample, max_pixels: int) -> dict[str, Any]:
    """All that is shown of a sample; its image small, or why there is none."""
    found: dict[str, Any] = {"size": None, "image": None, "error": None, "graph": None}
    found["match"] = sample.match
    found["spots"] = []
    for spot in sample.spots[:_MAX_SPOTS]:
        box = [round(float(x), 1) for x in spot.box]
        found["spots"].append([box, spot.text, spot.confidence])
    if sample.scores:
        found["scores"] = {name: round(score, 4) for name, score in sample.scores.items()}
        found["became"] = sample.outcome
    if sample.evidence is not None:
        found["evidence"] = sample.evidence[:_MAX_CHARS]
    if sample.graph is not None and sample.graph.drop_reason is None:
        found["graph"] = {
            "objects": format_objects(sample.graph),
            "actions": format_edges(sample.graph.actions),
            "relations": format_edges(sample.graph.relations),
            "complexity": sample.graph.complexity,
        }
    if sample.image:
        try:
            image = decode_rgb(sample.image, max_pixels=max_pixels)
        except ImageError as error:
            return found | {"error": error.reason}
        found["size"] = list(image.size)
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        data = encode(image, "JPEG", quality=_QUALITY, optimize=True)
        found["image"] = base64.b64encode(data).decode()
    return found


def sortable_digits(number: float) -> str:
    """16 hexadecimal digits that have the order of the numbers."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", number))
    return f"{bits ^ (2**64 - 1 if bits >> 63 else 2**63):016x}"


def read_samples(path: str) -> bytes:
    """The lines that `SampleLog.write` wrote; the last one of the file is a hash of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    content = files.read_bytes(path)
    data = content[:-_HASH_CHARS]
    if content != data + table.hash_file(path, data).hex().encode() + b"\n":
        raise ValueError(f"{path}: damaged; delete it, and run the filter again")
    return data


def choose_samples(contents: Iterable[bytes], most: int) -> dict[str, list[dict[str, Any]]]:
    """Samples of the lowest ranks, up to `most` of each outcome.

    Takes what `read_samples` gives of any number of shards.

    Returns:
        Outcome -> its samples in the order of their ranks, which they have as "rank".
    """
    chosen: dict[bytes, list[tuple[bytes, bytes]]] = {}
    for content in contents:
        for line in content.splitlines():
            outcome, found, text = line.split(b"\t", 2)
            known = chosen.setdefault(outcome, [])
            if most and (len(known) < most or found < known[-1][0]):
                bisect.insort(known, (found, text))
                del known[most:]
    samples: dict[str, list[dict[str, Any]]] = {}
    for outcome, known in sorted(chosen.items()):
        samples[outcome.decode()] = [
            {"rank": found.decode()} | json.loads(text) for found, text in known
        ]
    return samples
