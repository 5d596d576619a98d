"""Image-caption data sets of TensorFlow Datasets, by name or by folder.

`tensorflow_datasets` is imported inside the functions, and only finds the files and explains their
features. The files are read here, without TensorFlow.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from diht_jax.readers.base import Format, Skipped, SourceShard
from diht_jax.records.formats import read_array_records
from diht_jax.records.samples import CAPTION_NAMES, Pair, merge_captions, pick_captions
from diht_jax.records.shard_files import read_records
from diht_jax.storage.stores import is_storage_failure

PREFIX = "tfds:"

_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class TfdsOptions:
    """The folder of a TFDS data set, and its features that make a pair."""

    data_dir: str | None = None  # TFDS's data_dir; None is its default, ~/tensorflow_datasets
    image_feature: str | None = None  # name of an image feature; None finds it by type
    # Name of a text feature, with slashes for nested ones ("captions/text"); None finds it by name
    # and type. For a class label, the caption is the class name.
    caption_feature: str | None = None


def list_tfds_shards(spec: str, options: TfdsOptions) -> list[SourceShard]:
    """Returns one shard per file of the split.

    Args:
        spec: "tfds:NAME[/CONFIG][:VERSION]:SPLIT" or "tfds:FOLDER:SPLIT", where SPLIT may be a
            part such as "train[:10%]".

    Raises:
        ValueError: the text has another form, the data set is not prepared, the split does not
            exist, or several features could make a pair.
    """
    import tensorflow_datasets as tfds

    name, split = _parse_spec(spec)
    builder = _open_builder(spec, name, options)
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"'{spec}': no split '{split}'; there are "
            f"{', '.join(sorted(builder.info.splits)) or 'none'}"
        ) from error
    features = builder.info.features
    images = list(_find_features(features, tfds.features.Image))
    texts = list(_find_features(features, tfds.features.Text, nested=True))
    labels = list(_find_features(features, tfds.features.ClassLabel))
    named = [name for name in texts if name.rsplit("/", 1)[-1].lower() in CAPTION_NAMES]
    image = _pick_one(spec, "image_feature", options.image_feature, [images])
    caption = _pick_one(spec, "caption_feature", options.caption_feature, [named, texts, labels])
    shared = {
        "folder": str(builder.data_path),
        "format": builder.info.file_format.file_suffix,
        "image_feature": image,
        "caption_feature": caption,
        "split": split,
    }
    if shared["format"] not in ("tfrecord", "array_record"):
        raise ValueError(
            f"'{spec}': files of format '{shared['format']}'; expected tfrecord or array_record"
        )
    return [
        SourceShard("tfds", os.fspath(file.filename), file.skip, file.skip + file.take, shared)
        for file in instructions
        if file.take
    ]


def read_tfds(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one file with undecoded images; ValueError for a damaged file."""
    import tensorflow_datasets as tfds

    features = _builder_of_folder(shard.options["folder"]).info.features
    labels = _find_features(features, tfds.features.ClassLabel)
    stem = os.path.basename(shard.path)
    count = 0
    for number, data in enumerate(_read_range(shard), start=shard.start):
        count += 1
        try:
            entry = _read_example(f"{stem}-{number:08d}", data, features, labels, shard.options)
        except Exception as error:  # TFDS raises nearly any type for invalid bytes
            raise ValueError(
                f"{shard.path}: record {number}: no example with the features in the data set's "
                f"description ({_first_line(error)})"
            ) from error
        yield entry
    if shard.start + count < shard.end:
        raise ValueError(
            f"{shard.path}: {shard.start + count} records, while the data set's description states "
            f"that there are {shard.stop} at least; prepare or copy it again"
        )


def _read_example(
    key: str, data: bytes, features: Any, labels: Mapping[str, Any], options: Mapping[str, Any]
) -> Pair | Skipped:
    import tensorflow_datasets as tfds

    image_feature, caption_feature = options["image_feature"], options["caption_feature"]
    partial = {image_feature: tfds.decode.SkipDecoding()}
    example = features.deserialize_example_np(data, decoders=partial)
    image = bytes(example[image_feature])
    if not image:
        return Skipped(key, "no_image", f"feature '{image_feature}' is empty")
    # The class label used as caption, or the only one; -1 means that an example has no label.
    only = next(iter(labels)) if len(labels) == 1 else None
    label_feature = caption_feature if caption_feature in labels else only
    metadata: dict[str, Any] = {}
    if label_feature is not None and (label := int(example[label_feature])) >= 0:
        metadata = {"label": label, "class_name": labels[label_feature].int2str(label)}
    if caption_feature in labels:
        captions = [metadata["class_name"].replace("_", " ")] if metadata else []
    else:
        value = _look_up(example, caption_feature)
        values = [value] if isinstance(value, bytes | str) else list(value)
        captions = pick_captions(
            [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]
        )
    if not captions:
        return Skipped(key, "no_caption", f"feature '{caption_feature}' is empty")
    return Pair(key, image, captions[0], merge_captions(metadata, captions))


def _builder_of_folder(folder: str) -> Any:
    """Opens the data set in a folder with `dataset_info.json` and `features.json`."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS raises nearly any type for damaged files
        if is_storage_failure(error):
            raise
        raise ValueError(
            f"'{folder}': its dataset_info.json or features.json cannot be read "
            f"({_first_line(error)}); prepare or copy the data set again"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _parse_spec(spec: str) -> tuple[str, str]:
    # Splits at the last colon outside brackets, since a split may be "train[:10%]".
    match = re.fullmatch(r"tfds:(.+):([^:\[\]/]+(?:\[[^\[\]]*\])?)", spec)
    if not match or _VERSION.fullmatch(match[2]):
        raise ValueError(
            f"'{spec}': expected tfds:NAME:SPLIT, such as tfds:coco_captions:val or "
            "tfds:coco_captions/2014:1.1.0:val[:1000]"
        )
    return match[1], match[2]


def _open_builder(spec: str, name: str, options: TfdsOptions) -> Any:
    import tensorflow_datasets as tfds

    if os.path.isfile(os.path.join(name, "dataset_info.json")):
        return _builder_of_folder(name)
    if name.startswith((os.sep, ".")):
        raise ValueError(f"'{spec}': there is no dataset_info.json in '{name}'")
    try:
        builder = tfds.builder(name, data_dir=options.data_dir)
    except tfds.core.DatasetNotFoundError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"'{spec}': TFDS knows no such data set ({first_line})") from error
    if not builder.info.splits:
        by_hand = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
        raise ValueError(
            f"'{spec}': the data set is not prepared in '{builder.data_dir}'; run "
            f"`tfds build {name}` first, or set data_dir"
            + (f". It needs a manual download: {by_hand}" if by_hand else "")
        )
    return builder


def _find_features(features: Any, kind: type, *, nested: bool = False) -> dict[str, Any]:
    """Returns name -> feature of a kind; `nested` includes sequences and dictionaries, by path."""
    import tensorflow_datasets as tfds

    found = {}
    for name, feature in features.items():
        inner = feature
        if nested and isinstance(feature, tfds.features.Sequence):
            inner = feature.feature
        # A text may be declared as a bare string tensor, as COCO's captions are.
        is_string = type(inner) in (tfds.features.Tensor, tfds.features.Scalar) and (
            inner.shape == () and np.dtype(inner.np_dtype).kind in "OSU"
        )
        if isinstance(inner, kind) or (kind is tfds.features.Text and is_string):
            found[name] = inner
        elif nested and isinstance(inner, tfds.features.FeaturesDict):
            children = _find_features(inner, kind, nested=True)
            found |= {f"{name}/{child}": value for child, value in children.items()}
    return found


def _pick_one(spec: str, option: str, wanted: str | None, candidates: list[list[str]]) -> str:
    everything = list(dict.fromkeys(itertools.chain(*candidates)))
    if wanted is not None:
        if wanted in everything:
            return wanted
        raise ValueError(
            f"'{spec}': {option}='{wanted}' is none of {', '.join(everything) or 'no features'}"
        )
    first = next(filter(None, candidates), [])
    if len(first) != 1:
        raise ValueError(
            f"'{spec}': no single candidate for the {option}; set it to one of "
            f"{', '.join(everything) or '(the data set has none)'}"
        )
    return first[0]


def _read_range(shard: SourceShard) -> Iterator[bytes]:
    if shard.options["format"] == "tfrecord":
        return itertools.islice(read_records(shard.path), shard.start, shard.stop)
    return read_array_records(shard.path, shard.start, shard.stop)


def _look_up(example: Mapping[str, Any], path: str) -> Any:
    # Tries the longest name first, since a name may contain slashes itself ("image/filename").
    parts = path.split("/")
    for end in range(len(parts), 0, -1):
        name = "/".join(parts[:end])
        if name in example:
            rest = "/".join(parts[end:])
            return _look_up(example[name], rest) if rest else example[name]
    raise KeyError(path)


FORMAT = Format(
    prefix=PREFIX,
    list_shards=list_tfds_shards,
    options=TfdsOptions,
    read=read_tfds,
    count=lambda shard: shard.end - shard.start,
)
