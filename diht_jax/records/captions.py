"""Several captions of an image, and of what kind each is, such as alt text or synthetic.

They lie in a record's metadata: `captions`, all texts, where there are several, and
`caption_kinds`, the kind of each of them, or of the only caption. Kinds are left out where all are
the usual one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from diht_jax.records.samples import CAPTION_KINDS, USUAL_KIND, pick_captions
from diht_jax.records.schema import Pair

_Pair = TypeVar("_Pair", bound=Pair)
_KIND = re.compile(r"[A-Za-z0-9_-]+")
# What may end a sentence, with the quotes and brackets that it closes and the space behind it.
_END = re.compile(
    r"""[.!?\u2026]+["'\u2019\u201d)\]]*\s+|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d]*\s*|\s*\n\s*"""
)
_OPENING = "\"'\u2018\u201c(["
# Their full stop ends none. A single letter, as in "J. S. Bach", ends none either.
_ABBREVIATIONS = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "mt", "jr", "sr", "vs"])
_LAST_WORD = re.compile(r"(\w+)\.$")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, without the space between them.

    A sentence ends with a full stop, a question or exclamation mark before a space and anything
    but a small letter, with a mark of Chinese or Japanese, or with its line. By rules alone, so
    that every machine splits alike; a wrong guess makes a part of another length, and no more.
    """
    sentences, start = [], 0
    for end in _END.finditer(text):
        before, after = text[start : end.end()].rstrip(), text[end.end() :].lstrip(_OPENING)
        word = _LAST_WORD.search(before)
        is_short = word is not None and (
            word[1].lower() in _ABBREVIATIONS or (len(word[1]) == 1 and word[1].isupper())
        )
        if "\n" not in end[0] and (after[:1].islower() or is_short):
            continue
        if before:
            sentences.append(before.lstrip())
        start = end.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def all_captions(pair: Pair) -> list[str]:
    """The captions of a pair, its first one first; ValueError where they are no list of texts."""
    several = pair.metadata.get("captions", ())
    if not isinstance(several, list | tuple) or not all(isinstance(t, str) for t in several):
        raise ValueError(
            f"record '{pair.key}': expected a list of texts in 'captions' of its metadata, got "
            f"{several!r:.200}"
        )
    return [pair.caption, *(text for text in several if text != pair.caption)]


def caption_kinds(pair: Pair) -> list[str]:
    """The kind of each of `all_captions`; ValueError where they are not as many."""
    captions = all_captions(pair)
    kinds = pair.metadata.get(CAPTION_KINDS)
    if kinds is None:
        return [USUAL_KIND] * len(captions)
    stated = pair.metadata.get("captions") or [pair.caption]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(stated)
        or not all(isinstance(kind, str) for kind in kinds)
    ):
        raise ValueError(
            f"record '{pair.key}': expected the kind of each of its {len(stated)} captions in "
            f"'{CAPTION_KINDS}' of its metadata, got {kinds!r:.200}"
        )
    kind_of = dict(zip(reversed(stated), reversed(kinds), strict=True))
    return [kind_of.get(text, USUAL_KIND) for text in captions]


def with_captions(pair: _Pair, captions: Sequence[str], kinds: Sequence[str]) -> _Pair:
    """The pair with other captions, at least one, and their kinds."""
    hidden = ("captions", CAPTION_KINDS)
    metadata = {name: value for name, value in pair.metadata.items() if name not in hidden}
    if len(captions) > 1:
        metadata["captions"] = list(captions)
    if any(kind != USUAL_KIND for kind in kinds):
        metadata[CAPTION_KINDS] = list(kinds)
    return dataclasses.replace(pair, caption=captions[0], metadata=metadata)


def parse_columns(text: str, where: str) -> dict[str, str]:
    """Column of the metadata -> kind of the captions in it.

    Args:
        text: such as "synthetic=re_caption,title=page_title"; "" names none.
        where: the key of the config, for messages.

    Raises:
        ValueError: another form, or a column that is named twice.
    """
    columns: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        kind, _, column = (piece.strip() for piece in part.partition("="))
        if not column or column in columns:
            raise ValueError(
                f"{where}='{text}': expected kinds and columns of the metadata, each column once, "
                "such as synthetic=re_caption"
            )
        check_kind(kind, where)
        columns[column] = kind
    return columns


def check_kind(kind: str, where: str) -> None:
    """Raises ValueError unless `kind` can be the name of a kind of caption."""
    if not _KIND.fullmatch(kind):
        raise ValueError(
            f"{where}: '{kind}' is no kind of caption; expected a name of letters, digits, - and "
            f"_, such as {USUAL_KIND} or synthetic"
        )


def add_columns(pair: Pair, columns: Mapping[str, str], kind: str | None = None) -> Pair:
    """The pair with the captions in columns of its metadata behind its own ones.

    A text that it has already is not added again. `kind` is that of its own captions, where they
    have none.
    """
    captions, kinds = all_captions(pair), caption_kinds(pair)
    if kind is not None and CAPTION_KINDS not in pair.metadata:
        kinds = [kind] * len(captions)
    for column, its_kind in columns.items():
        for text in pick_captions(pair.metadata.get(column)):
            if text not in captions:
                captions.append(text)
                kinds.append(its_kind)
    rest = {name: value for name, value in pair.metadata.items() if name not in columns}
    return with_captions(dataclasses.replace(pair, metadata=rest), captions, kinds)
