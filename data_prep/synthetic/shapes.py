"""Outlines of the twelve shapes of the synthetic web, and geometry on them.

x points right and y points down. A *unit* outline fits a circle of radius about 1 around the
origin. A *placed* outline is in fractions of the image side, from 0 to 1.
"""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

GRID = 128  # Rows and columns of the raster used to place shapes.


def _arc(center: tuple[float, float], radius: float, start: float, stop: float, n: int):
    angles = np.radians(np.linspace(start, stop, n))
    return np.stack(
        [center[0] + radius * np.cos(angles), center[1] + radius * np.sin(angles)], axis=1
    )


def _circle(radius: float = 0.92) -> np.ndarray:
    return _arc((0.0, 0.0), radius, 0.0, 360.0, 73)[:-1]


def _regular_star(points: int, inner: float) -> np.ndarray:
    angles = np.radians(-90.0 + np.arange(2 * points) * 180.0 / points)
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.06, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.radians(np.arange(0, 360, 5))
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 16.5


def _crescent() -> np.ndarray:
    # Two circles that cross at +-55 degrees of the outer one. The horns point right.
    crossing = 55.0
    outer = _arc((0.0, 0.0), 1.0, crossing, 360.0 - crossing, 49)
    tip = np.array([np.cos(np.radians(crossing)), np.sin(np.radians(crossing))])
    center_x = 0.46
    inner_radius = float(np.hypot(tip[0] - center_x, tip[1]))
    inner_angle = float(np.degrees(np.arctan2(tip[1], tip[0] - center_x)))
    inner = _arc((center_x, 0.0), inner_radius, 360.0 - inner_angle, inner_angle, 37)
    return np.concatenate([outer, inner[1:-1]]) + [0.12, 0.0]


def _union_of_circles(circles: list[tuple[float, float, float]]) -> np.ndarray:
    """Returns the outline of overlapping circles (x, y, radius), seen from the origin inside."""
    angles = np.radians(np.arange(0, 360, 3))
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    reach = np.zeros(len(angles))
    for x, y, radius in circles:
        along = directions @ np.array([x, y])
        discriminant = along**2 - (x * x + y * y - radius * radius)
        hit = discriminant >= 0
        reach[hit] = np.maximum(reach[hit], along[hit] + np.sqrt(discriminant[hit]))
    return directions * reach[:, None]


def _cloud() -> np.ndarray:
    outline = _union_of_circles(
        [(-0.62, 0.14, 0.42), (-0.18, -0.22, 0.5), (0.4, -0.08, 0.42), (0.7, 0.2, 0.36)]
        + [(0.0, 0.1, 0.46)]
    )
    outline[:, 1] = np.minimum(outline[:, 1], 0.5)
    return 0.92 * outline


def _flower() -> np.ndarray:
    turns = np.radians(-90.0 + 72.0 * np.arange(5))
    petals = [(0.6 * np.cos(a), 0.6 * np.sin(a), 0.4) for a in turns]
    return _union_of_circles(petals + [(0.0, 0.0, 0.5)])


def _cross() -> np.ndarray:
    a, b = 0.95, 0.32
    return np.array(
        [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)]
        + [(b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
    )


def _arrow() -> np.ndarray:
    return np.array(
        [(-1.0, -0.28), (0.1, -0.28), (0.1, -0.8), (1.0, 0.0), (0.1, 0.8), (0.1, 0.28)]
        + [(-1.0, 0.28)]
    )


_OUTLINES: dict[str, Callable[[], np.ndarray]] = {
    "circle": _circle,
    "square": lambda: np.array([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]),
    "triangle": lambda: np.array([(0.0, -0.95), (1.0, 0.78), (-1.0, 0.78)]),
    "star": lambda: _regular_star(5, 0.44),
    "heart": _heart,
    "ring": lambda: _circle(0.97),
    "cross": _cross,
    "diamond": lambda: np.array([(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]),
    "crescent": _crescent,
    "arrow": _arrow,
    "cloud": _cloud,
    "flower": _flower,
}

SHAPES: tuple[str, ...] = tuple(_OUTLINES)
HOLE_SHAPE = "ring"
_HOLE_RADIUS = 0.56


@functools.cache
def unit_outline(shape: str) -> np.ndarray:
    """Returns the outer outline of a shape in unit coordinates, float64 [n, 2]."""
    return _OUTLINES[shape]()


@functools.cache
def unit_hole(shape: str) -> np.ndarray | None:
    """Returns the outline of a shape's hole, float64 [n, 2], or None if it has none."""
    return _circle(_HOLE_RADIUS) if shape == HOLE_SHAPE else None


def place(
    outline: np.ndarray, x: float, y: float, radius: float, angle_degrees: float
) -> np.ndarray:
    """Rotates (clockwise on screen), scales and moves a unit outline; float64 [n, 2]."""
    angle = np.radians(angle_degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = outline @ np.array([[cos, sin], [-sin, cos]])
    return turned * radius + [x, y]


def rasterize(outline: np.ndarray) -> np.ndarray:
    """Returns the filled placed outline as bool [GRID, GRID], clipped at the image borders."""
    mask = Image.new("L", (GRID, GRID))
    ImageDraw.Draw(mask).polygon((outline * GRID).ravel().tolist(), fill=1)
    return np.asarray(mask, dtype=bool)


def gap_below(upper: np.ndarray, lower: np.ndarray) -> int | None:
    """Returns how many rows the upper mask, bool [h, w], can move down before it meets the lower.

    Returns:
        The minimum distance from the last row of `upper` to the first row of `lower` over the
        columns that both occupy, or None if there are none. Negative if the masks overlap.
        Transpose both masks to measure from left to right.
    """
    shared = upper.any(axis=0) & lower.any(axis=0)
    if not shared.any():
        return None
    last_upper = upper.shape[0] - 1 - upper[::-1].argmax(axis=0)
    first_lower = lower.argmax(axis=0)
    return int((first_lower - last_upper)[shared].min())
