"""CAT filtering of one shard: complexity and action of the caption, then the image.

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". The command
`data_prep.filter` and `configs/prep/` use it. How captions are parsed belongs in `captions.py`,
files in `shards.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep import shards
from data_prep.engine import Report
from data_prep.funnel import Funnel
from data_prep.sources import default_source
from diht_jax.data import images, schema
from diht_jax.data.readers import Skipped, SourceShard, read_pairs
from diht_jax.data.schema import Pair
from diht_jax.data.tfrecord import TFRecordWriter

# Raised whenever the same config comes to mean other records.
_FORMAT_VERSION = 1
# Of the config, what says where and how fast, but not what is written.
_NOT_HASHED = ("input", "output", "num_workers", "batch_size")
_CAPTION_MODULES = "caption*.py"


def default_config() -> ml_collections.ConfigDict:
    """Every key of a filter config, with its default."""
    c = ml_collections.ConfigDict()
    c.input = placeholder(str)  # any source of docs/data.md; several are separated by commas
    c.output = placeholder(str)  # folder of the shards
    c.source = default_source()
    c.dataset_name = "pairs"  # with the split it makes the names of the shards
    c.split = "train"

    c.complexity = True  # C of CAT: drop captions of a complexity under min_complexity
    c.min_complexity = 1
    c.action = True  # A of CAT: drop captions without an action

    c.image = ml_collections.ConfigDict()
    c.image.max_pixels = images.MAX_PIXELS  # width times height; larger ones are not decoded
    c.image.min_side = 1  # px; smaller ones are dropped
    c.image.max_side = placeholder(
        int
    )  # px; larger ones are shrunk and written as JPEG; None keeps all bytes
    c.image.jpeg_quality = 90  # of those that are shrunk

    c.drop_metadata = ("exif",)  # fields that are not worth their bytes
    c.samples_per_outcome = 50  # examples in the statistics, to look at
    c.seed = 0  # of the choice of examples
    c.num_workers = placeholder(int)  # processes; None: one per core, 0: no other process
    c.batch_size = 256  # pairs whose captions are parsed together
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks what types cannot tell.

    Raises:
        ValueError: a value is out of its range.
    """
    least = {
        "min_complexity": (config.min_complexity, 0),
        "image.max_pixels": (config.image.max_pixels, 1),
        "image.min_side": (config.image.min_side, 1),
        "image.max_side": (config.image.max_side, 1),
        "samples_per_outcome": (config.samples_per_outcome, 0),
        "batch_size": (config.batch_size, 1),
    }
    for name, (value, minimum) in least.items():
        if value is not None and (not isinstance(value, int) or value < minimum):
            raise ValueError(f"config.{name}={value!r}; expected an integer of at least {minimum}")
    if not 1 <= config.image.jpeg_quality <= 95:
        raise ValueError(f"config.image.jpeg_quality={config.image.jpeg_quality}; expected 1 to 95")


def record_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The part of the config that decides what is written, as plain JSON-able values."""
    return {k: v for k, v in config.to_dict().items() if k not in _NOT_HASHED}


def hash_config(config: ml_collections.ConfigDict) -> str:
    """The fingerprint of all that decides what is written, the caption rules included."""
    settings = record_settings(config)
    settings["format_version"] = _FORMAT_VERSION
    if parses_captions(config):
        # Otherwise a run after a change of the rules would take the shards of before for its own.
        rules = sorted(pathlib.Path(__file__).parent.glob(_CAPTION_MODULES))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in rules))
        settings["caption_rules"] = digest.hexdigest()
    return shards.hash_config(settings)


def parses_captions(config: ml_collections.ConfigDict) -> bool:
    """Whether the captions matter; without C and A the parser is not even loaded."""
    return config.complexity or config.action


def caption_limits(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """C and A as arguments of `captions.cat_reason`."""
    return {
        "min_complexity": config.min_complexity if config.complexity else 0,
        "require_action": config.action,
    }


def filter_shard(
    task: shards.ShardTask, report: Report, *, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Does one task of the filter: the function that `engine.run_tasks` calls.

    Args:
        task: source and output.
        report: told how many pairs are done.
        config: of `default_config`.

    Returns:
        The shard's statistics.

    Raises:
        ValueError: the source is damaged.
    """
    return shards.run_task(task, functools.partial(_process, config=config, report=report))


def _process(
    source: SourceShard,
    writer: TFRecordWriter,
    *,
    config: ml_collections.ConfigDict,
    report: Report,
) -> dict[str, Any]:
    funnel = Funnel(config.samples_per_outcome, config.seed)
    for chunk in _chunks(read_pairs(source), config.batch_size):
        pairs = []
        for entry in chunk:
            if isinstance(entry, Skipped):
                funnel.drop("source", entry.reason, entry.key, entry.detail)
            else:
                pairs.append(entry)
        for pair in _filter_captions(pairs, config, funnel):
            _write(pair, writer, config, funnel)
        report(len(chunk))
    return funnel.to_json()


def _filter_captions(
    pairs: Sequence[Pair], config: ml_collections.ConfigDict, funnel: Funnel
) -> Iterator[Pair]:
    """Pairs with at least one good caption; where there were several, the bad ones are gone."""
    if not parses_captions(config):
        yield from pairs
        return
    from data_prep.captions import cat_reason, parse_captions

    limits = caption_limits(config)
    captions = [_all_captions(pair) for pair in pairs]
    graphs = iter(parse_captions(list(itertools.chain(*captions))))
    for pair, texts in zip(pairs, captions, strict=True):
        reasons = [cat_reason(next(graphs), **limits) for _ in texts]
        good = [text for text, reason in zip(texts, reasons, strict=True) if reason is None]
        if not good:
            funnel.drop("caption", reasons[0], pair.key, pair.caption)
        elif len(good) == len(texts):
            yield pair
        else:
            metadata = {k: v for k, v in pair.metadata.items() if k != "captions"}
            if len(good) > 1:
                metadata["captions"] = good
            yield dataclasses.replace(pair, caption=good[0], metadata=metadata)


def _all_captions(pair: Pair) -> list[str]:
    several = pair.metadata.get("captions", ())
    return [pair.caption, *(text for text in several if text != pair.caption)]


def _write(
    pair: Pair, writer: TFRecordWriter, config: ml_collections.ConfigDict, funnel: Funnel
) -> None:
    limits = config.image
    try:
        name, width, height = images.check_readable(pair.image, max_pixels=limits.max_pixels)
        if min(width, height) < limits.min_side:
            funnel.drop("image", "too_small", pair.key, pair.caption)
            return
        if limits.max_side is not None and max(width, height) > limits.max_side:
            name, data = "JPEG", _shrink(pair.image, config)
            pair = dataclasses.replace(pair, image=data)
    except images.ImageError as error:
        funnel.drop("image", error.reason, pair.key, pair.caption)
        return
    metadata = {k: v for k, v in pair.metadata.items() if k not in config.drop_metadata}
    writer.write(schema.encode_record(dataclasses.replace(pair, metadata=metadata)))
    funnel.keep(pair.key, pair.caption, name)


def _shrink(data: bytes, config: ml_collections.ConfigDict) -> bytes:
    image = images.decode_rgb(data, max_pixels=config.image.max_pixels)
    side = config.image.max_side
    image.thumbnail((side, side), images.Image.Resampling.BICUBIC, reducing_gap=None)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=config.image.jpeg_quality, optimize=True)
    return buffer.getvalue()


def _chunks(entries: Iterator[Pair | Skipped], size: int) -> Iterator[list[Pair | Skipped]]:
    while chunk := list(itertools.islice(entries, size)):
        yield chunk
