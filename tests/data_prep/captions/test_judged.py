"""How often the rules agree with judgements that were made before any parser saw the captions.

And what the repairs make of parses, by trees that were corrected by reading.
"""

import pathlib

import pytest

from benchmarks.caption_parser import read_trees, score_judged, score_prepositions
from data_prep.captions import cat_reason, parse_captions

JUDGED = pathlib.Path(__file__).with_name("judged_captions.tsv")


def read_rows(path: pathlib.Path) -> list[list[str]]:
    """The rows below the comments and the names of the columns."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    return [line.split("\t") for line in lines[1:]]


def agreement(rows: list[list[str]]) -> tuple[int, int]:
    """How many decisions and complexities are as they were judged."""
    pairs = list(zip(parse_captions([row[0] for row in rows]), rows, strict=True))
    decisions = sum((cat_reason(graph) is None) == (row[1] == "keep") for graph, row in pairs)
    return decisions, sum(graph.complexity == int(row[3]) for graph, row in pairs)


@pytest.fixture(scope="module")
def judged(shared_data) -> dict[str, list[list[str]]]:
    """Name of a set -> rows of caption, decision, confidence and complexity."""
    table = read_rows(shared_data.parent / "captions_judged.tsv")
    captions = (shared_data / "captions_web.txt").read_text("utf-8").split("\n")
    sets = {"first half": table[0::2], "second half": table[1::2]}
    for draw, line, *row in read_rows(JUDGED):
        sets.setdefault(f"draw {draw}", []).append([captions[int(line) - 1], *row])
    return sets


# The limits are what the rules reach. All but draws 7, 9 and 11 were looked at while rules were
# made; before that the rules of their day reached 113 and 88 on draw 2, 117 and 94 on draw 3, 114
# and 101 on draw 4, 113 and 95 on draw 5, 105 and 84 on draw 6, 284 and 217 on draw 8, 551 and 418
# on draw 10.
@pytest.mark.parametrize(
    ("name", "count", "decisions", "complexities"),
    [
        ("first half", 100, 96, 87),
        ("second half", 100, 95, 81),
        ("draw 1", 120, 117, 102),
        ("draw 2", 120, 117, 105),
        ("draw 3", 120, 119, 101),
        ("draw 4", 120, 116, 108),
        ("draw 5", 120, 116, 103),
        ("draw 6", 112, 105, 86),
        ("draw 7", 120, 113, 83),
        ("draw 8", 300, 287, 226),
        ("draw 9", 200, 184, 153),
        ("draw 10", 600, 561, 427),
        ("draw 11", 300, 275, 221),
    ],
)
def test_the_rules_agree_with_judgements(judged, name, count, decisions, complexities):
    rows = judged[name]
    assert len({row[0] for row in rows}) == len(rows) == count
    found = agreement(rows)
    assert found[0] >= decisions
    assert found[1] >= complexities


def test_repairs_mend_more_prepositions_than_they_break(shared_data, parser, lemmatizer):
    captions = (shared_data / "captions_web.txt").read_text("utf-8").split("\n")
    trees = read_trees(captions, lemmatizer)
    assert len(trees) == 4134
    assert all(0 <= head < len(tree.tokens) for tree in trees for *_, head in tree.tokens)
    found = score_prepositions(parser, trees[:800], lemmatizer)
    assert found["count"] > 700 and found["repaired"] > found["as_parsed"] + 0.007
    with pytest.raises(
        ValueError, match=r"caption_trees\.tsv, line \d+: another caption, or tokens"
    ):
        read_trees([f"{caption} twice" for caption in captions], lemmatizer)


# Draw -> decisions and complexities that the rules reach on right trees.
ON_TREES = {"7": (114, 92), "8": (288, 249), "9": (184, 162), "10": (569, 484), "11": (284, 241)}


def test_the_rules_on_parses_and_on_right_trees(judged, shared_data, parser, lemmatizer):
    captions = (shared_data / "captions_web.txt").read_text("utf-8").split("\n")
    found = score_judged(parser, read_trees(captions, lemmatizer), lemmatizer)
    assert found.keys() == ON_TREES.keys()
    for draw, counts in found.items():
        rows = judged[f"draw {draw}"]
        assert counts["count"] == len(rows)
        parsed = counts["decisions_parsed"], counts["complexities_parsed"]
        assert parsed == agreement(rows)
        assert counts["decisions_on_trees"] >= ON_TREES[draw][0]
        assert counts["complexities_on_trees"] >= ON_TREES[draw][1]
