"""Small stand-ins of public data sets, in the folder layouts of CLIP_benchmark and DataComp.

Files, class names and templates are those of the real data set (from clip-benchmark, where it has
them); the images are photos of CIFAR-10 and emoji. Labels are correct if CIFAR-10's classes are
among the names. Otherwise they are drawn unevenly with a fixed seed, which makes accuracy and mean
per-class accuracy differ, and leaves some classes without images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import pathlib
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.clip_benchmark_folder import plain_picture
from diht_jax.evaluation.protocols import base
from diht_jax.evaluation.sources.labels import VOC_CLASSES
from diht_jax.evaluation.sources.registry import open_units
from diht_jax.evaluation.suite import CLASSIFICATION, MULTILABEL, RETRIEVAL, TASKS_BY_NAME
from diht_jax.input.transforms import decode_rgb
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

_CIFAR10_CLASSES = base.read_class_names(TASKS_BY_NAME["cifar10"].class_names or ())
PHOTOS, EMOJI = "cifar10_test.tar", "emoji_twitter.tar"


@dataclasses.dataclass(frozen=True)
class Standin:
    """One small data set.

    Attributes:
        task: name of the task here.
        kind: kind of the folder.
        pictures: tar with the images.
        size: number of images.
        names: class names: those of clip-benchmark under this name, or a list.
        templates: those of clip-benchmark under this name, or a list.
        num_countries: number of country names appended to the names.
        groups: number of groups in the first column of KEY.npy; 0 writes none.
        captions: captions for retrieval, with "{}" for the words of the image and its number.
    """

    task: str
    kind: str
    pictures: str
    size: int
    names: str | Sequence[str] = ()
    templates: str | Sequence[str] = ()
    groups: int = 0
    num_countries: int = 0
    captions: Sequence[str] = ()


_FIVE_CAPTIONS = ("{}", "a drawing of {}", "{} on white", "this is {}", "one {} and no other")
STANDINS: dict[str, Standin] = {
    "wds_cifar10_test": Standin(
        "cifar10", CLASSIFICATION, PHOTOS, 400, _CIFAR10_CLASSES, "cifar10"
    ),
    "wds_vtab-eurosat_test": Standin("eurosat", CLASSIFICATION, PHOTOS, 300, "eurosat", "eurosat"),
    "wds_fer2013": Standin("fer2013", CLASSIFICATION, PHOTOS, 300, "fer2013", "fer2013"),
    "wds_mnist_test": Standin("mnist", CLASSIFICATION, EMOJI, 300, "mnist", "mnist"),
    "wds_vtab-svhn_test": Standin("svhn", CLASSIFICATION, PHOTOS, 300, "svhn", "svhn"),
    "wds_gtsrb_test": Standin("gtsrb", CLASSIFICATION, EMOJI, 400, "gtsrb", "gtsrb"),
    "wds_vtab-pcam_test": Standin("pcam", CLASSIFICATION, PHOTOS, 300, "pcam", "pcam"),
    "wds_vtab-kitti_closest_vehicle_distance_test": Standin(
        "kitti_distance",
        CLASSIFICATION,
        PHOTOS,
        300,
        "kitti_closest_vehicle_distance",
        "kitti_closest_vehicle_distance",
    ),
    "wds_vtab-clevr_count_all_test": Standin(
        "clevr_counts", CLASSIFICATION, EMOJI, 300, "clevr_count_all", "clevr_count_all"
    ),
    "wds_vtab-flowers_test": Standin(
        "flowers102", CLASSIFICATION, EMOJI, 400, "flowers", "flowers"
    ),
    "wds_country211_test": Standin(
        "country211", CLASSIFICATION, EMOJI, 400, "country211", "country211"
    ),
    # No package has DataComp's class names of these two; both sides use substitutes.
    "wds_wilds-fmow_test": Standin(
        "fmow",
        CLASSIFICATION,
        PHOTOS,
        400,
        _CIFAR10_CLASSES,
        ("satellite photo of {}.", "aerial photo of {}."),
        groups=6,
        num_countries=52,
    ),
    "wds_wilds-iwildcam_test": Standin(
        "iwildcam",
        CLASSIFICATION,
        PHOTOS,
        400,
        _CIFAR10_CLASSES,
        ("a photo of {}.", "{} in the wild."),
        groups=40,
        num_countries=172,
    ),
    "wds_voc2007_multilabel": Standin(
        "voc2007", MULTILABEL, PHOTOS, 300, VOC_CLASSES, "voc2007_multilabel"
    ),
    "wds_flickr8k": Standin("flickr8k_retrieval", RETRIEVAL, EMOJI, 300, captions=_FIVE_CAPTIONS),
    "wds_mscoco_captions": Standin(
        "coco_retrieval", RETRIEVAL, PHOTOS, 300, captions=("a {}", "photo {}")
    ),
}


def write_standin(name: str, folder: pathlib.Path, data: pathlib.Path) -> int:
    """Writes a stand-in as one shard of the split "test".

    Args:
        name: a key of `STANDINS`.
        folder: folder to create.
        data: folder with the tars of images.

    Returns:
        The number of images.
    """
    standin = STANDINS[name]
    rng = np.random.default_rng(list(name.encode()))
    (folder / "test").mkdir(parents=True)
    names, templates = _words(standin)
    count = 0
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for pair, picture in itertools.islice(_pictures(data / standin.pictures), standin.size):
            notes = _notes(standin, pair, count, len(names), rng)
            for extension, content in {**picture, **notes}.items():
                info = tarfile.TarInfo(f"s{count:07d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            count += 1
    texts = {"test/nshards.txt": "1"}
    if standin.kind != CLASSIFICATION:  # DataComp's downloads have no such file
        texts["dataset_type.txt"] = standin.kind
    if standin.kind != RETRIEVAL:
        texts["classnames.txt"] = "\n".join(names)
        texts["zeroshot_classification_templates.txt"] = "\n".join(
            template.replace(base.CLASS_SLOT, "{c}") for template in templates
        )
    for file, text in texts.items():
        (folder / file).write_text(f"{text}\n", encoding="utf-8")
    return count


def _words(standin: Standin) -> tuple[Sequence[str], Sequence[str]]:
    names, templates = standin.names, standin.templates
    if isinstance(names, str):
        names = base.read_class_names(f"clip_benchmark:{names}")
    if isinstance(templates, str):
        templates = base.parse_templates(f"clip_benchmark:{templates}")
    if standin.num_countries:
        countries = base.read_class_names("clip_benchmark:country211")
        names = (*names, *countries[: standin.num_countries])
    return names, templates


def _pictures(tar: pathlib.Path) -> Iterator[tuple[Pair, dict[str, bytes]]]:
    """Yields images that differ from all earlier ones in pixels and in the words of the caption.

    Equal images or captions would be ties, which CLIP_benchmark breaks at random.
    """
    seen: set[str] = set()
    for pair in open_units(str(tar), {}).entries():
        if isinstance(pair, Skipped):
            continue
        image = decode_rgb(pair.image)
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            yield pair, plain_picture(pair.image, image)


def _notes(
    standin: Standin, pair: Pair, number: int, num_classes: int, rng: np.random.Generator
) -> dict[str, bytes]:
    """Returns the files that accompany an image: extension -> content."""
    if standin.kind == RETRIEVAL:
        # The number distinguishes captions that would otherwise be ties.
        words = f"{pair.caption} {number}"
        return {"txt": "\n".join(c.format(words) for c in standin.captions).encode()}
    if standin.kind == MULTILABEL:
        flags = rng.random(num_classes) < np.linspace(0.02, 0.3, num_classes)
        return {"npy": _npy(flags.astype(np.int64))}
    shares = 1 / np.arange(1, num_classes + 1)
    label = int(rng.choice(num_classes, p=shares / shares.sum()))
    if standin.names is _CIFAR10_CLASSES:
        label = _CIFAR10_CLASSES.index(pair.metadata["label"])
    notes = {"cls": str(label).encode()}
    if standin.groups:
        notes["npy"] = _npy(np.array([rng.integers(standin.groups), 2017, label]))
    return notes


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
