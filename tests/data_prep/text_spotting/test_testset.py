"""The calibration set: its kinds, its halves, and that the text is where it says."""

import collections

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
