"""Samples as img2dataset and webdataset have them: an image under its format's name, and texts.

A sample's parts are `jpg`, `jpeg`, `png` or `webp` (the encoded image), `txt` (the caption), and
metadata, of which `caption` and `captions` are captions too. In tars the parts are members and the
metadata is `json`; in TFRecords they are fields, as img2dataset's output format "tfrecord" has
them. What the parts mean is the same everywhere, and stands here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Names of columns and fields, in any case; of several that are there the first counts.
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
# Nothing that is worth decoding has more bytes; keeps a hostile member from filling the memory.
MAX_IMAGE_BYTES = 2**28

# In the metadata, next to `captions`: the kind of each caption, see `captions.py`.
CAPTION_KINDS = "caption_kinds"
USUAL_KIND = "alt"

_KEY, _TEXT, _IMAGE = "key", "txt", "image"
_LISTS = ("bytes_list", "float_list", "int64_list")


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An entry of a source that is no pair."""

    key: str  # names the entry, as well as it can be named
    reason: str  # one of `readers.base.SOURCE_REASONS`
    detail: str = ""  # what was found, for a person


class SampleError(ValueError):
    """A sample that is no pair, since its image or its caption is missing or not the only one."""

    def __init__(self, skipped: Skipped):
        super().__init__(skipped)
        self.skipped = skipped

    def __str__(self) -> str:
        reason = self.skipped.reason.replace("_", " ")
        return f"record '{self.skipped.key}': {reason} ({self.skipped.detail})"


def clean_text(text: str) -> str:
    """Strips a text, and replaces lone surrogates, which no UTF-8 file can hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def find_name(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted names that is there in any case; None where there is none."""
    present = {name.strip().lower(): name for name in names}
    present |= {name: name for name in present.values()}  # "text" before "TEXT"
    return next((present[name] for name in wanted if name in present), None)


def pick_captions(value: Any) -> list[str]:
    """The captions in a text, a list of texts, or anything else (none).

    Cleaned, not empty, in order, without repetitions.
    """
    values = value if isinstance(value, list | tuple) else [value]
    cleaned = (clean_text(item) for item in values if isinstance(item, str))
    return list(dict.fromkeys(filter(None, cleaned)))


def explain_no_caption(column: str | None, value: Any) -> str:
    """Tells, for a person, why `pick_captions` finds nothing in the value of a column."""
    values = value if isinstance(value, list | tuple) else [value]
    other = next((item for item in values if not isinstance(item, str | None)), None)
    if other is None:
        return f"nothing in column '{column}'"
    kind = type(other).__name__
    return f"column '{column}' holds {other!r:.40} ({kind}); expected text, or a list of texts"


def merge_captions(
    metadata: Mapping[str, Any], captions: list[str], stated: Any = None
) -> dict[str, Any]:
    """Metadata with "captions" where there are several, without it where there is one.

    Args:
        metadata: of the pair; the kinds of its captions stay with their texts.
        captions: of `pick_captions`.
        stated: the texts as they came, which the kinds are of; None: they are the captions.
    """
    merged = {name: value for name, value in metadata.items() if name != "captions"}
    if len(captions) > 1:
        merged["captions"] = captions
    kinds = merged.get(CAPTION_KINDS)
    texts = captions if stated is None else stated
    texts = texts if isinstance(texts, list | tuple) else [texts]
    if isinstance(kinds, list) and len(kinds) == len(texts):  # what does not fit stays as it is
        named = [(clean_text(t), k) for t, k in zip(texts, kinds, strict=True) if type(t) is str]
        kind_of = dict(reversed(named))
        merged[CAPTION_KINDS] = [kind_of.get(text, USUAL_KIND) for text in captions]
    return merged


def take_caption(
    text: bytes | None, metadata: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """The first caption of a sample, None without any, and what is left as its metadata.

    Args:
        text: contents of `txt`, which come first.
        metadata: with `caption`, which comes next, and `captions`; else one of `CAPTION_NAMES`. It
            comes back without `key` and `caption`, and with `captions` where there are several.
    """
    in_metadata = pick_captions(metadata.get("caption"))
    captions = pick_captions((text or b"").decode("utf-8-sig", "replace")) or in_metadata
    captions = pick_captions(captions + pick_captions(metadata.get("captions")))
    other = None
    if not captions and (other := find_name(metadata, CAPTION_NAMES)) is not None:
        captions = pick_captions(metadata[other])
    rest = {name: value for name, value in metadata.items() if name not in ("caption", other, _KEY)}
    stated = metadata.get("captions") or captions[:1]
    return (captions[0] if captions else None), merge_captions(rest, captions, stated)


def has_sample_fields(fields: Mapping[str, Any]) -> bool:
    """Whether a `tf.train.Example` has the layout of img2dataset rather than ours."""
    # A user's column may be called "image" as well, but ours has no `txt`.
    has_image = any(_single_bytes(fields, name) is not None for name in IMAGE_EXTENSIONS)
    return (has_image or _TEXT in fields) if _IMAGE not in fields else has_image and _TEXT in fields


def read_sample_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The pair in the fields of img2dataset's layout: the attributes of `schema.Pair`.

    All fields but the image, `txt`, `key` and the captions are metadata: texts, and numbers that
    JSON can hold; None for the others. `has_sample_fields` must be true of the fields.

    Raises:
        SampleError: there is not exactly one image, or no caption.
        ValueError: there is no key.
    """
    values = {name: _plain_value(fields[name]) for name in sorted(fields)}
    key = "" if values.get(_KEY) is None else clean_text(str(values[_KEY]))
    if not key:
        raise ValueError(f"a record without a key; it has the fields {sorted(fields)}")
    images = {name: _single_bytes(fields, name) for name in IMAGE_EXTENSIONS}
    images = {name: data for name, data in images.items() if data}
    if len(images) > 1:
        raise SampleError(Skipped(key, "duplicate", f"found {', '.join(images)}"))
    if not images:
        detail = f"nothing in a field {', '.join(IMAGE_EXTENSIONS)}"
        raise SampleError(Skipped(key, "no_image", detail))
    ((image_name, image),) = images.items()
    metadata = {k: v for k, v in values.items() if k not in (image_name, _TEXT)}
    caption, metadata = take_caption(_single_bytes(fields, _TEXT), metadata)
    if caption is None:
        raise SampleError(Skipped(key, "no_caption", "neither 'txt' nor 'caption' has one"))
    return {"key": key, "image": image, "caption": caption, "metadata": metadata}


def _single_bytes(fields: Mapping[str, Any], name: str) -> bytes | None:
    # `in` first: indexing a protobuf map inserts what is missing.
    values = fields[name].bytes_list.value if name in fields else ()
    return values[0] if len(values) == 1 else None


def _plain_value(feature: Any) -> Any:
    """The value of a field as JSON can hold it; a list where there are several."""
    for kind in _LISTS:
        values = [_plain(value) for value in getattr(feature, kind).value]
        if values:
            return values[0] if len(values) == 1 else values
    return None


def _plain(value: bytes | float | int) -> str | float | int | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, int) or math.isfinite(value) else None
