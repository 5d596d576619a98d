"""Searching pictures by text, and the page of what was found."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from diht_jax.evaluation.embedding.encoding import (
    Batching,
    EmbeddingModel,
    EncodedImages,
    Encoder,
    check_finite,
)
from diht_jax.evaluation.embedding.entries import Entries, read_again
from diht_jax.evaluation.embedding.inputs import input_units
from diht_jax.evaluation.embedding.picture_index import Match, Place
from diht_jax.evaluation.prompts import CAPTION_SLOT, fill_caption_template
from diht_jax.input.decode import decode_rgb
from diht_jax.pages.render import render, thumbnail
from diht_jax.readers.base import SourceShard
from diht_jax.terminal import escape

_MOST_SHOWN = 1000  # characters of key and caption


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Result of `search_pictures`.

    Attributes:
        matches: query -> its matches, the best first; pictures of equal similarity in the order
            of the source.
        encoded: the pictures; `notes` holds their keys and captions.
    """

    matches: dict[str, list[Match]]
    encoded: EncodedImages


def search_pictures(
    model: EmbeddingModel,
    shards: Sequence[SourceShard],
    queries: Sequence[str],
    *,
    count: int = 8,
    template: str = CAPTION_SLOT,
    batching: Batching | None = None,
) -> SearchResult:
    """Finds the pictures closest to each query.

    Args:
        model: a `LoadedModel`, or anything with the same methods.
        shards: of `files.list_inputs`.
        queries: texts; one that occurs twice counts once.
        count: matches a query, or all pictures where there are fewer.
        template: prompt around a query, such as "a photo of {caption}.".
        batching: the defaults where None.

    Raises:
        ValueError: no query, a blank one, a bad template, or no readable picture.
    """
    texts = fill_queries(queries, template, count)
    entries = Entries(input_units(shards), name="pictures")
    encoded = Encoder(model, entries, batching).images(lambda pair: (pair.key, pair.caption))
    text_emb = check_finite(
        np.asarray(model.encode_text(list(texts.values())), np.float32), "text embeddings"
    )
    matches = {}
    for query, row in zip(texts, text_emb @ encoded.image_emb.T, strict=True):
        order = np.argsort(-row, kind="stable")[:count]
        matches[query] = [
            Match(*encoded.notes[i], similarity=float(row[i]), place=encoded.orders[i])
            for i in order
        ]
    return SearchResult(matches, encoded)


def fill_queries(queries: Sequence[str], template: str, count: int) -> dict[str, str]:
    """Each query once, with the text that is embedded for it.

    Raises:
        ValueError: no query, a blank one, a bad template, or no match requested.
    """
    blank = [query for query in queries if not query.strip()]
    if not queries or blank or count < 1:
        raise ValueError(
            f"expected at least one query with words in it and a count from 1, got "
            f"{list(queries)} and {count}"
        )
    return {query: fill_caption_template(template, query) for query in queries}


def load_pictures(
    source: Sequence[SourceShard], matches: Iterable[Match]
) -> dict[Place, Image.Image]:
    """Reads the pictures of matches by their places; only the parts that hold them are opened."""
    found = read_again(input_units(source), {match.place for match in matches})
    return {place: decode_rgb(entry.image) for place, entry in found.items()}


def draw_matches(
    matches_of: Mapping[str, Sequence[Match]],
    pictures: Mapping[Place, Image.Image],
    path: str | os.PathLike[str],
    *,
    title: str,
    note: str,
) -> None:
    """Writes a page (HTML) with the matches of every query, the best first."""
    uris = {place: thumbnail(picture) for place, picture in pictures.items()}
    queries = [
        (
            query,
            [
                (
                    uris[match.place],
                    f"{rank}   {match.similarity:.3f}",
                    (match.caption or match.key)[:_MOST_SHOWN],
                )
                for rank, match in enumerate(matches, start=1)
            ],
        )
        for query, matches in matches_of.items()
    ]
    render("search.html", path, title=title, note=note, queries=queries)


def format_matches(matches_of: Mapping[str, Sequence[Match]]) -> str:
    """The matches as text for a terminal: rank, similarity, key and caption, escaped."""
    lines = []
    for query, matches in matches_of.items():
        lines.append(escape(query))
        for rank, match in enumerate(matches, start=1):
            label = escape(f"{match.key}  {match.caption}".strip()[: _MOST_SHOWN + 1])
            shown = label if len(label) <= _MOST_SHOWN else f"{label[:_MOST_SHOWN]}…"
            lines.append(f"{rank:>4}  {match.similarity:6.3f}  {shown}")
    return "\n".join(lines)
