"""A second web with noise that the filter was not made for; frozen before any run on it.

62% of its right captions have no verb, a quarter of all captions belong to other pictures, and some
pictures have text over them that no caption repeats. Product titles name what their picture shows.
Scenes, shapes and colours are those of the first web. Its held-out scenes measure the students of
both webs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from data_prep.synthetic import captions, drawing, sampling
from data_prep.synthetic.scenes import Scene, SceneObject
from diht_jax.records.schema import Record

# Shares of the kinds. The caption describes the picture in all but the last two.
KINDS = {
    "sentence": 0.20,
    "names": 0.20,  # like `sentence`, without a verb
    "overlaid": 0.10,  # text over the picture; a sentence or names
    "title": 0.15,  # a product title that names what is shown
    "mismatched": 0.25,  # a sentence or names of another scene
    "uninformative": 0.10,
}
RIGHT = ("sentence", "names", "overlaid", "title")
IMAGE_SIZE = 128  # px
_JPEG_QUALITY = 92
_OVERLAY = 0.4  # weight of the text in the blend

_WITHOUT_VERB = {
    "on": "on top of",
    "above": "above",
    "beside": "next to",
    "against": "against",
    "behind": "behind",
    "inside": "inside",
    "chasing": "in front of",
    "dropping": "above",
    "hanging": "under",
}
_PACKS = ("Set of 2", "3-Pack", "A4", "30 x 40 cm", "Size L")
_ENDS = ("Free Shipping", "Sale", "NEW", "Poster", "Sticker", "Wall Art")


def make_records(seed: int, count: int) -> Iterator[Record]:
    """Yields the pairs of the web `seed`; a smaller web is the beginning of a larger one."""
    for index in range(count):
        yield make_record(seed, index)


def make_record(seed: int, index: int) -> Record:
    """Makes one pair; its metadata has the kind as `noise`, and the scene that is shown."""
    rng = np.random.default_rng([2, seed, index])
    kind = list(KINDS)[rng.choice(len(KINDS), p=list(KINDS.values()))]
    scene = sampling.sample_scene(rng)
    image = drawing.render_scene(rng, scene, IMAGE_SIZE)
    described = scene
    if kind == "mismatched":
        described = _sample_other(rng, scene)
    caption = _MAKERS[kind](rng, described)
    if kind == "overlaid":
        text = drawing.render_text(rng, captions.write_product_title(rng), IMAGE_SIZE)
        image = Image.blend(image.convert("RGB"), text, _OVERLAY)
    encoded = io.BytesIO()
    image.convert("RGB").save(encoded, "JPEG", quality=_JPEG_QUALITY)
    metadata = {"noise": kind, "scene": scene.describe()}
    return Record(f"second-{seed}-{index:06d}", encoded.getvalue(), caption, metadata)


def first_captions(seed: int = 0, count: int = 16) -> str:
    """Returns kinds, scenes and captions of the first pairs, which reveal changes of the web."""
    found = [(r.metadata, r.caption) for r in make_records(seed, count)]
    return json.dumps([KINDS, found], sort_keys=True)


def _sample_other(rng: np.random.Generator, scene: Scene) -> Scene:
    """Samples a scene that has no shape in common with the given one."""
    shown = {o.shape for o in scene.objects}
    while True:
        other = sampling.sample_scene(rng)
        if not shown & {o.shape for o in other.objects}:
            return other


def _name(item: SceneObject) -> str:
    texture = "" if item.texture == "plain" else item.texture
    return " ".join(filter(None, (item.size, texture, item.color, item.shape)))


def name_objects(rng: np.random.Generator, scene: Scene) -> str:
    """Writes a right caption of nouns and adjectives, without a verb."""
    names = [_name(item) for item in scene.objects]
    if len(names) == 1:
        return names[0]
    return f"{names[0]} {_WITHOUT_VERB[scene.relation]} {names[1]}"


def write_title(rng: np.random.Generator, scene: Scene) -> str:
    """Writes a product title that names all objects."""
    names = " & ".join(_name(item).title() for item in scene.objects)
    pack, end = _PACKS[rng.integers(len(_PACKS))], _ENDS[rng.integers(len(_ENDS))]
    return f"{names} {end} | {pack}"


def _describe(rng: np.random.Generator, scene: Scene) -> str:
    return captions.describe_scene(rng, scene)


def _describe_or_name(rng: np.random.Generator, scene: Scene) -> str:
    return _describe(rng, scene) if rng.random() < 0.5 else name_objects(rng, scene)


_MAKERS: Mapping = {
    "sentence": _describe,
    "names": name_objects,
    "overlaid": _describe_or_name,
    "title": write_title,
    "mismatched": _describe_or_name,
    "uninformative": lambda rng, scene: captions.write_uninformative(rng),
}
