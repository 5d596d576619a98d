"""Pictures with their captions in text files of the same name, such as an unpacked webdataset tar.

`NAME.jpg`, `NAME.txt` and `NAME.json` are a pair, as the members of a tar are. Sub-folders are read
too: img2dataset's output format "files" has one for each shard.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from diht_jax.readers.base import (
    FOLDER_EXTENSIONS,
    UNSUPPORTED_EXTENSIONS,
    Format,
    Skipped,
    SourceShard,
    read_image,
    walk_files,
)
from diht_jax.readers.image_folder import refuse_splits
from diht_jax.records.formats.tar_samples import TEXT_EXTENSIONS, Sample, make_pair
from diht_jax.records.samples import clean_text
from diht_jax.records.schema import Pair

_PICTURES = (*FOLDER_EXTENSIONS, *UNSUPPORTED_EXTENSIONS)
_SAMPLES_PER_SHARD = 10_000


def list_sample_shards(root: str) -> list[SourceShard]:
    """Parts of each folder with pictures; empty where no picture has a text of its name.

    Raises:
        FolderLayoutError: the sub-folders are splits.
    """
    shards, below_root, has_captions = [], set(), False
    for folder in sorted({os.path.dirname(path) for path, _ in walk_files(root, root)}):
        below = os.path.relpath(folder, root).removeprefix(".")
        samples = _list_samples(folder)
        below_root |= {below.split(os.sep)[0]} if samples else set()
        for names in samples.values():
            extensions = {_extension(name) for name in names}
            has_captions |= "txt" in extensions and not extensions.isdisjoint(FOLDER_EXTENSIONS)
        for start in range(0, len(samples), _SAMPLES_PER_SHARD):
            stop = min(start + _SAMPLES_PER_SHARD, len(samples))
            shards.append(SourceShard("caption_files", folder, start, stop, {"below_root": below}))
    if not has_captions:
        return []
    refuse_splits(root, below_root)
    return shards


def read_samples(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of a part of a folder; a key is the path below the root without its ending.

    What the files mean is said in `tar_samples.make_pair`; texts have to be UTF-8.
    """
    for stem, names in list(_list_samples(shard.path).items())[shard.start : shard.stop]:
        key = clean_text(os.path.join(shard.options["below_root"], stem))
        yield _read_sample(shard, key, names)


def _read_sample(shard: SourceShard, key: str, names: list[str]) -> Pair | Skipped:
    members: list[tuple[str, bytes | None]] = []
    for name in names:
        extension = _extension(name)
        if extension in UNSUPPORTED_EXTENSIONS:
            detail = f"expected one of {', '.join(FOLDER_EXTENSIONS)}"
            return Skipped(key, "unsupported_format", detail)
        path = os.path.join(os.path.realpath(shard.path), name)
        data = read_image(os.path.realpath(shard.root), path, key)
        if isinstance(data, Skipped):
            return data
        if extension == "txt":
            try:
                data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                return Skipped(key, "bad_row", f"{os.path.join(shard.path, name)}: {error}")
        members.append((extension, data))
    return make_pair(Sample(0, key, members, []), FOLDER_EXTENSIONS, shard.needs_caption)


def _list_samples(folder: str) -> dict[str, list[str]]:
    """Names of pictures and texts in a folder by their common stem, both sorted."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.name[0] != "." and not os.path.isdir(e))
    samples: dict[str, list[str]] = {}
    for name in names:
        if _extension(name) in (*_PICTURES, *TEXT_EXTENSIONS):
            samples.setdefault(name.rpartition(".")[0], []).append(name)
    return dict(sorted(samples.items()))


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


FORMAT = Format(
    is_folder=True,
    list_shards=lambda root, options: list_sample_shards(root),
    read=read_samples,
    count=lambda shard: shard.end - shard.start,
)
