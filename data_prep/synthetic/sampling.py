"""Samples the content of synthetic scenes, and holds out one in eight combinations for evaluation.

All randomness comes from the generators passed in. `scenes.py` places the objects; drawing and
captions do not belong here.

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

SINGLE_SHARE = 0.7  # Share of the clean scenes with one object.
TEXTURE_SHARES = (0.52, 0.16, 0.16, 0.16)

_COVERS = frozenset({"circle", "square", "heart", "diamond", "cloud", "flower"})
_CONTAINERS = frozenset({"circle", "square", "ring", "heart", "diamond", "cloud", "flower"})
_LEANERS = frozenset({"square", "triangle", "star", "heart", "cross", "diamond", "arrow"})
_OVERLAPPING = frozenset({"behind", "inside"})
_MIN_CONTRAST = 110.0  # Minimum RGB distance of two objects that overlap in the picture.
_HELD_OUT_ONE_IN = 8


def signature(relation: str, pair: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Returns the relation and each object's colour and shape: what full captions distinguish.

    "Beside" is symmetric, so both orders have the same signature.
    """
    parts = [f"{color} {shape}" for shape, color in pair]
    return (relation, *(sorted(parts) if relation == "beside" else parts))


def is_held_out(names: tuple[str, ...]) -> bool:
    """Returns whether a signature of two objects is held out (one in eight, by hash)."""
    digest = hashlib.blake2b("/".join(names).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % _HELD_OUT_ONE_IN == 0


def sample_scene(rng: np.random.Generator) -> Scene:
    """Samples a training scene of one or two objects, whose signature is not held out."""
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
    """Samples a scene of one object, with the given shape or colour if any."""
    relation = str(rng.choice(SINGLE_RELATIONS))
    random_shape, random_color = _random_kind(rng)
    look = _random_look(rng, shape or random_shape, color or random_color, str(rng.choice(SIZES)))
    return lay_out(rng, relation, (look,))


def can_show(relation: str, subject: tuple[str, str], other: tuple[str, str]) -> bool:
    """Returns whether two (shape, colour) can show the relation clearly enough for a person."""
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
    """Samples a scene of two objects, given as (shape, colour), for which `can_show` must hold."""
    if relation == "inside":
        sizes = ("small", "large")
    elif relation == "behind":
        # A large object behind a small one would hardly be hidden.
        sizes = (("small", "small"), ("small", "large"), ("large", "large"))[rng.integers(3)]
    else:
        # Two large objects do not fit one above the other.
        sizes = (("small", "small"), ("small", "large"), ("large", "small"))[rng.integers(3)]
    looks = (_random_look(rng, *subject, sizes[0]), _random_look(rng, *other, sizes[1]))
    if relation == "inside":
        looks = (looks[0], dataclasses.replace(looks[1], texture="plain"))
    return lay_out(rng, relation, looks)


def count_held_out(seed: int) -> int:
    """Returns the number of scenes with distinct signatures that `sample_held_out` can sample."""
    return len(_shuffled_held_out(seed))


def sample_held_out(rng: np.random.Generator, seed: int, index: int) -> Scene:
    """Samples the index-th evaluation scene of a seed; index < `count_held_out(seed)`.

    Each index has its own signature. `rng` sets sizes, textures and positions.
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
