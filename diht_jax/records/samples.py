"""Pairs, and the samples that they come from: an image, its captions and metadata.

A sample's parts are `jpg`, `jpeg`, `png` or `webp` (the encoded image), `txt` (the caption), and
metadata, where `caption` and `captions` are captions too. In tars, the parts are members and the
metadata is `json`. In TFRecords, they are fields, as in img2dataset's output format "tfrecord". The
meaning of the parts is the same in all formats, and is defined here.

An image may have several captions, each of a kind such as alt text or synthetic. The metadata then
has all texts as `captions`, and the kind of each text, or of the only caption, as `caption_kinds`.
The kinds are omitted if all captions are of the usual kind.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Names of columns and fields, ignoring case; the first one present is used.
IMAGE_NAMES = (
    *IMAGE_EXTENSIONS,
    "image",
    "img",
    "file_name",
    "filename",
    "filepath",
    "file_path",
    "image_path",
    "img_path",
    "path",
    "file",
)
CAPTION_NAMES = ("txt", "caption", "captions", "text", "title", "description")
# Size limit of an encoded image, which keeps a hostile member from filling the memory.
MAX_IMAGE_BYTES = 2**28

# In the metadata, next to `captions`: the kind of each caption.
_CAPTION_KINDS = "caption_kinds"
USUAL_KIND = "alt"
_KIND = re.compile(r"[A-Za-z0-9_-]+")
# Possible ends of a sentence, with closing quotes and brackets and the space after them.
_END = re.compile(
    r"""[.!?\u2026]+["'\u2019\u201d)\]]*\s+|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d]*\s*|\s*\n\s*"""
)
_OPENING = "\"'\u2018\u201c(["
# Words whose full stop ends no sentence; nor does one after a single capital ("J. S. Bach").
_ABBREVIATIONS = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "mt", "jr", "sr", "vs"])
_LAST_WORD = re.compile(r"(\w+)\.$")


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its caption, as read from a source.

    Attributes:
        key: name of the pair within its source.
        image: encoded bytes (JPEG, PNG, WebP, ...), untouched.
        caption: the text; the first one if an image has several.
        metadata: JSON-able side data: "captions" (all, if there are several), "label" (int or
            str), "class_name" (str), and everything else that the source states.
    """

    key: str
    image: bytes
    caption: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An entry of a source that is not a valid pair."""

    key: str  # name of the entry, as far as it is known
    reason: str  # one of `readers.base.SOURCE_REASONS`
    detail: str = ""  # what was found, in words


class SampleError(ValueError):
    """A sample that is not a pair: its image or caption is missing or not unique."""

    def __init__(self, skipped: Skipped):
        super().__init__(skipped)
        self.skipped = skipped

    def __str__(self) -> str:
        reason = self.skipped.reason.replace("_", " ")
        return f"record '{self.skipped.key}': {reason} ({self.skipped.detail})"


_Pair = TypeVar("_Pair", bound=Pair)


def clean_text(text: str) -> str:
    """Strips a text, and replaces lone surrogates, which no UTF-8 file can hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def find_name(names: Collection[str], wanted: Sequence[str]) -> str | None:
    """Returns the first wanted name that is present, ignoring case; None if there is none."""
    present = {name.strip().lower(): name for name in names}
    present |= {name: name for name in names}  # "text" before "TEXT"
    return next((present[name] for name in wanted if name in present), None)


def pick_captions(value: Any, *, keep_repeated: bool = False) -> list[str]:
    """Returns the captions in a text or a list of texts; none in anything else.

    They are cleaned, not empty, and in order. Repetitions are removed unless `keep_repeated`.
    """
    found = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, str) and (text := clean_text(item)):
            found.append(text)
    return found if keep_repeated else list(dict.fromkeys(found))


def explain_no_caption(column: str | None, value: Any) -> str:
    """Returns a message on why `pick_captions` finds nothing in the value of a column."""
    values = value if isinstance(value, list | tuple) else [value]
    other = next((item for item in values if not isinstance(item, str | None)), None)
    if other is None:
        return f"nothing in column '{column}'"
    kind = type(other).__name__
    return f"column '{column}' holds {other!r:.40} ({kind}); expected text, or a list of texts"


def merge_captions(
    metadata: Mapping[str, Any], captions: list[str], stated: Any = None
) -> dict[str, Any]:
    """Returns metadata with "captions" if there are several, and without it if there is one.

    Args:
        metadata: metadata of the pair; the kinds of its captions stay with their texts.
        captions: result of `pick_captions`.
        stated: the original texts that the kinds refer to; None means `captions`.
    """
    merged = dict(metadata)
    merged.pop("captions", None)
    if len(captions) > 1:
        merged["captions"] = captions
    kinds = merged.get(_CAPTION_KINDS)
    texts = captions if stated is None else stated
    texts = texts if isinstance(texts, list | tuple) else [texts]
    if isinstance(kinds, list) and len(kinds) == len(texts):  # otherwise they are left unchanged
        named = [(clean_text(t), k) for t, k in zip(texts, kinds, strict=True) if type(t) is str]
        kind_of = dict(reversed(named))
        merged[_CAPTION_KINDS] = [kind_of.get(text, USUAL_KIND) for text in captions]
    return merged


def take_caption(
    text: bytes | None, metadata: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """Returns the first caption of a sample (None without any) and its remaining metadata.

    Args:
        text: contents of `txt`, which come first.
        metadata: side data with `caption`, which comes next, and `captions`, or else one of
            `CAPTION_NAMES`. The result lacks `key` and `caption`, and has `captions` if several.
    """
    in_metadata = pick_captions(metadata.get("caption"))
    captions = pick_captions((text or b"").decode("utf-8-sig", "replace")) or in_metadata
    captions = pick_captions(captions + pick_captions(metadata.get("captions")))
    other = None
    if not captions and (other := find_name(metadata, CAPTION_NAMES)) is not None:
        captions = pick_captions(metadata[other])
    stated = metadata.get("captions") or captions[:1]
    rest = dict(metadata)
    for name in ("caption", other, "key"):
        rest.pop(name, None)
    return (captions[0] if captions else None), merge_captions(rest, captions, stated)


def split_sentences(text: str) -> list[str]:
    """Splits a text into sentences, without the space between them.

    A sentence ends at a line break, at a Chinese or Japanese mark, or at a full stop, question mark
    or exclamation mark before a space that no small letter follows. Fixed rules give every machine
    the same result; a wrong split only makes a part of another length.
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
    """Returns the captions of a pair, its first one first; ValueError unless a list of texts."""
    several = pair.metadata.get("captions", ())
    if not isinstance(several, list | tuple) or not all(isinstance(t, str) for t in several):
        raise ValueError(
            f"record '{pair.key}': expected a list of texts in 'captions' of its metadata, got "
            f"{several!r:.200}"
        )
    return [pair.caption, *(text for text in several if text != pair.caption)]


def caption_kinds(pair: Pair) -> dict[str, str]:
    """Returns caption -> kind, in the order of `all_captions`; ValueError if the counts differ."""
    captions = all_captions(pair)
    kinds = pair.metadata.get(_CAPTION_KINDS)
    if kinds is None:
        return dict.fromkeys(captions, USUAL_KIND)
    stated = pair.metadata.get("captions") or [pair.caption]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(stated)
        or not all(isinstance(kind, str) for kind in kinds)
    ):
        raise ValueError(
            f"record '{pair.key}': expected the kind of each of its {len(stated)} captions in "
            f"'{_CAPTION_KINDS}' of its metadata, got {kinds!r:.200}"
        )
    kind_of = dict(zip(reversed(stated), reversed(kinds), strict=True))
    return {text: kind_of.get(text, USUAL_KIND) for text in captions}


def with_captions(pair: _Pair, kind_of: Mapping[str, str]) -> _Pair:
    """Returns the pair with other captions, at least one, given as caption -> kind."""
    hidden = ("captions", _CAPTION_KINDS)
    metadata = {name: value for name, value in pair.metadata.items() if name not in hidden}
    captions, kinds = list(kind_of), list(kind_of.values())
    if len(captions) > 1:
        metadata["captions"] = captions
    if any(kind != USUAL_KIND for kind in kinds):
        metadata[_CAPTION_KINDS] = kinds
    return dataclasses.replace(pair, caption=captions[0], metadata=metadata)


def parse_columns(text: str, where: str) -> dict[str, str]:
    """Parses a text into a dict from column of the metadata to kind of its captions.

    Args:
        text: such as "synthetic=re_caption,title=page_title"; "" names none.
        where: the key of the config, for messages.

    Raises:
        ValueError: the text has another form, or names a column twice.
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
    """Raises ValueError unless `kind` is a valid name for a kind of caption."""
    if not _KIND.fullmatch(kind):
        raise ValueError(
            f"{where}: '{kind}' is no kind of caption; expected a name of letters, digits, - and "
            f"_, such as {USUAL_KIND} or synthetic"
        )


def add_columns(pair: Pair, columns: Mapping[str, str], kind: str | None = None) -> Pair:
    """Returns the pair with the captions of some metadata columns added after its own.

    Repeated texts are not added. `kind` is the kind of the pair's own captions if its metadata
    states none.
    """
    kind_of = caption_kinds(pair)
    if kind is not None and _CAPTION_KINDS not in pair.metadata:
        kind_of = dict.fromkeys(kind_of, kind)
    for column, its_kind in columns.items():
        for text in pick_captions(pair.metadata.get(column)):
            kind_of.setdefault(text, its_kind)
    rest = {name: value for name, value in pair.metadata.items() if name not in columns}
    return with_captions(dataclasses.replace(pair, metadata=rest), kind_of)
