"""Duplicates by the recipe: copies of a drawing are found, and similar drawings are not."""

import pytest
from PIL import Image, ImageDraw

from data_prep.duplicates import job
from data_prep.duplicates.table import Lookup
from tests.data_prep.duplicates.jobs import (
    duplicates_config,
    read_dropped,
    read_rows,
    scene,
    write_pictures,
)
from tests.make import encoded

SIDE = 128


def _draw(*shapes, ground="white") -> Image.Image:
    """Draws shapes on a ground; each is an `ImageDraw` method, its coordinates and a colour."""
    image = Image.new("RGB", (SIDE, SIDE), ground)
    draw = ImageDraw.Draw(image)
    for method, coordinates, color in shapes:
        getattr(draw, method)(coordinates, fill=color)
    return image


def _letter(bowl_left: int, stem_left: int) -> Image.Image:
    return _draw(
        ("ellipse", (bowl_left, 10, bowl_left + 64, 74), "black"),
        ("ellipse", (bowl_left + 18, 28, bowl_left + 46, 56), "white"),
        ("rectangle", (stem_left, 10, stem_left + 18, 118), "black"),
    )


def _eye(iris: str) -> Image.Image:
    return _draw(
        ("ellipse", (4, 34, 124, 94), "black"),
        ("ellipse", (10, 40, 118, 88), "white"),
        ("ellipse", (44, 44, 84, 84), iris),
        ("ellipse", (56, 56, 72, 72), "black"),
    )


def _clock(hand: tuple[int, int]) -> Image.Image:
    image = _draw(("ellipse", (4, 4, 124, 124), "grey"), ("ellipse", (12, 12, 116, 116), "white"))
    ImageDraw.Draw(image).line((64, 64, *hand), fill="black", width=6)
    return image


_BOX = (48, 48, 76, 76)
_UNLIKE = {
    "the color of a shape": [
        _draw(("ellipse", (14, 14, 114, 114), color)) for color in ("#d02020", "#207a20")
    ],
    "the color of a part": [_eye("green"), _eye("saddlebrown")],
    "the color of the ground": [
        _draw(("ellipse", (14, 14, 114, 114), "black"), ground=ground)
        for ground in ("white", "#c0e0ff")
    ],
    "q and p": [_letter(18, 72), _letter(46, 38)],
    "less and greater": [
        _draw(("polygon", [(x, 20), (SIDE - x, 64), (x, 108), (x, 90), (m, 64), (x, 38)], "black"))
        for x, m in ((20, 70), (108, 58))
    ],
    "small drawings on a white ground": [
        _draw(("ellipse", _BOX, "black")),
        _draw(("rectangle", _BOX, "black")),
        _draw(("polygon", [(62, 44), (80, 80), (44, 80)], "black")),
    ],
    "the hand of a clock": [_clock((64, 20)), _clock((108, 64))],
}


def _find(folder, pictures, captions=None, **changes):
    write_pictures(folder / "in" / "0.tar", pictures, captions)
    config = duplicates_config(folder / "in", folder / "out", **changes)
    assert job.run(config) == {}
    return read_dropped(folder / "out")


def test_drawings_that_differ_in_one_thing_are_no_duplicates(tmp_path):
    pictures = {
        f"{what} {number}": encoded(picture)
        for what, several in _UNLIKE.items()
        for number, picture in enumerate(several)
    }
    assert _find(tmp_path, pictures) == {}


def _edits(image: Image.Image) -> dict[str, bytes]:
    width, height = image.size
    box = (round(0.03 * width), round(0.06 * height), round(0.95 * width), round(0.98 * height))
    return {
        "again": encoded(image, "JPEG", quality=50),
        "small": encoded(image.resize((width // 2, height // 2))),
        "large": encoded(image.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)),
        "crop": encoded(image.crop(box), "JPEG"),
    }


def test_copies_of_pictures_are_found_among_others(tmp_path):
    originals = {"eye": _eye("green"), "q": _letter(18, 72), "scene": scene(1, 9, (200, 150))}
    pictures = {name: encoded(picture) for name, picture in originals.items()}
    expected = {}
    for name, picture in originals.items():
        copies = {f"{name} {edit}": data for edit, data in _edits(picture).items()}
        expected |= dict.fromkeys(copies, ("near", name))
        pictures |= copies
    pictures |= {f"o{seed}": encoded(scene(seed, 9)) for seed in range(5, 9)}
    assert _find(tmp_path, pictures, keep="first") == expected


def test_mirror_images_are_alike_on_request(tmp_path):
    one, other = (encoded(picture) for picture in _UNLIKE["q and p"])
    found = _find(tmp_path, {"q": one, "p": other}, keep="first", embeddings__mirrored=True)
    assert found == {"p": ("near", "q")}


_CAPTIONS = {"a0": "a cat", "a1": "a dog", "a2": " a  cat", "b0": "a cat", "b1": "a cow"}


@pytest.fixture
def captioned():
    """Equal pictures and re-encoded copies of them; see `_CAPTIONS`."""
    picture = scene(3, 9)
    png, jpeg = encoded(picture), encoded(picture, "JPEG", quality=60)
    return {name: png if name[0] == "a" else jpeg for name in _CAPTIONS}


def test_a_picture_with_another_caption_is_marked_and_kept(tmp_path, captioned):
    found = _find(tmp_path, captioned, _CAPTIONS, keep="first")
    assert found == {"a2": ("exact", "a0"), "b0": ("near", "a0")}
    rows = read_rows(tmp_path / "out")
    marked = {key: row["duplicate_of"] for key, row in rows.items() if row["other_caption"]}
    assert marked == {"a1": "a0", "b1": "b0"}
    assert {rows[key]["kind"] for key in marked} == {"kept"}
    assert [row is None for row in Lookup(tmp_path / "out").find(list(_CAPTIONS))] == [
        key not in found for key in _CAPTIONS
    ]


def test_captions_count_for_nothing_on_request(tmp_path, captioned):
    found = _find(tmp_path, captioned, _CAPTIONS, keep="first", other_captions="drop")
    kinds = {key: kind for key, (kind, _) in found.items()}
    assert kinds == {"a1": "exact", "a2": "exact", "b0": "near", "b1": "exact"}


def test_the_copy_of_the_same_caption_is_preferred(tmp_path):
    """A closer picture with another caption must not hide the copy with the same caption."""
    picture = scene(4, 9)
    pictures = {
        "first": encoded(picture, "JPEG", quality=40),
        "closer": encoded(picture),
        "copy": encoded(picture, "PNG", optimize=True, compress_level=1),
    }
    assert len(set(map(len, pictures.values()))) == 3
    captions = {"first": "a cat", "closer": "a dog", "copy": "a cat"}
    assert _find(tmp_path, pictures, captions, keep="first") == {"copy": ("near", "first")}
