"""Scenes of the synthetic web: places objects so that the scene shows a given relation.

`sampling.py` chooses the content of a scene, `drawing.py` draws it, and `captions.py` describes
it.

Ours: everything in this file; the paper trains on web data and has no synthetic set.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from data_prep.synthetic import shapes

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (246, 132, 24),
    "yellow": (248, 212, 36),
    "green": (40, 150, 66),
    "blue": (42, 92, 206),
    "purple": (124, 52, 158),
    "pink": (248, 140, 190),
    "brown": (122, 76, 42),
    "black": (24, 24, 28),
    "gray": (136, 138, 142),
}
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SINGLE_RELATIONS = ("floating", "standing", "falling")
PAIR_RELATIONS = (
    "on",
    "above",
    "beside",
    "against",
    "behind",
    "inside",
    "chasing",
    "dropping",
    "hanging",
)
# A single object is large and near the centre. With small ones anywhere in the picture, a student
# with 32 px images and 8 px patches stays at chance.
_SINGLE_RADII = {"small": (0.19, 0.21), "large": (0.32, 0.35)}
_PAIR_RADII = {"small": (0.13, 0.15), "large": (0.21, 0.24)}
_SINGLE_SHIFT = 0.05
_CONTAINER_RADII, _CONTAINED_RADII = (0.3, 0.36), (0.115, 0.135)
_MARGIN = 0.02
_MAX_ATTEMPTS = 200


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One shape of a scene. x, y and radius are fractions of the image side, angle in degrees."""

    shape: str
    color: str
    size: str
    texture: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.2
    angle: float = 0.0

    def outline(self) -> np.ndarray:
        """Returns the placed outer outline, float64 [n, 2]."""
        unit = shapes.unit_outline(self.shape)
        return shapes.place(unit, self.x, self.y, self.radius, self.angle)

    def hole(self) -> np.ndarray | None:
        """Returns the placed outline of the hole, float64 [n, 2], or None."""
        unit = shapes.unit_hole(self.shape)
        if unit is None:
            return None
        return shapes.place(unit, self.x, self.y, self.radius, self.angle)

    def box(self) -> tuple[float, float, float, float]:
        """Returns the bounding box (left, top, right, bottom) in fractions of the image side."""
        points = self.outline()
        return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())

    def moved(self, **changes: float) -> "SceneObject":
        """Returns a copy of the object with changed position, radius or angle."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Scene:
    """The objects of one picture; the relation holds from objects[0] to objects[1].

    `ground` is the height of the floor's edge (fraction of the image side) or None. `lines` are
    dark strokes (x0, y0, x1, y1): the thread of a hanging object, or the trail of a moving one.
    """

    relation: str
    objects: tuple[SceneObject, ...]
    ground: float | None = None
    lines: tuple[tuple[float, float, float, float], ...] = ()

    def describe(self) -> dict:
        """Returns the scene as JSON data: the relation, and every object with its box."""
        fields = ("shape", "color", "size", "texture")
        return {
            "relation": self.relation,
            "objects": [
                {name: getattr(o, name) for name in fields}
                | {"box": [round(value, 4) for value in o.box()]}
                for o in self.objects
            ],
        }


def lay_out(rng: np.random.Generator, relation: str, looks: tuple[SceneObject, ...]) -> Scene:
    """Returns a scene with positions, radii and angles for which the relation is true.

    Samples placements until everything is inside the picture.
    """
    radii = _SINGLE_RADII if len(looks) == 1 else _PAIR_RADII
    for _ in range(_MAX_ATTEMPTS):
        sized = tuple(
            o.moved(radius=rng.uniform(*radii[o.size]), angle=_rest_angle(rng, o.shape))
            for o in looks
        )
        scene = _LAYOUTS[relation](rng, *sized)
        if scene is not None and _inside_picture(scene):
            return scene
    raise AssertionError(f"no layout found for {relation}: {looks}")


def _rest_angle(rng: np.random.Generator, shape: str) -> float:
    return float(rng.choice([0.0, 90.0, 180.0, 270.0])) if shape == "arrow" else 0.0


def _inside_picture(scene: Scene) -> bool:
    boxes = [o.box() for o in scene.objects]
    boxes += [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in scene.lines]
    return all(min(box) >= _MARGIN and max(box) <= 1 - _MARGIN for box in boxes)


def _random_ground(rng: np.random.Generator) -> float:
    return rng.uniform(0.82, 0.94)


def _on_ground(item: SceneObject, ground: float) -> SceneObject:
    return item.moved(y=item.y + ground - item.box()[3])


def _landed(upper: SceneObject, lower: SceneObject, clearance: float = 0.0) -> SceneObject | None:
    """Moves `upper` vertically until it is `clearance` above `lower`; 0 lets them touch."""
    upper = upper.moved(y=0.5)
    rows = shapes.gap_below(shapes.rasterize(upper.outline()), shapes.rasterize(lower.outline()))
    return None if rows is None else upper.moved(y=upper.y + rows / shapes.GRID - clearance)


def _trail(
    item: SceneObject, direction: tuple[float, float], length: float
) -> tuple[tuple[float, float, float, float], ...]:
    """Returns three strokes behind an object that moves along `direction` (a unit axis vector)."""
    left, top, right, bottom = item.box()
    dx, dy = direction
    strokes = []
    for offset in (-0.5, 0.0, 0.5):
        x = item.x + offset * (right - left) * abs(dy)
        y = item.y + offset * (bottom - top) * abs(dx)
        if dx:
            x = left - 0.02 if dx > 0 else right + 0.02
        if dy:
            y = top - 0.02 if dy > 0 else bottom + 0.02
        reach = length if offset == 0.0 else 0.7 * length
        strokes.append((x, y, x - dx * reach, y - dy * reach))
    return tuple(strokes)


def _near(rng: np.random.Generator, middle: float) -> float:
    return middle + rng.uniform(-_SINGLE_SHIFT, _SINGLE_SHIFT)


def _floating(rng: np.random.Generator, item: SceneObject) -> Scene:
    angle = item.angle + rng.uniform(-8, 8)
    return Scene("floating", (item.moved(x=_near(rng, 0.5), y=_near(rng, 0.48), angle=angle),))


def _standing(rng: np.random.Generator, item: SceneObject) -> Scene:
    ground = _random_ground(rng)
    return Scene("standing", (_on_ground(item.moved(x=_near(rng, 0.5)), ground),), ground)


def _falling(rng: np.random.Generator, item: SceneObject) -> Scene:
    angle = item.angle + rng.uniform(-8, 8)
    item = item.moved(x=_near(rng, 0.5), y=_near(rng, 0.52), angle=angle)
    ground = max(_random_ground(rng), item.box()[3] + 0.02)
    return Scene("falling", (item,), ground, _trail(item, (0.0, 1.0), 0.1))


def _on(rng: np.random.Generator, subject: SceneObject, other: SceneObject) -> Scene | None:
    ground = _random_ground(rng)
    other = _on_ground(other.moved(x=rng.uniform(0.3, 0.7)), ground)
    landed = _landed(subject.moved(x=other.x + rng.uniform(-0.2, 0.2) * other.radius), other)
    return None if landed is None else Scene("on", (landed, other), ground)


def _above(rng: np.random.Generator, subject: SceneObject, other: SceneObject) -> Scene | None:
    ground = _random_ground(rng)
    other = _on_ground(other.moved(x=rng.uniform(0.3, 0.7)), ground)
    x = other.x + rng.uniform(-0.4, 0.4) * other.radius
    landed = _landed(subject.moved(x=x), other, clearance=rng.uniform(0.12, 0.2))
    return None if landed is None else Scene("above", (landed, other), ground)


def _dropping(rng: np.random.Generator, subject: SceneObject, other: SceneObject) -> Scene | None:
    ground = rng.uniform(0.9, 0.96)
    other = _on_ground(other.moved(x=rng.uniform(0.3, 0.7)), ground)
    x = other.x + rng.uniform(-0.3, 0.3) * other.radius
    angle = subject.angle + rng.uniform(-10, 10)
    landed = _landed(subject.moved(x=x, angle=angle), other, clearance=rng.uniform(0.04, 0.08))
    if landed is None:
        return None
    return Scene("dropping", (landed, other), ground, _trail(landed, (0.0, 1.0), 0.1))


def _hanging(rng: np.random.Generator, subject: SceneObject, other: SceneObject) -> Scene | None:
    x = rng.uniform(0.3, 0.7)
    subject = subject.moved(x=x, y=rng.uniform(0.6, 0.85))
    landed = _landed(other.moved(x=x), subject, clearance=rng.uniform(0.12, 0.2))
    if landed is None:
        return None
    other = landed
    # The thread connects the outlines on the vertical line through both centres.
    column = min(int(x * shapes.GRID), shapes.GRID - 1)
    upper = np.flatnonzero(shapes.rasterize(other.outline())[:, column])
    lower = np.flatnonzero(shapes.rasterize(subject.outline())[:, column])
    if not upper.size or not lower.size:
        return None
    thread = (x, float(upper[-1]) / shapes.GRID, x, float(lower[0] + 1) / shapes.GRID)
    return Scene("hanging", (subject, other), None, (thread,))


def _slid_into_view(rng: np.random.Generator, scene: Scene) -> Scene | None:
    """Moves a scene sideways to a random position, or returns None if it is too wide."""
    lefts_and_rights = [x for o in scene.objects for x in o.box()[::2]]
    lefts_and_rights += [x for line in scene.lines for x in line[::2]]
    low, high = _MARGIN - min(lefts_and_rights), 1 - _MARGIN - max(lefts_and_rights)
    if low > high:
        return None
    shift = rng.uniform(low, high)
    return dataclasses.replace(
        scene,
        objects=tuple(o.moved(x=o.x + shift) for o in scene.objects),
        lines=tuple((x0 + shift, y0, x1 + shift, y1) for x0, y0, x1, y1 in scene.lines),
    )


def _beside(rng: np.random.Generator, subject: SceneObject, other: SceneObject) -> Scene | None:
    ground = _random_ground(rng)
    subject, other = _on_ground(subject, ground), _on_ground(other, ground)
    other = _next_to(subject, other, rng.uniform(0.05, 0.12), to_the_right=rng.random() < 0.5)
    return _slid_into_view(rng, Scene("beside", (subject, other), ground))


def _next_to(item: SceneObject, other: SceneObject, gap: float, to_the_right: bool) -> SceneObject:
    """Moves `other` sideways until the bounding boxes are `gap` apart."""
    if to_the_right:
        return other.moved(x=other.x + item.box()[2] + gap - other.box()[0])
    return other.moved(x=other.x + item.box()[0] - gap - other.box()[2])


def _against(rng: np.random.Generator, subject: SceneObject, other: SceneObject) -> Scene | None:
    ground = _random_ground(rng)
    side = 1.0 if rng.random() < 0.5 else -1.0  # 1: the subject is on the left, leaning right.
    other = _on_ground(other, ground)
    angle = subject.angle + side * rng.uniform(16, 26)
    subject = _on_ground(subject.moved(x=0.5, angle=angle), ground)
    masks = [shapes.rasterize(o.outline()).T for o in (subject, other)]
    columns = shapes.gap_below(*(masks if side > 0 else masks[::-1]))
    if columns is None:
        return None
    subject = subject.moved(x=subject.x + side * columns / shapes.GRID)
    return _slid_into_view(rng, Scene("against", (subject, other), ground))


def _behind(rng: np.random.Generator, subject: SceneObject, other: SceneObject) -> Scene | None:
    other = other.moved(x=rng.uniform(0.3, 0.7), y=rng.uniform(0.45, 0.75))
    direction = np.radians(rng.uniform(180, 360))  # From the left over the top to the right.
    reach = rng.uniform(0.3, 0.9) * (subject.radius + other.radius)
    subject = subject.moved(
        x=other.x + reach * np.cos(direction), y=other.y + reach * np.sin(direction)
    )
    behind, front = (shapes.rasterize(o.outline()) for o in (subject, other))
    visible = (behind & ~front).sum() / behind.sum()
    return Scene("behind", (subject, other)) if 0.58 <= visible <= 0.78 else None


def _inside(rng: np.random.Generator, subject: SceneObject, other: SceneObject) -> Scene | None:
    other = other.moved(radius=rng.uniform(*_CONTAINER_RADII))
    other = other.moved(x=rng.uniform(0.36, 0.64), y=rng.uniform(0.36, 0.64))
    subject = subject.moved(
        radius=rng.uniform(*_CONTAINED_RADII),
        x=other.x + rng.uniform(-0.05, 0.05),
        y=other.y + rng.uniform(-0.07, 0.07),
    )
    hole = other.hole()
    room = other.outline() if hole is None else hole
    roomy = subject.moved(radius=1.2 * subject.radius).outline()
    contained = shapes.rasterize(roomy) & ~shapes.rasterize(room)
    return None if contained.any() else Scene("inside", (subject, other))


def _chasing(rng: np.random.Generator, subject: SceneObject, other: SceneObject) -> Scene | None:
    side = 1.0 if rng.random() < 0.5 else -1.0  # 1: both run to the right.
    middle = rng.uniform(0.35, 0.65)
    subject = subject.moved(y=middle + rng.uniform(-0.03, 0.03))
    other = other.moved(y=middle + rng.uniform(-0.03, 0.03))
    other = _next_to(subject, other, rng.uniform(0.1, 0.14), to_the_right=side > 0)
    lines = _trail(subject, (side, 0.0), 0.08) + _trail(other, (side, 0.0), 0.07)
    return _slid_into_view(rng, Scene("chasing", (subject, other), None, lines))


_LAYOUTS: dict[str, Callable[..., Scene | None]] = {
    "floating": _floating,
    "standing": _standing,
    "falling": _falling,
    "on": _on,
    "above": _above,
    "beside": _beside,
    "against": _against,
    "behind": _behind,
    "inside": _inside,
    "chasing": _chasing,
    "dropping": _dropping,
    "hanging": _hanging,
}
