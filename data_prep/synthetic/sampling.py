"""Chooses what a synthetic scene shows, and keeps one in eight combinations for evaluation.

Everything is drawn from the random generator that is passed in. Where things stand is decided in
`scenes.py`; no painting and no sentences in here.

Ours: everything in this file.
"""

import dataclasses
import functools
import hashlib
import itertools

import numpy as np

from data_prep.synthetic.scenes import (
    COLORS,
    PAIR_RELATIONS,
    SINGLE_RELATIONS,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    lay_out,
)
from data_prep.synthetic.shapes import SHAPES

SINGLE_SHARE = 0.7  # Of the clean scenes, those with one object.
TEXTURE_SHARES = (0.52, 0.16, 0.16, 0.16)

_COVERS = frozenset({"circle", "square", "heart", "diamond", "cloud", "flower"})
_CONTAINERS = frozenset({"circle", "square", "ring", "heart", "diamond", "cloud", "flower"})
_LEANERS = frozenset({"square", "triangle", "star", "heart", "cross", "diamond", "arrow"})
_OVERLAPPING = frozenset({"behind", "inside"})
_MIN_CONTRAST = 110.0  # RGB distance of two shapes that overlap in the picture.
_HELD_OUT_ONE_IN = 8


def signature(relation: str, pair: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The relation and the (shape, colour) of each object, which full captions distinguish.

    "Beside" is symmetric, so that both orders have one signature.
    """
    parts = [f"{color} {shape}" for shape, color in pair]
    return (relation, *(sorted(parts) if relation == "beside" else parts))


def is_held_out(names: tuple[str, ...]) -> bool:
    """Returns whether a signature of two objects is held out (one in eight, by its hash)."""
    digest = hashlib.blake2b("/".join(names).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % _HELD_OUT_ONE_IN == 0


def sample_scene(rng: np.random.Generator) -> Scene:
    """A training scene of one or two objects; its signature is never a held-out one."""
    if rng.random() < SINGLE_SHARE:
        return sample_single(rng)
    while True:
        relation = str(rng.choice(PAIR_RELATIONS))
        subject, other = _random_kind(rng), _random_kind(rng)
        if can_show(relation, subject, other) and not is_held_out(
            signature(relation, (subject, other))
        ):
            return sample_pair(rng, relation, subject, other)


def sample_single(
    rng: np.random.Generator, shape: str | None = None, color: str | None = None
) -> Scene:
    """A scene of one object, of a given shape or colour where one is given."""
    relation = str(rng.choice(SINGLE_RELATIONS))
    random_shape, random_color = _random_kind(rng)
    look = _random_look(rng, shape or random_shape, color or random_color, str(rng.choice(SIZES)))
    return lay_out(rng, relation, (look,))


def can_show(relation: str, subject: tuple[str, str], other: tuple[str, str]) -> bool:
    """Returns whether two (shape, colour) can show the relation so that a person would see it."""
    if subject == other:
        return False
    (shape, color), (other_shape, other_color) = subject, other
    if relation == "against":
        return shape in _LEANERS
    if relation not in _OVERLAPPING:
        return True
    if other_shape not in (_COVERS if relation == "behind" else _CONTAINERS):
        return False
    difference = np.subtract(COLORS[color], COLORS[other_color])
    return float(np.sqrt(np.square(difference).sum())) >= _MIN_CONTRAST


def sample_pair(
    rng: np.random.Generator, relation: str, subject: tuple[str, str], other: tuple[str, str]
) -> Scene:
    """A scene of two objects, each given as (shape, colour), for which `can_show` holds."""
    if relation == "inside":
        sizes = ("small", "large")
    elif relation == "behind":
        # A large thing behind a small one would hardly be hidden.
        sizes = (("small", "small"), ("small", "large"), ("large", "large"))[rng.integers(3)]
    else:
        # Two large things do not fit one above the other.
        sizes = (("small", "small"), ("small", "large"), ("large", "small"))[rng.integers(3)]
    looks = (_random_look(rng, *subject, sizes[0]), _random_look(rng, *other, sizes[1]))
    if relation == "inside":
        looks = (looks[0], dataclasses.replace(looks[1], texture="plain"))
    return lay_out(rng, relation, looks)


def count_held_out(seed: int) -> int:
    """Number of scenes of different signature that `sample_held_out` can give."""
    return len(_shuffled_held_out(seed))


def sample_held_out(rng: np.random.Generator, seed: int, index: int) -> Scene:
    """The index-th evaluation scene of a seed, for index below `count_held_out(seed)`.

    Scenes of different index differ in signature; `rng` decides on sizes, textures and positions.
    """
    relation, subject, other = _shuffled_held_out(seed)[index]
    return sample_pair(rng, relation, subject, other)


@functools.lru_cache(maxsize=4)
def _shuffled_held_out(seed: int) -> tuple[tuple[str, tuple[str, str], tuple[str, str]], ...]:
    pairs = itertools.permutations(itertools.product(SHAPES, COLORS), 2)
    found = {}
    for relation, pair in itertools.product(PAIR_RELATIONS, pairs):
        names = signature(relation, pair)
        if is_held_out(names) and can_show(relation, *pair):
            found[names] = (relation, *pair)
    scenes = list(found.values())
    order = np.random.default_rng([seed, len(scenes)]).permutation(len(scenes))
    return tuple(scenes[i] for i in order)


def _random_kind(rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(SHAPES)), str(rng.choice(tuple(COLORS)))


def _random_look(rng: np.random.Generator, shape: str, color: str, size: str) -> SceneObject:
    texture = str(rng.choice(TEXTURES, p=TEXTURE_SHARES))
    return SceneObject(shape=shape, color=color, size=size, texture=texture)
