"""Records what happens while a shard is filtered: decisions, samples, concepts and times.

Times are written to a separate file, so that all other files have the same bytes in every run.

Samples are pairs of each outcome to look at: picture, caption, graph, and spotted text. The pairs
with the lowest random rank are chosen, so samples depend on the pairs alone and those of several
shards can be merged. A line of the samples file is outcome, rank and a JSON object, separated by
tabs. The pairs with a step's lowest and highest scores are samples too, whether kept or dropped;
their outcome is "SCORE/lowest" or "SCORE/highest".
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
EXTREMES = {"lowest": 1, "highest": -1}  # end of the scores -> sign of the score in the rank

_THUMBNAIL = 256  # px of the longer side
_QUALITY = 80
_MAX_CHARS = 500
_MAX_SPOTS = 40
_HASH_CHARS = 33  # length of the last line, a hash of the samples


class ShardLog:
    """Records the decisions, samples, concepts and times of one shard."""

    def __init__(self, config: ml_collections.ConfigDict, pictures: int | None = None):
        """Creates an empty log.

        Args:
            config: the filter's config, as from `filtering.config.default_config`.
            pictures: number of samples with pictures per outcome; None uses the config's.
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
        """Adds the CPU time of a block to that of its stage."""
        start_secs = time.process_time()
        try:
            yield
        finally:
            self._cpu_secs[stage] += time.process_time() - start_secs

    def skip(self, entry: Skipped, row: int) -> None:
        """Records an entry of the source that is not a pair."""
        self._read += 1
        decided = {"outcome": SOURCE, "reason": entry.reason, "captions": 0}
        self._decisions.add(row, decided | {"key": _clean(entry.key)})
        self._samples.add(f"{SOURCE}/{entry.reason}", Sample(entry.key, entry.detail))

    def drop(
        self, candidate: Candidate, stage: str, reason: str, evidence: str | None = None
    ) -> None:
        """Records a dropped pair."""
        self._decide(candidate, {"outcome": stage, "reason": reason, "format": None})
        graph, text = candidate.first_graph, candidate.pair.caption
        self._sample(f"{stage}/{reason}", candidate, text, graph, evidence)

    def keep(self, candidate: Candidate, image_format: str | None = None) -> None:
        """Records a kept pair, whose image is written in the given format."""
        self.kept += 1
        if image_format is not None:
            self._formats[image_format] += 1
        self._decide(candidate, {"outcome": KEPT, "format": image_format})
        if self._concepts is not None:
            self._concepts.add(find_mentions(candidate.graphs))
        graph = candidate.graphs[0] if candidate.graphs else None
        self._sample(KEPT, candidate, candidate.captions[0], graph)

    def write(self, output: str) -> dict[str, Any]:
        """Writes the files next to the output. Returns counts, which are equal in every run."""
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
        """Offers a pair as a sample of its outcome, and of both ends of each of its scores."""
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
        """Adds the decision row of a pair."""
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
    """Replaces lone surrogates, which cannot be written to files."""
    return text.encode("utf-8", "replace").decode()


class Sample(NamedTuple):
    """A pair for people to look at.

    Attributes:
        caption: the first caption, or for an entry that is not a pair, what is known of it.
        image: encoded image, or empty if there is none.
        match: the spotted text that repeats the caption.
        evidence: what in the pair decided, for people.
        scores: name -> score, for all steps that scored the pair.
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
    """Chooses samples of each outcome in a shard."""

    texts: int  # number of pairs per outcome to keep with key and caption
    pictures: int  # number of pairs per outcome to keep with everything
    seed: int
    max_pixels: int  # maximum number of pixels of a picture to show
    chosen: dict[str, list[tuple[str, str, Sample]]] = dataclasses.field(default_factory=dict)

    def add(self, outcome: str, sample: Sample, order: str = "") -> None:
        """Adds a pair if its rank is low enough, and removes the pair with the highest rank.

        `order` takes precedence over the random rank, which does not depend on the sharding.
        """
        chosen, most = self.chosen.setdefault(outcome, []), max(self.texts, self.pictures)
        data = f"{self.seed}\n{sample.key}\n{sample.caption}".encode("utf-8", "replace")
        entry = order + hashlib.blake2b(data, digest_size=8).hexdigest(), sample.key
        place = bisect.bisect(chosen, entry, key=operator.itemgetter(0, 1))
        if place >= most:
            return
        chosen.insert(place, (*entry, sample))
        del chosen[most:]
        if len(chosen) > self.pictures:  # the picture is no longer needed
            last = chosen[self.pictures]
            chosen[self.pictures] = (*last[:2], Sample(last[2].key, last[2].caption))

    def write(self, path: str) -> None:
        """Writes the samples. Equal pairs produce equal bytes."""
        lines = []
        for outcome, chosen in sorted(self.chosen.items()):
            for number, (found, _, sample) in enumerate(chosen):
                described = {"key": sample.key, "caption": sample.caption[:_MAX_CHARS]}
                if number < self.pictures:
                    described |= _describe(sample, self.max_pixels)
                text = json.dumps(described, ensure_ascii=False, sort_keys=True)
                lines.append(f"{outcome}\t{found}\t{text}\n")
        # The caption of a dropped pair may contain a lone surrogate.
        data = "".join(lines).encode("utf-8", "replace")
        files.write_bytes(path, data + table.hash_file(path, data).hex().encode() + b"\n")


def _describe(sample: Sample, max_pixels: int) -> dict[str, Any]:
    """Returns what the report shows of a sample: a thumbnail or an error, and the findings."""
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
    """Returns 16 hexadecimal digits that sort like the numbers."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", number))
    return f"{bits ^ (2**64 - 1 if bits >> 63 else 2**63):016x}"


def read_samples(path: str) -> bytes:
    """Reads the lines of a file by `SampleLog.write`, and checks its last line, their hash.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged.
    """
    content = files.read_bytes(path)
    data = content[:-_HASH_CHARS]
    if content != data + table.hash_file(path, data).hex().encode() + b"\n":
        raise ValueError(f"{path}: damaged; delete it, and run the filter again")
    return data


def choose_samples(contents: Iterable[bytes], most: int) -> dict[str, list[dict[str, Any]]]:
    """Merges samples: returns those of the lowest ranks, at most `most` per outcome.

    `contents` are results of `read_samples` for any number of shards.

    Returns:
        Outcome -> its samples, sorted by rank, each with its "rank".
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
