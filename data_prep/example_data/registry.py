"""Table of the example data sets."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from data_prep.example_data import emoji, photos
from data_prep.example_data.packages import Package
from data_prep.example_data.pictures import DRAWINGS, STAMPS, TITLES, make_clipart, make_pictures


@dataclasses.dataclass(frozen=True)
class Example:
    """An example data set, and how it is made.

    `make` takes the local files of the packages and the output folder. It returns the number of
    pictures in each file that it has written.
    """

    packages: tuple[Package, ...]
    num_pictures: int
    content: str
    files: tuple[str, ...]
    licence: str
    make: Callable[[Sequence[pathlib.Path], pathlib.Path], dict[pathlib.Path, int]]


EXAMPLES = {
    "emoji": Example(
        tuple(emoji.ARTISTS.values()),
        7_572,
        "3,786 emoji, each by two artists, 64 px",
        ("emoji_google.tar", "emoji_twitter.tar"),
        "Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0, Twitter and contributors)",
        emoji.make_emoji,
    ),
    "openmoji": Example(
        (emoji.OPENMOJI_FONT, emoji.OPENMOJI_NAMES),
        4_495,
        "emoji of a third artist, with names of their own, 64 px",
        ("openmoji.tar",),
        "OpenMoji (CC BY-SA 4.0)",
        emoji.make_openmoji,
    ),
    "pictures": Example(
        (STAMPS,),
        793,
        "photos and drawings of things, most up to 500 px, with captions",
        ("pictures/captions.csv",),
        "Tux Paint's stamps (GPL-2 or later, Bill Kendrick and contributors)",
        make_pictures,
    ),
    "clipart": Example(
        (DRAWINGS, TITLES),
        6_824,
        "drawings up to 256 px, with the titles, often wrong, of their artists",
        ("clipart.tar",),
        "public domain (Open Clip Art Library)",
        make_clipart,
    ),
    "photos": Example(
        (photos.SCIKIT_IMAGE, photos.SCIKIT_LEARN),
        14,
        "photos, up to 384 px, with captions",
        ("photos.tar",),
        "public domain, CC0; CC BY 2.0 (danielbuechele, vultilion)",
        photos.make_photos,
    ),
    "cifar10": Example(
        (photos.ARCHIVE,),
        5_000,
        "photos of ten classes, 400 and 100 of each, 32 px",
        ("cifar10_train.tar", "cifar10_test.tar"),
        "none stated; its authors ask to cite Krizhevsky, 2009",
        photos.make_cifar10,
    ),
}
