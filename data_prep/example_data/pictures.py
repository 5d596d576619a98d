"""A folder of pictures with a table of captions: the stamps of Tux Paint."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Sequence

from data_prep.example_data.archives import read_archive
from data_prep.example_data.packages import Package
from diht_jax.storage.files import write_bytes

STAMPS = Package(
    "https://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/"
    "tuxpaint-stamps-default_2025.03.31-1_all.deb",
    "6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb",
    80_872_956,
)
_FOLDER = "usr/share/tuxpaint/stamps/"
_LETTERS = f"{_FOLDER}symbols/alphabets/"
_TABLE = "captions.csv"


def make_pictures(
    packages: Sequence[pathlib.Path], output: pathlib.Path
) -> dict[pathlib.Path, int]:
    """Writes `pictures/captions.csv` and the pictures that it names; returns their number.

    The stamps are photos and drawings without a background; those of letters are left out. A
    caption is the English line of a stamp's text.

    Raises:
        ValueError: the folder holds something else.
    """
    (package,) = packages
    files = dict(read_archive(package, _is_of_a_stamp))
    captions = {}
    for name in sorted(files):
        text = files.get(f"{name.removesuffix('.png')}.txt")
        if name.endswith(".png") and text is not None:
            captions[name.removeprefix(_FOLDER)] = text.decode().splitlines()[0].strip()
    table = _write_table(captions)
    folder = output / "pictures"
    _check_folder(folder, {*captions, _TABLE}, table)
    for name in captions:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[_FOLDER + name])
    write_bytes(folder / _TABLE, table)  # last: where it is, all pictures are
    return {folder / _TABLE: len(captions)}


def _is_of_a_stamp(name: str) -> bool:
    is_file = name.startswith(_FOLDER) and name.endswith((".png", ".txt"))
    return is_file and not name.startswith(_LETTERS)


def _write_table(captions: dict[str, str]) -> bytes:
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "caption"])
    rows.writerows(captions.items())
    return text.getvalue().encode()


def _check_folder(folder: pathlib.Path, names: set[str], table: bytes) -> None:
    """Refuses to write between, or over, files of somebody else."""
    found = sorted(path for path in folder.rglob("*") if not path.is_dir())
    others = [path for path in found if path.relative_to(folder).as_posix() not in names]
    if (folder / _TABLE).exists() and (folder / _TABLE).read_bytes() != table:
        others.append(folder / _TABLE)
    if others:
        raise ValueError(
            f"{others[0]}: is no file of this example; name another folder by --output, or remove "
            f"{folder}"
        )
