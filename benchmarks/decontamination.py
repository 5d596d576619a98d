"""What the perceptual hash of `config.decontaminate` finds: photos with planted copies.

    python -m benchmarks.decontamination --data ../shared/data

The edits are those of `benchmarks.duplicates`, of every photo of `photos.tar`; the evaluation set
is `photos.tar` itself. Recall: copies that match their own photo. False: the 4,000 pictures of
`cifar10_train.tar` that match a photo. Prints both, by the number of bits that may differ, and
writes `benchmarks/results/decontamination.json`.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks.duplicates import EDITS, plant
from benchmarks.record import write_result
from data_prep.duplicates.image_hashes import Index, PictureHash, make_index, try_hash
from diht_jax import command_line
from diht_jax.data.readers.registry import open_source


def define_flags() -> None:
    """The command line of `main`."""
    flags.DEFINE_string("data", None, "Folder with photos.tar and cifar10_train.tar.")
    flags.DEFINE_integer("seed", 0, "Of the crops.")


def main() -> None:
    """Measures, prints and writes."""
    command_line.require_flags("data")
    data = pathlib.Path(flags.FLAGS.data)
    index = make_index(str(data / "photos.tar"))
    copies = {}
    with tempfile.TemporaryDirectory() as folder:
        for edit in EDITS:
            path = pathlib.Path(folder) / f"{edit}.tar"
            plant(data / "photos.tar", path, edit, flags.FLAGS.seed)
            copies[edit] = _read(path)
    others = [hashed for _, hashed in _read(data / "cifar10_train.tar")]
    rows = []
    for bits in (0, 3, 6, 8, 10, 12):
        row = {"max_bits": bits, "false_of_4000": _count(index, others, bits)}
        row |= {edit: _recall(index, found, bits) for edit, found in copies.items()}
        rows.append(row)
        print(row, flush=True)
    write_result("decontamination", {"photos": len(index.columns["keys"]), "rows": rows})


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
