"""Match decisions, against a hand-made table and a search over all substrings."""

import random

import pytest

from data_prep.text_spotting.spotter import caption_matches

# Spotted texts, caption, whether they share five consecutive characters. Written by hand.
_TABLE = [
    (["happy birthday"], "A cake that says Happy Birthday", True),
    (["happ"], "happy dog", False),  # four characters
    (["hap", "py dog"], "happy dog", True),  # "pydog"
    (["h a p p y"], "happy dog", True),  # white space is ignored on both sides
    (["ﬁne art"], "fine art prints", True),  # the ligature is a compatibility form
    (["ＳＡＬＥＳ"], "summer sales", True),  # full width
    (["STRASSE"], "Straße in Wien", True),  # full case folding
    ([], "anything", False),
    (["anything"], "", False),
    (["something else", "sunset beach"], "Beach at sunset", True),
]


@pytest.mark.parametrize(("spotted", "caption", "expected"), _TABLE)
def test_matches_of_the_table(spotted, caption, expected):
    assert caption_matches(spotted, caption) is expected


def _search(spotted: str, caption: str, length: int, errors: int) -> bool:
    """Compares all pairs of substrings of this length, character by character."""
    return any(
        sum(a != b for a, b in zip(spotted[i : i + length], caption[j : j + length], strict=True))
        <= errors
        for i in range(len(spotted) - length + 1)
        for j in range(len(caption) - length + 1)
    )


def test_against_a_search_over_all_substrings():
    rng = random.Random(0)
    outcomes = set()
    for _ in range(2000):
        spotted, caption = ("".join(rng.choices("abc", k=rng.randint(0, 14))) for _ in range(2))
        exact, misread = rng.randint(1, 8), rng.randint(1, 9)
        expected = (
            _search(spotted, caption, exact, 0),
            _search(spotted, caption, misread, 1),
        )
        assert caption_matches([spotted], caption, exact) is expected[0]
        assert caption_matches([spotted], caption, exact, misread_min_chars=misread) is any(
            expected
        )
        outcomes.add(expected)
    assert len(outcomes) == 4


@pytest.mark.parametrize(
    ("spotted", "caption", "expected"),
    [
        (["PERSON"], "person with a dog", False),  # a very common word
        (["PERSON", "SNOW"], "person in the snow", True),  # two common words, and no other text
        (["PERSON", "SNOW", "a sunny day in may"], "person in the snow", False),  # much other text
        (["all pink inside"], "all pink inside of it", True),  # one run, but all of the text
        (["we roasted chestnuts here all day"], "chestnuts in a bag", False),  # much other text
        (["GIVE", "WAY", "GIVE WAY"], "a give way sign", True),  # the spotter adds joined lines
        (["giantredbalooa"], "giant red balloon", True),  # missed blanks
        (["the 4rowds Arive f0r"], "the crowds arrive for a day", True),  # misread characters
        ([], "anything", False),
        (["anything"], "", False),
    ],
)
def test_runs_weighed_by_their_words(spotted, caption, expected):
    assert caption_matches(spotted, caption, weigh_words=True) is expected


def test_texts_of_other_captions_seldom_match(web_captions):
    rng = random.Random(0)
    found = {True: 0, False: 0}
    for _ in range(1000):
        drawn, other = rng.sample(web_captions, 2)
        words = drawn.split()[:8]
        lines = [" ".join(words[:4]), " ".join(words[4:])]
        for weigh in found:
            found[weigh] += caption_matches(lines, other, weigh_words=weigh)
            assert caption_matches(lines, drawn, weigh_words=weigh)
    assert found[True] <= 10  # of a thousand
    assert found[False] >= 40
