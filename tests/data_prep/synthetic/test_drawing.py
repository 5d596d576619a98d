"""Drawings of the synthetic web: shapes, colours and relations, measured in pixels."""

import dataclasses

import matplotlib.colors
import matplotlib.path
import numpy as np
import pytest
from scipy import ndimage

from data_prep.synthetic import drawing, sampling
from data_prep.synthetic.scenes import COLORS, PAIR_RELATIONS, SceneObject, lay_out
from data_prep.synthetic.shapes import SHAPES


def covered_pixels(outline: np.ndarray, side: int = 128) -> np.ndarray:
    """Whether the centre of each pixel is inside a placed outline; bool [side, side]."""
    columns, rows = np.meshgrid(np.arange(side), np.arange(side))
    centers = (np.stack([columns, rows], axis=-1).reshape(-1, 2) + 0.5) / side
    return matplotlib.path.Path(outline).contains_points(centers).reshape(side, side)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_colors_are_drawn_as_named(shape):
    """Compares the fill with colours of the XKCD survey, and the area with a point test."""
    survey = {
        name: 255 * np.array(matplotlib.colors.to_rgb(f"xkcd:{name.replace('gray', 'grey')}"))
        for name in COLORS
    }
    rng = np.random.default_rng(5)
    for color in COLORS:
        item = SceneObject(shape, color, "large", "plain")
        scene = lay_out(rng, "floating", (item,))
        (item,) = scene.objects
        pixels = np.asarray(drawing.render_scene(rng, scene, 128)).astype(float)
        inside = covered_pixels(item.outline())
        if shape == "ring":
            inside &= ~covered_pixels(item.hole())
        fill = pixels[ndimage.binary_erosion(inside, iterations=3)].mean(axis=0)
        nearest = min(survey, key=lambda name: np.linalg.norm(survey[name] - fill))
        assert nearest == color
        background = np.median(pixels[~inside], axis=0)
        drawn = np.abs(pixels - background).sum(axis=-1) > 0.5 * np.abs(fill - background).sum()
        assert (drawn & inside).sum() / (drawn | inside).sum() > 0.8, (color, shape)


def relation_masks(relation: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, object]:
    """Draws a scene; returns masks of red subject, blue object and dark strokes, and the scene."""
    rng = np.random.default_rng([seed, PAIR_RELATIONS.index(relation)])
    while True:
        subject = (str(rng.choice(SHAPES)), "red")
        other = (str(rng.choice(SHAPES)), "blue")
        if sampling.can_show(relation, subject, other):
            break
    scene = sampling.sample_pair(rng, relation, subject, other)
    plain = tuple(dataclasses.replace(o, texture="plain") for o in scene.objects)
    scene = dataclasses.replace(scene, objects=plain)
    red, green, blue = np.moveaxis(
        np.asarray(drawing.render_scene(rng, scene, 128)).astype(int), -1, 0
    )
    strokes = (np.maximum(np.maximum(red, green), blue) < 140) & (abs(red - blue) < 40)
    return (
        red - np.maximum(green, blue) > 60,
        blue - np.maximum(green, red) > 60,
        strokes,
        scene,
    )


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1], rows[-1]


def distance_between(first: np.ndarray, second: np.ndarray) -> float:
    return float(ndimage.distance_transform_edt(~second)[first].min())


@pytest.mark.parametrize("relation", ["on", "above", "dropping", "beside", "inside", "hanging"])
@pytest.mark.parametrize("seed", range(5))
def test_the_picture_shows_the_relation(relation, seed):
    subject, other, strokes, scene = relation_masks(relation, seed)
    left, top, right, bottom = bounds(subject)
    other_left, other_top, other_right, other_bottom = bounds(other)
    gap = distance_between(subject, other)
    if relation != "inside":
        areas = [covered_pixels(o.outline()) for o in scene.objects]
        assert (areas[0] & areas[1]).sum() <= 0.04 * areas[0].sum()
    center_above = np.argwhere(subject)[:, 0].mean() < np.argwhere(other)[:, 0].mean()
    if relation == "on":
        assert gap <= 3 and center_above and bottom < other_bottom
    elif relation in ("above", "dropping"):
        assert bottom < other_bottom and center_above
        assert gap > (10 if relation == "above" else 3)
        above_subject = strokes[: max(top - 1, 0)]
        assert above_subject.any() == (relation == "dropping")
    elif relation == "beside":
        assert abs(bottom - other_bottom) <= 3
        assert 4 <= max(left - other_right, other_left - right) <= 18
        assert not strokes.any()
    elif relation == "inside":
        assert other_left < left and right < other_right
        assert other_top < top and bottom < other_bottom
        closed = ndimage.binary_fill_holes(other)
        assert (subject & closed).sum() == subject.sum()
    else:
        assert relation == "hanging"
        assert not center_above and gap > 10
        # One unbroken dark stroke joins the two.
        grown = ndimage.binary_dilation(strokes, iterations=2)
        labels, _ = ndimage.label(grown | subject | other)
        assert len({labels[subject].max(), labels[other].max()}) == 1
        assert labels[other].max() > 0
