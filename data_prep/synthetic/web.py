"""A synthetic noisy web: generated image-text pairs, with labels for their noise.

As a command, writes a training set and three held-out sets as webdataset tars in the layout of
img2dataset (KEY.jpg or KEY.png, KEY.txt, KEY.json):

    python -m data_prep.synthetic --output /tmp/web --num_pairs 4000 --seed 0

    train-00000.tar ...   clean scenes and four kinds of noise, named in the json ("noise")
    val_retrieval.tar     clean scenes with combinations that never occur in training
    val_shape.tar         one object; "label" and "class_name" are its shape
    val_color.tar         one object; "label" and "class_name" are its colour
    val_*.templates.txt   prompts for val_shape and val_color, for `diht_jax.evaluate`
    synthetic.json        settings, class names, number of pairs of each kind

A pair depends only on (seed, set, index), not on the number of workers or of pairs per tar.
`sampling.py` chooses the content of a scene, `scenes.py` places it, `drawing.py` draws it and
`captions.py` describes it. Ours, all of it: the paper has no synthetic data.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_prep.example_data.packages import ExamplePair, write_pair_tar
from data_prep.synthetic import captions, drawing, sampling
from data_prep.synthetic.scenes import COLORS
from data_prep.synthetic.shapes import SHAPES
from diht_jax.input.transforms import encode
from diht_jax.storage.files import remove_temporary_files, write_bytes
from diht_jax.terminal import ProgressBar

CLEAN = "clean"
NOISE_KINDS = ("product_title", "uninformative", "rendered_text", "mismatched")
DEFAULT_NOISE = {
    "product_title": 0.2,
    "uninformative": 0.15,
    "rendered_text": 0.1,
    "mismatched": 0.05,
}
SHAPE_CLASSES: tuple[str, ...] = SHAPES
COLOR_CLASSES: tuple[str, ...] = tuple(COLORS)
MANIFEST_NAME = "synthetic.json"
TEMPLATES_SUFFIX = ".templates.txt"

# Raise this if equal settings would yield different pairs.
_VERSION = 3
_TRAIN, _RETRIEVAL, _SHAPE, _COLOR = "train", "val_retrieval", "val_shape", "val_color"
_PNG_SHARE = 0.1
_CHUNK = 32  # Tasks that a worker takes at a time.
_TEMPLATES = {_SHAPE: captions.SHAPE_TEMPLATES, _COLOR: captions.COLOR_TEMPLATES}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the data set. Equal settings give equal bytes.

    `noise` maps kinds of `NOISE_KINDS` to their shares among the training pairs. Omitted kinds do
    not occur, and all other pairs are clean.
    """

    num_pairs: int = 4000
    seed: int = 0
    image_size: int = 128
    noise: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(DEFAULT_NOISE))
    pairs_per_tar: int = 500
    num_retrieval: int = 500
    num_classification: int = 480

    def __post_init__(self):
        for kind, share in self.noise.items():
            if kind not in NOISE_KINDS:
                raise ValueError(f"unknown kind of noise {kind!r}; known: {', '.join(NOISE_KINDS)}")
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"the share of {kind} must lie in [0, 1], got {share}")
        if sum(self.noise.values()) > 1.0 + 1e-9:
            raise ValueError(f"the shares of noise sum to {sum(self.noise.values()):g}, above 1")


def make_pair(settings: Settings, split: str, index: int) -> ExamplePair:
    """Makes the index-th pair of "train", "val_retrieval", "val_shape" or "val_color"."""
    stream = functools.partial(_stream, settings.seed, split, index)
    if split == _TRAIN:
        kind = noise_kind(settings, index)
        image, caption, facts = _make_training(stream, kind, settings.image_size)
    else:
        kind = CLEAN
        image, caption, facts = _make_evaluation(stream, settings, split, index)
    encoded, suffix = _encode(stream("encoding"), image)
    key = f"{split}-{index:08d}"
    metadata = {
        "status": "success",
        "width": image.width,
        "height": image.height,
        "sha256": hashlib.sha256(encoded).hexdigest(),
        "noise": kind,
        **facts,
    }
    return ExamplePair(key, suffix, encoded, caption, metadata)


def noise_kind(settings: Settings, index: int) -> str:
    """Returns the kind of a training pair: "clean" or one of `NOISE_KINDS`."""
    draw = _stream(settings.seed, _TRAIN, index, "kind").random()
    for kind in NOISE_KINDS:
        draw -= settings.noise.get(kind, 0.0)
        if draw < 0:
            return kind
    return CLEAN


def _stream(seed: int, split: str, index: int, name: str) -> np.random.Generator:
    """Returns the random generator for one aspect of one pair, independent of other aspects."""
    return np.random.default_rng([seed, zlib.crc32(f"{split}/{name}".encode()), index])


def _make_training(stream, kind: str, side: int):
    scene = sampling.sample_scene(stream("scene"))
    if kind == "rendered_text":
        caption = captions.describe_scene(stream("caption"), scene)
        image = drawing.render_text(stream("drawing"), caption, side)
        return image, caption, {"scene": None, "caption_scene": scene.describe()}
    image, facts = drawing.render_scene(stream("drawing"), scene, side), {"scene": scene.describe()}
    if kind == "product_title":
        return image, captions.write_product_title(stream("title")), facts
    if kind == "uninformative":
        return image, captions.write_uninformative(stream("filler")), facts
    told = scene
    if kind == "mismatched":
        rng = stream("other scene")
        # Picture and caption share no shape, so the caption is clearly wrong even without colours.
        while {o.shape for o in scene.objects} & {o.shape for o in told.objects}:
            told = sampling.sample_scene(rng)
        facts["caption_scene"] = told.describe()
    return image, captions.describe_scene(stream("caption"), told), facts


def _make_evaluation(stream, settings: Settings, split: str, index: int):
    if split == _RETRIEVAL:
        scene = sampling.sample_held_out(stream("scene"), settings.seed, index)
        label = {}
    else:
        name, classes = ("shape", SHAPE_CLASSES) if split == _SHAPE else ("color", COLOR_CLASSES)
        number = index % len(classes)
        scene = sampling.sample_single(stream("scene"), **{name: classes[number]})
        label = {"label": number, "class_name": classes[number]}
    image = drawing.render_scene(stream("drawing"), scene, settings.image_size)
    caption = captions.describe_scene(stream("caption"), scene, complete=True)
    return image, caption, {"scene": scene.describe(), **label}


def _encode(rng: np.random.Generator, image: Image.Image) -> tuple[bytes, str]:
    if rng.random() < _PNG_SHARE:
        return encode(image, "PNG", compress_level=3), ".png"
    return encode(image, "JPEG", quality=int(rng.integers(86, 96))), ".jpg"


def _make_task(settings: Settings, task: tuple[str, int]) -> ExamplePair:
    return make_pair(settings, *task)


def planned_tars(settings: Settings) -> dict[str, tuple[str, range]]:
    """Returns the tars of a set in writing order: name -> (split, indices of its pairs)."""
    starts = range(0, settings.num_pairs, settings.pairs_per_tar)
    plan = {
        f"train-{number:05d}.tar": (
            _TRAIN,
            range(start, min(start + settings.pairs_per_tar, settings.num_pairs)),
        )
        for number, start in enumerate(starts)
    }
    plan["val_retrieval.tar"] = (_RETRIEVAL, range(settings.num_retrieval))
    plan["val_shape.tar"] = (_SHAPE, range(settings.num_classification))
    plan["val_color.tar"] = (_COLOR, range(settings.num_classification))
    return {name: part for name, part in plan.items() if part[1]}


def write_dataset(
    settings: Settings, output: str | os.PathLike, *, workers: int = 0
) -> dict[str, int]:
    """Writes all tars and the manifest. Tars that an interrupted run finished are kept.

    Returns:
        Number of training pairs of each kind.

    Raises:
        ValueError: the directory holds another set, or too many retrieval pairs are requested.
    """
    available = sampling.count_held_out(settings.seed)
    if settings.num_retrieval > available:
        raise ValueError(
            f"num_retrieval is {settings.num_retrieval}, but only {available} different scenes are "
            "held out from training"
        )
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    counts = collections.Counter(noise_kind(settings, i) for i in range(settings.num_pairs))
    manifest = {
        "version": _VERSION,
        "settings": dataclasses.asdict(settings),
        "counts": {kind: counts[kind] for kind in (CLEAN, *NOISE_KINDS)},
        "shape_classes": SHAPE_CLASSES,
        "color_classes": COLOR_CLASSES,
    }
    _claim_directory(output, manifest)
    for split, templates in _TEMPLATES.items():
        text = "".join(f"{template}\n" for template in templates)
        write_bytes(output / f"{split}{TEMPLATES_SUFFIX}", text.encode())
    plan = {k: v for k, v in planned_tars(settings).items() if not (output / k).exists()}
    remove_temporary_files(str(output), plan.__contains__)  # left by an interrupted run
    # A single stream over all tars keeps the workers busy between tars.
    tasks = [(split, index) for split, indices in plan.values() for index in indices]
    pairs = map_in_processes(functools.partial(_make_task, settings), tasks, workers)
    with ProgressBar(pairs, total=len(tasks), unit="pair", desc="synthetic web") as progress:
        counted = iter(progress)
        for name, (_, indices) in plan.items():
            write_pair_tar(output / name, itertools.islice(counted, len(indices)))
    return manifest["counts"]


def _claim_directory(output: pathlib.Path, manifest: dict) -> None:
    """Writes the manifest, or checks that an existing one is equal."""
    path = output / MANIFEST_NAME
    text = json.dumps(manifest, indent=2) + "\n"
    if path.exists():
        if path.read_text() != text:
            raise ValueError(
                f"{output} holds a synthetic set made with other settings (see {path}); "
                "give another --output, or delete the directory"
            )
        return
    foreign = sorted(p.name for p in output.glob("*.tar"))
    if foreign:
        raise ValueError(
            f"{output} holds {foreign[0]} but no {MANIFEST_NAME}, so the tars are of unknown "
            "origin; give another --output"
        )
    write_bytes(path, text.encode())


def map_in_processes(
    function: Callable[[Any], Any], tasks: Sequence[Any], workers: int = 0
) -> Iterator[Any]:
    """Yields the results of a picklable function in task order. 0 workers: one per core."""
    workers = min(workers or os.cpu_count() or 1, -(-len(tasks) // _CHUNK))
    if workers <= 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: the caller may have threads (JAX does).
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as executor:
        yield from executor.map(function, tasks, chunksize=_CHUNK)
