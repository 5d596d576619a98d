"""Recall of `config.decontaminate` by hashes and by embeddings, on photos with planted copies.

    python -m benchmarks.decontamination --data runs/data

The edits are those of `benchmarks.duplicates`, applied to every photo of `photos.tar`; the
evaluation set is `photos.tar` itself. Recall: copies that match their own photo. False: the 4,000
images of `cifar10_train.tar`, or with embeddings its first 1,000, that match a photo, and the
photos that match another one. Embeddings are those of EfficientNet-Lite0, the only network with
trained weights on the package index; distances may differ for other models. Prints both, by the
number of different bits allowed and by the cosine, and writes
`benchmarks/results/decontamination.json`.
"""

from __future__ import annotations

import itertools
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from absl import flags

from benchmarks.duplicates import EDITS, plant
from benchmarks.record import write_result
from data_prep.batches import Teacher
from data_prep.duplicates.image_hashes import Index, PictureHash, make_index, try_hash
from data_prep.duplicates.precomputed import EmbeddedSet
from diht_jax import command_line
from diht_jax.readers.registry import open_source

_OTHERS = 1000  # images that are embedded in addition to the photos


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("data", None, "Folder with photos.tar and cifar10_train.tar.")
    flags.DEFINE_integer("seed", 0, "Of the crops.")


def main() -> None:
    """Measures, prints and writes the results."""
    command_line.require_flags("data")
    data = pathlib.Path(flags.FLAGS.data)
    index = make_index(str(data / "photos.tar"))
    copies = {}
    with tempfile.TemporaryDirectory() as folder:
        for edit in EDITS:
            path = pathlib.Path(folder) / f"{edit}.tar"
            plant(data / "photos.tar", path, edit, flags.FLAGS.seed)
            copies[edit] = _read(path)
        embeddings = _measure_embeddings(data, pathlib.Path(folder))
    others = [hashed for _, hashed in _read(data / "cifar10_train.tar")]
    rows = []
    for bits in (0, 3, 6, 8, 10, 12):
        row = {"max_bits": bits, "false_of_4000": _count(index, others, bits)}
        row |= {edit: _recall(index, found, bits) for edit, found in copies.items()}
        rows.append(row)
        print(row, flush=True)
    write_result(
        "decontamination",
        {"photos": len(index.keys), "rows": rows, "by_embeddings": embeddings},
    )


def _measure_embeddings(data: pathlib.Path, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Measures the recall of each edit, and false matches, by the minimum cosine.

    Args:
        data: folder with the photos.
        folder: folder with the tars of copies, named by their edits.
    """
    teacher = Teacher(
        "torch",
        function="data_prep.teachers.efficientnet_lite:build",
        batch_size=8,
        image_size=224,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )

    def embed(path: pathlib.Path, count: int | None = None) -> tuple[list[str], np.ndarray]:
        pairs = list(itertools.islice(open_source(str(path)), count))
        table = teacher(pa.table({"image": [pair.image for pair in pairs]}))
        vectors = np.stack(table["embedding"].to_pylist()).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return [pair.key for pair in pairs], vectors

    photos = EmbeddedSet(*embed(data / "photos.tar"))
    copies = {edit: embed(folder / f"{edit}.tar") for edit in EDITS}
    _, others = embed(data / "cifar10_train.tar", _OTHERS)
    between = photos.embeddings @ photos.embeddings.T - 2 * np.eye(len(photos.keys))
    rows = []
    for least in (0.8, 0.85, 0.9, 0.95, 0.98):
        row = {
            "min_cosine": least,
            f"false_of_{_OTHERS}": sum(m is not None for m in photos.find(others, least)),
            "photos_like_others": int((between.max(1) >= least).sum()),
        }
        for edit, (keys, vectors) in copies.items():
            matches = zip(keys, photos.find(vectors, least), strict=True)
            right = sum(m is not None and key == f"copy-{m.key}" for key, m in matches)
            row[edit] = round(right / len(keys), 4)
        rows.append(row)
        print(row, flush=True)
    return rows


def _read(path: pathlib.Path) -> list[tuple[str, PictureHash | None]]:
    return [(pair.key, try_hash(pair.image)) for pair in open_source(str(path))]


def _count(index: Index, hashes: Sequence[PictureHash | None], bits: int) -> int:
    return sum(match is not None for match in index.find(list(hashes), bits))


def _recall(index: Index, found: Sequence[tuple[str, PictureHash | None]], bits: int) -> float:
    matches: list[Any] = index.find([hashed for _, hashed in found], bits)
    right = sum(
        match is not None and key == f"copy-{match.key}"
        for (key, _), match in zip(found, matches, strict=True)
    )
    return round(right / len(found), 4)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
