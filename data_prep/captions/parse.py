"""Parses captions into graphs, for the caption part of CAT (DiHT, arXiv 2301.02280).

`parse_captions` parses with spaCy's small English model and applies the rules of `verbs` and
`nouns`. It reads neither images nor files.
"""

import contextlib
import functools
import gc
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import spacy
from spacy.language import Language
from thinc.api import NumpyOps

from data_prep.captions.gates import gate_caption
from data_prep.captions.graph import CaptionGraph, find_model
from data_prep.captions.sentence import CaptionLemmatizer
from data_prep.captions.verbs import build_graph

_UNUSED_COMPONENTS = ("ner", "senter", "attribute_ruler")
# Takes about 10 MB. spaCy's tokenizer caches 10,000 words.
_MAX_LEXEMES = 30_000
# Number of captions whose graphs are cached (about 40 MB), and the longest caption to cache:
# captions that repeat are short.
_MAX_REMEMBERED, _REMEMBERED_CHARS = 15_000, 128


class _NumpyBlasOps(NumpyOps):
    """thinc's CPU operations, with `numpy.dot` for matrix products.

    The matrix products of the convolutions take two thirds of the time of spaCy's small model.
    thinc computes them with its bundled BLIS; NumPy's OpenBLAS was three times as fast at these
    sizes where it was measured (AMD EPYC with AVX-512). Results differ in the last bit; the graphs
    of 5,000 web captions are equal.
    """

    def gemm(self, x, y, out=None, trans1=False, trans2=False):
        """Computes `x @ y` in float32, optionally transposed, into `out` if it is given."""
        x = x.T if trans1 else x
        y = y.T if trans2 else y
        return np.dot(x, y, out=out)


def load_parser() -> Language:
    """Loads spaCy's small English model with only the components that the caption rules need.

    Returns:
      A pipeline of tok2vec, tagger, parser and our `CaptionLemmatizer`.

    Raises:
      ValueError: no English model is installed.
    """
    nlp = spacy.load(find_model(), exclude=_UNUSED_COMPONENTS)
    nlp.add_pipe("caption_lemmatizer")
    nlp.remove_pipe("lemmatizer")
    ops = _NumpyBlasOps()
    for _, component in nlp.pipeline:
        model = getattr(component, "model", None)
        if model is not None and isinstance(model.ops, NumpyOps):
            for node in model.walk():
                node.ops = ops
    return nlp


_load_shared_parser = functools.cache(load_parser)


def parse_captions(
    captions: Sequence[str], *, nlp: Language | None = None, batch_size: int = 256
) -> list[CaptionGraph]:
    """Turns captions into graphs.

    Equal captions are parsed once and share a graph. The result depends neither on `batch_size` nor
    on the order of the captions.

    Args:
      captions: any text; the first 1,000 characters of each caption are read.
      nlp: a pipeline from `load_parser()`, or a larger English one that ends in our
        "caption_lemmatizer". Default: `load_parser()`, loaded once per process.
      batch_size: captions per batch of the spaCy pipeline.

    Returns:
      One graph per caption, in order. A caption that a gate rejected before parsing has an empty
      graph with `drop_reason` set.

    Raises:
      ValueError: `captions` is a single string, an item is not a string, or `batch_size` < 1.
    """
    if isinstance(captions, str | bytes):
        raise ValueError(
            f"captions must be a sequence of strings, got one {type(captions).__name__}; "
            "wrap it in a list"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(
                f"caption {index} must be a string, got {type(caption).__name__} "
                f"({caption!r:.40}); decode bytes as UTF-8 and write a missing caption as an "
                "empty string"
            )
    distinct, known = dict.fromkeys(captions), _remembered if nlp is None else {}
    graphs = {text: known[text] for text in distinct if text in known}
    new = [text for text in distinct if text not in graphs]
    parsed = _parse_distinct(new, nlp or _load_shared_parser(), batch_size)
    graphs |= parsed
    if nlp is None:
        _remembered.update({t: g for t, g in parsed.items() if len(t) <= _REMEMBERED_CHARS})
        while len(_remembered) > _MAX_REMEMBERED:
            del _remembered[next(iter(_remembered))]  # the oldest
    return list(map(graphs.__getitem__, captions))


_remembered: dict[str, CaptionGraph] = {}  # of the captions parsed last


def _parse_distinct(
    captions: Iterable[str], nlp: Language, batch_size: int
) -> dict[str, CaptionGraph]:
    """Returns the graph of each caption, and parses captions with equal cleaned text once."""
    for _, words in nlp.pipeline:
        if isinstance(words, CaptionLemmatizer):
            break
    else:
        raise ValueError(
            "the parser must have the component caption_lemmatizer, got "
            f"{', '.join(nlp.pipe_names)}; use load_parser(), or call "
            "nlp.add_pipe('caption_lemmatizer') on a pipeline with a rule lemmatizer"
        )
    gated: dict[str, tuple[str, str | None]] = {}
    texts: dict[str, None] = {}
    for caption in captions:
        text, reason = gate_caption(caption, words.lexicon)
        gated[caption] = text, reason
        if reason is None:
            texts[text] = None
    # Caps spaCy's string store: once it is full, words that are new in a call are dropped after the
    # call. Words in a memory zone are not cached, so early (frequent) ones stay outside of it.
    vocabulary: Any = nlp.vocab  # its declaration lacks `in_memory_zone`
    is_full = len(vocabulary) >= _MAX_LEXEMES and not vocabulary.in_memory_zone
    # Collecting garbage while the graphs are built would take a third of the time.
    graphs: dict[str, CaptionGraph] = {}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with nlp.memory_zone() if is_full else contextlib.nullcontext():
            docs = nlp.pipe(texts, batch_size=batch_size)
            for text, doc in zip(texts, docs, strict=True):
                graphs[text] = build_graph(doc, words)
    finally:
        if was_enabled:
            gc.enable()
    found = {}
    for caption, (text, reason) in gated.items():
        found[caption] = graphs[text] if reason is None else CaptionGraph(drop_reason=reason)
    return found
