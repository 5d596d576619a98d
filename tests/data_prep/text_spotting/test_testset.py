"""The calibration set: its kinds, its halves, and that the text is where it says."""

import collections
import io

import numpy as np
from PIL import Image

from benchmarks.text_spotting_testset import KINDS, make_test_set, split_halves
from data_prep.text_spotting.spotter import caption_matches


def test_kinds_and_sizes():
    pictures = make_test_set(60, seed=3)
    assert collections.Counter(p.kind for p in pictures) == {
        kind: round(60 * share) for kind, share in KINDS.items()
    }
    assert len({p.key for p in pictures}) == 60
    for picture in pictures:
        assert (picture.drawn == "") == (picture.kind == "nothing")
        if picture.kind in ("band", "picture", "rotated", "unrelated"):
            assert picture.font_px >= 20
        if picture.kind == "small":
            assert 12 <= picture.font_px < 20
        # What is drawn is evidence exactly where the pair should be dropped.
        matches = caption_matches(picture.drawn.split("\n"), picture.caption)
        assert matches == picture.carries_caption


def test_same_arguments_same_pictures():
    assert make_test_set(12, seed=1) == make_test_set(12, seed=1)
    assert make_test_set(12, seed=1)[0].image != make_test_set(12, seed=2)[0].image


def test_halves_share_no_photo(shared_data):
    pictures = make_test_set(
        320, photos=shared_data / "photos.tar", captions=shared_data / "captions_web.txt"
    )
    choosing, reporting = split_halves(pictures)
    assert len(choosing) == len(reporting) == 160
    assert not {p.group for p in choosing} & {p.group for p in reporting}
    for half in (choosing, reporting):
        assert min(collections.Counter(p.kind for p in half).values()) >= 12
    photos = [p for p in pictures if p.kind == "nothing"]
    assert len({p.image for p in photos}) == len({p.group for p in photos})


def test_text_changes_only_its_place():
    # The same seed and index draw the same scene; only the text differs from a bare one.
    band = make_test_set(5, seed=4)[0]
    assert band.kind == "band"
    rows = np.asarray(Image.open(io.BytesIO(band.image))).astype(int)
    # The band is as wide as the picture: its first column has one colour over its height.
    column = rows[:, :4].reshape(len(rows), -1)
    same = np.abs(np.diff(column, axis=0)).max(axis=1) < 6
    longest = max(len(run) for run in "".join("x" if s else " " for s in same).split())
    assert longest >= band.font_px
