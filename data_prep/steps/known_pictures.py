"""Drops known pictures: duplicates of other pairs, and pictures of evaluation sets.

Duplicates are read from a table written by `python -m data_prep.duplicates`. Pictures of evaluation
sets are found by their pixels, by a perceptual hash or by embeddings.
`data_prep.duplicates.image_hashes` hashes pictures, and `data_prep.duplicates.precomputed` reads
embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates import precomputed
from data_prep.duplicates.image_hashes import Match, open_index, try_hash
from data_prep.duplicates.table import Lookup, hash_input, read_summary
from data_prep.sources import Input
from data_prep.steps import models
from data_prep.steps.base import EVIDENCE, Candidate, Step
from diht_jax.config.checks import TextOrSections
from diht_jax.config.keys import COUNT, Key, Range
from diht_jax.readers.base import SourceShard

_LOOKED_AT = 32  # number of inputs to compare with those of the table

_EMBEDDINGS = "config.decontaminate.embeddings"


class DuplicateStep(Step):
    """Drops pairs whose keys are in a table of duplicates."""

    name = "duplicates"
    order = 6  # only a binary search
    reasons = {"exact": "copy of another image", "near": "near-duplicate of another image"}
    keys = {
        # Output folder of data_prep.duplicates for the same pairs; None: no pairs are dropped.
        "duplicates.table": str,
    }
    section = "duplicates"
    switch = "duplicates.table"

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        folder = config.duplicates.table
        try:
            table = Lookup(folder)  # fails early if the table is incomplete or damaged
        except ValueError as error:
            raise ValueError(f"config.duplicates.table={error}") from error
        return super().describe_rules(config) | {"duplicates_table": table.digest}

    @classmethod
    def check_inputs(cls, config: ml_collections.ConfigDict, inputs: Sequence[Input]) -> None:
        folder = config.duplicates.table
        known = (read_summary(folder) or {}).get("inputs")
        looked_at = inputs[:: max(1, len(inputs) // _LOOKED_AT)]
        if known is None or any(_hash_shard(found.shard) in known for found in looked_at):
            return
        logging.warning(
            "config.duplicates.table='%s' was made of other files: none of the %d shards of "
            "config.input that were looked at has the name and size of one of its inputs. Pairs "
            "are dropped by their keys: where both data sets number theirs, the wrong ones",
            folder,
            len(looked_at),
        )

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        self._lookup = Lookup(config.duplicates.table)

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        found = self._lookup.find([candidate.pair.key for candidate in batch])
        reasons = [None if known is None else known.kind for known in found]
        evidence = [None if known is None else known.describe() for known in found]
        return {self.name: reasons, EVIDENCE: evidence}


def _hash_shard(shard: SourceShard) -> str:
    """Returns a shard's hash in the table, or "" if the shard is gone (its task will fail)."""
    try:
        return hash_input(shard)
    except FileNotFoundError:
        return ""


class DecontaminateStep(Step):
    """Drops pairs whose picture is in an evaluation set. The reason is the name of the set."""

    name = "decontaminate"
    order = 22  # after unreadable pictures have been dropped
    reads = ("image",)
    reasons = {}
    keys = {
        # name -> a source (docs/guides/prepare/sources.md) or an index of
        # data_prep.duplicates.image_hashes, such as sets.cifar10 = "/data/cifar10_test.tar"; or one
        # text with all sets, "NAME=PATH,NAME=PATH".
        "decontaminate.sets": TextOrSections,
        "decontaminate.perceptual": True,  # also compare perceptual hashes, not only equal pixels
        "decontaminate.max_bits": Key(6, Range(0, 16)),  # most differing bits of two 64-bit hashes
        # name -> the --output of diht_jax.embed for the set, or a glob of .npz or .parquet files
        # with "key" and "image_emb"; or a text, as above. Names may be the same as in `sets`.
        "decontaminate.embeddings.sets": TextOrSections,
        # Embeddings of the pairs from the same model: the --output of diht_jax.embed for
        # config.input. Alternatively, set `model`.
        "decontaminate.embeddings.pairs": str,
        "decontaminate.embeddings.model": str,  # embedding model, as for diht_jax.load_model
        # Minimum cosine at which two pictures are the same; depends on the model.
        "decontaminate.embeddings.min_cosine": Key(0.85, Range(-1, 1)),
        # Pictures per batch of the model.
        "decontaminate.embeddings.batch_size": Key(64, COUNT),
    }
    section = "decontaminate"

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        c = config.decontaminate.embeddings
        if cls.is_active(config):
            _sets(config)
            _embedded_sets(config)
        if (c.pairs is not None) + (c.model is not None) != bool(c.sets):
            raise ValueError(
                "config.decontaminate.embeddings.sets goes with one of "
                "config.decontaminate.embeddings.pairs and config.decontaminate.embeddings.model"
            )

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        return bool(config.decontaminate.sets or config.decontaminate.embeddings.sets)

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        digests = {name: open_index(path).digest() for name, path in _sets(config).items()}
        rules = super().describe_rules(config) | {"decontaminate_sets": digests}
        c = config.decontaminate.embeddings
        if _embedded_sets(config):
            _open_set.cache_clear()  # a run reads the files as they are now
            rules["decontaminate_embedded_sets"] = {
                name: known.digest() for name, known in _open_embedded(config).items()
            }
            rules["decontaminate_embeddings"] = (
                models.fingerprint(c.model, f"{_EMBEDDINGS}.model")
                if c.model is not None
                else precomputed.describe(c.pairs)
            )
        return rules

    @classmethod
    def batch_size(cls, config: ml_collections.ConfigDict) -> int | None:
        c = config.decontaminate.embeddings
        return None if c.model is None else models.BATCHES * c.batch_size

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        self._sets = {name: open_index(path) for name, path in _sets(config).items()}
        self._embedded = _open_embedded(config)
        c, max_pixels = config.decontaminate.embeddings, config.image.max_pixels
        self._pictures = None
        if self._embedded:
            self._pictures = models.PictureEmbeddings(
                source, c.pairs, f"{_EMBEDDINGS}.pairs", c.model, c.batch_size, max_pixels
            )

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        c, max_pixels = self.config.decontaminate, self.config.image.max_pixels
        matches: list[tuple[str, Sequence[Match | None]]] = []  # one for each set
        if self._sets:
            pictures = [try_hash(candidate.pair.image, max_pixels) for candidate in batch]
            most = c.max_bits if c.perceptual else None
            matches += [(name, index.find(pictures, most)) for name, index in self._sets.items()]
        if self._embedded:
            rows, least = self._embed(batch), c.embeddings.min_cosine
            matches += [(name, known.find(rows, least)) for name, known in self._embedded.items()]
        reasons: list[str | None] = [None] * len(batch)
        evidence: list[str | None] = [None] * len(batch)
        for name, found in matches:
            for number, match in enumerate(found):
                if match is not None and reasons[number] is None:
                    reasons[number] = name
                    evidence[number] = f"{match.key} of {name}: {match.how}"
        return {self.name: reasons, EVIDENCE: evidence}

    def close(self) -> dict[str, Any]:
        if self._pictures is not None:
            self._pictures.warn_of_missing("a comparison")
        return {}

    def _embed(self, batch: Sequence[Candidate]) -> np.ndarray:
        """Returns unit-length embeddings float32 [n, d], with zeros where there is none."""
        assert self._pictures is not None
        embedded = self._pictures.embed([candidate.pair for candidate in batch])
        rows = [row if isinstance(row, np.ndarray) else None for row in embedded]
        known = next(iter(self._embedded.values())).embeddings
        width = next((len(row) for row in rows if row is not None), known.shape[1])
        found = np.zeros((len(batch), width), np.float32)
        for number, row in enumerate(rows):
            if row is not None:
                found[number] = row / max(float(np.linalg.norm(row)), 1e-12)
        return found


def _sets(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns name -> path of the evaluation sets to hash."""
    return _parse(config.decontaminate.sets, "config.decontaminate.sets")


def _embedded_sets(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns name -> path of the evaluation sets' embeddings."""
    return _parse(config.decontaminate.embeddings.sets, f"{_EMBEDDINGS}.sets")


# Sets stay open from one shard to the next.
_open_set = functools.lru_cache(maxsize=64)(precomputed.open_set)


def _open_embedded(config: ml_collections.ConfigDict) -> dict[str, precomputed.EmbeddedSet]:
    """Returns name -> embeddings of the evaluation sets."""
    found = {}
    for name, path in _embedded_sets(config).items():
        try:
            found[name] = _open_set(path)
        except ValueError as error:
            raise ValueError(f"{_EMBEDDINGS}.sets, {name}={error}") from error
    return found


def _parse(sets: str | ml_collections.ConfigDict | None, key: str) -> dict[str, str]:
    """Parses sets given as text or as a section into name -> path.

    Raises:
        ValueError: the sets are not in either form.
    """
    found = list((sets or {}).items()) if not isinstance(sets, str) else []
    if isinstance(sets, str):
        entries = [text.partition("=") for text in filter(None, sets.split(","))]
        found = [(name.strip(), path.strip()) for name, _, path in entries]
    is_wrong = any(not name or not isinstance(path, str) or not path for name, path in found)
    if is_wrong or len(dict(found)) < len(found):
        raise ValueError(
            f"{key}={sets!r}; expected a different name and a path for each, "
            "such as 'cifar10=/data/cifar10_test.tar,coco=/data/coco.npz'"
        )
    return dict(found)
