"""The columns of a table, of any format, that make a pair: those that are set, or found by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from diht_jax.readers.base import MAX_IMAGE_BYTES, Skipped, read_image
from diht_jax.records.samples import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    explain_no_caption,
    find_name,
    merge_captions,
    pick_captions,
)
from diht_jax.records.schema import Pair

_NAMES_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class ColumnOptions:
    """Columns of a table or parquet file."""

    # Holds the image, or its path relative to `image_root`; the first of `samples.IMAGE_NAMES`, in
    # any case, where it is None; "" where no image is read.
    image_column: str | None = None
    # Holds the caption, or a list of captions; the first of `samples.CAPTION_NAMES`, in any case,
    # where it is None.
    caption_column: str | None = None
    # Holds the key; keys are made of table name and row number where it is None. (Of parquet files,
    # it is "key" where there is such a column.)
    key_column: str | None = None
    # Folder of the images, or its URL; the table's own folder where it is None. Paths that lead out
    # of it are refused.
    image_root: str | None = None


def find_columns(names: Collection[str], options: Any) -> tuple[Any, list[str]]:
    """Completes `ColumnOptions` by a table's names; and tells what is missing, in words."""
    image, caption = options.image_column, options.caption_column
    image = find_name(names, IMAGE_NAMES) if image is None else image
    caption = find_name(names, CAPTION_NAMES) if caption is None else caption
    missing = []
    if image is None:
        missing.append(f"column of images ({', '.join(IMAGE_NAMES)})")
    if caption is None:
        missing.append(f"column of captions ({', '.join(CAPTION_NAMES)})")
    stated = [name for name in (image, caption, options.key_column) if name and name not in names]
    missing += [f"column '{name}'" for name in stated]
    return dataclasses.replace(options, image_column=image, caption_column=caption), missing


def describe_missing(path: str, names: Collection[str], missing: list[str]) -> str:
    """The message about a table that lacks columns."""
    shown = ", ".join(map(repr, list(names)[:_NAMES_SHOWN])) or "nothing"
    return (
        f"{path}: no {' and no '.join(missing)}; it has {shown:.500}; set image_column, "
        "caption_column or key_column"
    )


def make_pair(
    key: str,
    image: bytes | str | None,
    row: dict[str, Any],
    options: ColumnOptions,
    *,
    needs_caption: bool = True,
    clean: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Pair | Skipped:
    """The pair of a row, or why there is none.

    Args:
        image: encoded, or its path below `image_root`.
        options: complete ones.
        needs_caption: whether a row without one is no pair.
        clean: makes metadata of the columns that are nothing else.
    """
    if not image:
        nothing = f"nothing in column '{options.image_column}'"
        status = row.get("error_message") or row.get("status") or nothing
        return Skipped(key, "no_image", str(status))
    if len(image) > MAX_IMAGE_BYTES:
        return Skipped(key, "too_large", f"an image of {len(image)} bytes")
    stated = row.get(options.caption_column) if options.caption_column else None
    captions = pick_captions(stated)
    if needs_caption and not captions:
        return Skipped(key, "no_caption", explain_no_caption(options.caption_column, stated))
    data = read_image(str(options.image_root), image, key) if isinstance(image, str) else image
    if isinstance(data, Skipped):
        hint = "; image_root names another folder" if data.reason == "refused_path" else ""
        return dataclasses.replace(data, detail=data.detail + hint)
    used = (options.image_column, options.caption_column, options.key_column)
    metadata = clean({name: value for name, value in row.items() if name not in used})
    caption = captions[0] if captions else ""
    return Pair(key, data, caption, merge_captions(metadata, captions, stated))
