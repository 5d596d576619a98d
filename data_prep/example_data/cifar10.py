"""A part of CIFAR-10: photos of ten classes, 32 pixels wide."""

from __future__ import annotations

import collections
import io
import pathlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from data_prep.example_data.archives import ExamplePair, read_archive, write_pair_tar
from data_prep.example_data.packages import Package

ARCHIVE = Package(  # the file and the SHA-256 of TFDS
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    170_052_171,
)
_FOLDER = "cifar-10-batches-bin/"
_NAMES = "batches.meta.txt"
# Tar -> the file of the archive, and how many pictures of each class are taken.
_PARTS = {
    "cifar10_train.tar": ("data_batch_1.bin", 400),
    "cifar10_test.tar": ("test_batch.bin", 100),
}
_WIDTH = 32
_ROW_BYTES = 1 + 3 * _WIDTH * _WIDTH  # the class, then all red, all green and all blue values


def make_cifar10(packages: Sequence[pathlib.Path], output: pathlib.Path) -> dict[pathlib.Path, int]:
    """Writes `cifar10_train.tar` and `cifar10_test.tar`; returns their numbers of pictures.

    Of the training set these are the first 400 pictures of each class, of the test set the first
    100, shuffled.
    """
    (archive,) = packages
    wanted = {_FOLDER + name for name in (_NAMES, *(file for file, _ in _PARTS.values()))}
    files = dict(read_archive(archive, wanted.__contains__))
    names = files[_FOLDER + _NAMES].decode().split()
    numbers = {}
    for tar, (file, per_class) in _PARTS.items():
        pairs = list(_read_pairs(files[_FOLDER + file], names, per_class))
        random.Random(0).shuffle(pairs)
        numbers[output / tar] = write_pair_tar(output / tar, pairs)
    return numbers


def _read_pairs(data: bytes, names: Sequence[str], per_class: int) -> Iterator[ExamplePair]:
    rows = np.frombuffer(data, np.uint8).reshape(-1, _ROW_BYTES)
    found: collections.Counter[str] = collections.Counter()
    for row in rows:
        name = names[row[0]]
        if found[name] < per_class:
            pixels = row[1:].reshape(3, _WIDTH, _WIDTH).transpose(1, 2, 0)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            key, caption = f"{name}_{found[name]:04d}", f"a photo of a {name}."
            yield ExamplePair(key, ".png", buffer.getvalue(), caption, {"label": name})
            found[name] += 1
