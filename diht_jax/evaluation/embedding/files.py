"""Exports the embeddings of a data set as npz or parquet files, in resumable parts.

The `.json` of a part is written last and marks the part as complete.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from diht_jax.evaluation.embedding.encoding import Batching, Encoder
from diht_jax.evaluation.embedding.entries import Entry
from diht_jax.evaluation.embedding.inputs import (
    PICTURES,
    ShardParts,
    entries_bar,
    list_inputs,
    make_parts,
    shares_of,
)
from diht_jax.evaluation.protocols.base import fill_caption_template
from diht_jax.readers import registry
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from diht_jax.storage import files

FORMATS = ("npz", "parquet")
MODALITIES = ("image", "text")
DTYPES = ("float32", "float16")
SETTINGS_FILE = "embeddings.json"


@dataclasses.dataclass(frozen=True)
class EmbedOptions:
    """Options of `embed_source`."""

    format: str = "npz"  # one of `FORMATS`
    modalities: Sequence[str] = MODALITIES  # which embeddings to write
    dtype: str = "float32"  # of the embeddings in the files, one of `DTYPES`
    caption_template: str = "{caption}"  # the text that is embedded for a caption
    shard_size: int = 10_000  # maximum entries per file, which bounds the loss on interruption
    batch_size: int = 256  # examples per batch, over all devices
    num_threads: int | None = None  # decoding threads; None is one per core, at most 16
    task_index: int = 0  # index of this process, which takes its share (`inputs.shares_of`)
    num_tasks: int = 1  # number of processes

    def __post_init__(self):
        fill_caption_template(self.caption_template, "")


def embed_source(
    model: Any,
    source: str | Sequence[str],
    output: str | os.PathLike[str],
    options: EmbedOptions,
) -> dict[str, Any]:
    """Embeds every pair of a source.

    Rows are in source order. A file has `key` (text), and `image_emb` and `text_emb` [n, d] with
    rows of unit length; parquet also has `caption`. Unreadable images and entries that are no pairs
    are skipped, and counted by reason in the `.json` of the part.

    Args:
        model: a `LoadedModel`.
        source: source for `readers.list_shards`, or a folder of pictures.
        output: directory or store URL, created if missing; may hold finished parts of this work.

    Returns:
        {"pairs", "dropped": {reason: count}, "files"} of this task, including earlier calls.

    Raises:
        ValueError: the source is empty, or the directory holds other work.
    """
    output = os.fspath(output).rstrip("/") or "/"
    shards = list_inputs(source)
    if "text" in options.modalities and shards[0].kind == PICTURES:
        raise ValueError(
            f"{shards[0].path}: pictures without captions, or deeper than CLASS/PICTURE; take "
            "--modalities image, or name a folder of classes"
        )
    check_settings(output, _settings(model, shards, options))
    mine = shares_of(shards, options.task_index, options.num_tasks)
    dropped: collections.Counter[str] = collections.Counter()
    pairs, count = 0, 0
    with entries_bar([share.shard for share in mine]) as bar:
        for share in mine:
            stem = f"{output}/embeddings-{share.number:05d}"
            make = functools.partial(_embed_part, model, options, share, stem)
            find = functools.partial(_find_part, stem)
            for stats in make_parts(share, options.shard_size, find, make, bar):
                pairs, count = pairs + stats["pairs"], count + 1
                dropped.update(stats["dropped"])
    if dropped:
        logging.warning("left out: %s", ", ".join(f"{k} {n}" for k, n in sorted(dropped.items())))
    logging.info("%d pairs in %d files of %s", pairs, count, output)
    return {"pairs": pairs, "dropped": dict(dropped), "files": count}


def _find_part(stem: str, part: int) -> dict[str, Any] | None:
    """Returns the statistics of a finished part; None if its file is missing or truncated."""
    own, remedy = f"{stem}-{part:05d}", "delete it to have its part made again"
    stats = read_object(f"{own}.json", remedy)
    if stats is None:
        return None
    if os.path.splitext(str(stats.get("file")))[0] != os.path.basename(own):
        raise ValueError(f"{own}.json: these are not the statistics of this part; {remedy}")
    path = files.join(os.path.dirname(stem), stats["file"])
    if (size := files.size(path)) != stats["bytes"]:
        logging.warning(
            "%s: %s, expected %d bytes; made again",
            path,
            "missing" if size is None else f"{size} bytes",
            stats["bytes"],
        )
        return None
    return stats


def _embed_part(
    model: Any,
    options: EmbedOptions,
    share: ShardParts,
    stem: str,
    part: int,
    entries: Iterator[Entry],
    is_last: Callable[[], bool],
) -> dict[str, Any]:
    """Writes the file of a part, then its statistics; returns the statistics."""
    start = time.perf_counter()
    batching = Batching(options.batch_size, options.num_threads)
    encoder = Encoder(model, entries, batching)
    columns: dict[str, np.ndarray] = {}
    notes, dropped, dropped_keys = [], collections.Counter(), []
    if "image" in options.modalities:
        encoded = encoder.images(lambda pair: (pair.key, pair.caption), allow_empty=True)
        notes, dropped, dropped_keys = encoded.notes, encoded.dropped, encoded.dropped_keys
        columns["image_emb"] = encoded.image_emb.reshape(len(notes), model.embed_dim)
    else:
        for entry in entries:
            if isinstance(entry, Pair):
                notes.append((entry.key, entry.caption))
            else:
                dropped[entry.reason] += 1
    if "text" in options.modalities:
        texts = [fill_caption_template(options.caption_template, caption) for _, caption in notes]
        no_text = np.zeros((0, model.embed_dim), np.float32)
        columns["text_emb"] = encoder.texts(texts) if texts else no_text
    columns = {name: value.astype(options.dtype) for name, value in columns.items()}
    path = f"{stem}-{part:05d}"
    buffer = io.BytesIO()
    if options.format == "npz":
        keys = np.array([key for key, _ in notes], dtype=np.str_)
        np.savez(buffer, key=keys, **columns)  # ty: ignore[invalid-argument-type]
    else:
        _write_parquet(buffer, notes, columns)
    data = buffer.getvalue()
    files.write_bytes(f"{path}.{options.format}", data)
    stats = {
        "file": os.path.basename(f"{path}.{options.format}"),
        "bytes": len(data),
        "crc32": zlib.crc32(data),
        "pairs": len(notes),
        "entries": len(notes) + sum(dropped.values()),
        "dropped": dict(dropped),
        "dropped_keys": dropped_keys,
        "seconds": round(time.perf_counter() - start, 3),
        "is_last": is_last(),
        "source": str(share.shard),
        "shard": share.number,
        "part": part,
    }
    files.write_object(f"{path}.json", stats, with_checksum=True)
    return stats


def _write_parquet(
    buffer: io.BytesIO, notes: list[tuple[str, str]], columns: dict[str, np.ndarray]
) -> None:
    import pyarrow
    import pyarrow.parquet

    arrays = {
        "key": pyarrow.array([key for key, _ in notes], pyarrow.string()),
        "caption": pyarrow.array([caption for _, caption in notes], pyarrow.string()),
    }
    for name, value in columns.items():
        flat = pyarrow.array(value.reshape(-1))
        arrays[name] = pyarrow.FixedSizeListArray.from_arrays(flat, value.shape[1])
    pyarrow.parquet.write_table(pyarrow.table(arrays), buffer)


def _settings(model: Any, shards: list[SourceShard], options: EmbedOptions) -> dict[str, Any]:
    """Returns the settings that must match for a directory to be continued."""
    linked = [
        registry.describe_linked(shard)
        for shard in shards
        if "image" in options.modalities and registry.names_files(shard)
    ]
    return {
        "model_sha256": model.fingerprint(),
        "image_size": model.image_size,
        "context_length": model.context_length,
        "compute_dtype": model.config.model.dtype,
        "format": options.format,
        "modalities": list(options.modalities),
        "dtype": options.dtype,
        "caption_template": options.caption_template,
        "shard_size": options.shard_size,
        "source": [shard.identity() for shard in shards],
        # The state of the pictures that tables refer to.
        **({"linked_files": linked} if linked else {}),
    }


def check_settings(
    output: str | os.PathLike[str],
    settings: dict[str, Any],
    *,
    name: str = SETTINGS_FILE,
    what: str = "embeddings",
    flag: str = "--output",
) -> None:
    """Writes the settings of a new directory, or checks that they match those of an existing one.

    Raises a ValueError with the settings that differ, `what` the directory holds, and its flag.
    """
    output = os.fspath(output)
    files.make_folder(output)
    path = f"{output}/{name}"
    found = read_object(path, f"take another {flag}, or remove this one with all that is in it")
    if found is None:
        files.write_object(path, settings, with_checksum=True)
        return
    changed = sorted(k for k in settings.keys() | found.keys() if settings.get(k) != found.get(k))
    if changed:
        raise ValueError(
            f"{output} holds {what} made with other settings; changed: "
            f"{', '.join(changed[:20])[:500]}. Take the same as in {path} to go on with it, or "
            f"another {flag}"
        )


def read_object(path: str | os.PathLike[str], remedy: str) -> dict[str, Any] | None:
    """Reads a JSON object that has a checksum; None if the file does not exist.

    Raises ValueError with `remedy` if the file is damaged.
    """
    try:
        values = files.parse_checked_object(files.read_bytes(path), needs_checksum=True)
    except FileNotFoundError:
        return None
    if values is None:
        raise ValueError(f"{path}: damaged, since its checksum is wrong or missing; {remedy}")
    return values
