"""Stores the concepts that the captions of each kept pair mention, one file per shard.

The filter writes the file, because it parses the captions anyway; `data_prep.label` reads it. The
shard's statistics hold counts of the same concepts. The file is an npz with these arrays for each
kind ("objects", "attributes"):

    KIND_names    uint8, the shard's concepts in alphabetical order, as UTF-8 lines
    KIND_lengths  uint16 [n], number of concepts of each record, in the order of the shard
    KIND_ids      int32 [sum of lengths], indices into the names, ascending within a record
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from data_prep.captions.graph import CaptionGraph
from data_prep.captions.lexicon import CALENDAR
from diht_jax.records.vocabulary import KINDS
from diht_jax.storage import files

CONCEPTS_SUFFIX = ".concepts.npz"

# Kind -> distinct concepts.
Mentions = Mapping[str, frozenset[str]]


def find_mentions(graphs: Iterable[CaptionGraph]) -> Mentions:
    """Returns the objects and attributes that the captions of one image mention."""
    graphs = list(graphs)
    nodes = [node for graph in graphs for node in graph.objects.values()]
    objects = {name for graph in graphs for name in graph.objects} - CALENDAR
    return {
        "objects": _clean(objects),
        "attributes": _clean(itertools.chain.from_iterable(node.attributes for node in nodes)),
    }


@dataclasses.dataclass
class ConceptLog:
    """Collects the mentions of a shard's records, in order."""

    _records: dict[str, list[frozenset[str]]] = dataclasses.field(
        default_factory=functools.partial(collections.defaultdict, list)
    )

    def add(self, mentions: Mentions) -> None:
        """Appends the mentions of the next record."""
        for kind in KINDS:
            self._records[kind].append(mentions[kind])

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns kind -> concept -> number of records that mention it, in alphabetical order."""
        return {
            kind: dict(sorted(collections.Counter(itertools.chain(*self._records[kind])).items()))
            for kind in KINDS
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file. Equal mentions produce equal bytes."""
        arrays: dict[str, Any] = {}
        for kind, counts in self.counts().items():
            ids = dict(zip(counts, itertools.count()))
            rows = [sorted(map(ids.__getitem__, record)) for record in self._records[kind]]
            arrays[f"{kind}_names"] = np.frombuffer("\n".join(counts).encode(), np.uint8)
            arrays[f"{kind}_lengths"] = np.array([len(row) for row in rows], np.uint16)
            arrays[f"{kind}_ids"] = np.array(list(itertools.chain(*rows)), np.int32)
        arrays["shard"] = _encode_name(path)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        files.write_bytes(os.fspath(path), buffer.getvalue())


def read_mentions(
    shard: str | os.PathLike[str], kind: str
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Reads the concepts of one of `KINDS` that the captions of each record mention.

    Returns:
        names: the concepts that occur in the shard.
        lengths: int64 [n], number of concepts of each record.
        ids: int64 [sum of lengths], indices into `names`.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = os.fspath(shard) + CONCEPTS_SUFFIX
    try:
        data = files.read_bytes(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing: it lists what the captions of {shard} name; write the shard again "
            "with `python -m data_prep.filter` and config.concepts=True"
        ) from error
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            text = file[f"{kind}_names"].tobytes().decode()
            lengths = file[f"{kind}_lengths"].astype(np.int64)
            ids = file[f"{kind}_ids"].astype(np.int64)
            is_own = "shard" not in file or np.array_equal(file["shard"], _encode_name(path))
    except Exception as error:  # of a damaged archive it is of nearly any type
        raise ValueError(
            f"{path}: not a whole concept file ({error!s:.200}); filter again"
        ) from error
    if not is_own:
        raise ValueError(f"{path}: the concept file of another shard; filter again")
    names = text.split("\n") if text else []
    if lengths.sum() != len(ids) or (len(ids) and ids.max() >= len(names)):
        raise ValueError(f"{path}: its parts do not belong together; filter again")
    return names, lengths, ids


def _encode_name(path: str | os.PathLike[str]) -> np.ndarray:
    """Encodes the shard's file name, to detect a file that belongs to another shard."""
    return np.frombuffer(os.fsencode(os.path.basename(path)), np.uint8)


def _clean(names: Iterable[str]) -> frozenset[str]:
    # Names are stored one per line, so they must not contain a line break or a tab.
    cleaned = (" ".join(name.split()) for name in names)
    return frozenset(filter(None, cleaned))
