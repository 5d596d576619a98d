"""How often the rules agree with judgements that were made before any parser saw the captions."""

import pathlib

import pytest

from data_prep.captions import cat_reason, parse_captions

JUDGED = pathlib.Path(__file__).with_name("judged_captions.tsv")


def read_rows(path: pathlib.Path) -> list[list[str]]:
    """The rows below the comments and the names of the columns."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    return [line.split("\t") for line in lines[1:]]


# Half of the first table was looked at while the rules were made. The limits are what they reach.
@pytest.mark.parametrize(
    ("name", "half", "decisions", "complexities"),
    [
        ("captions_judged.tsv", slice(0, None, 2), 95, 87),
        ("captions_judged.tsv", slice(1, None, 2), 95, 72),
        (JUDGED.name, slice(None), 114, 95),
    ],
)
def test_the_rules_agree_with_judgements(shared_data, name, half, decisions, complexities):
    if name == JUDGED.name:
        captions = (shared_data / "captions_web.txt").read_text("utf-8").split("\n")
        rows = [[captions[int(line) - 1], *row] for draw, line, *row in read_rows(JUDGED) if draw == "1"]
    else:
        rows = read_rows(shared_data.parent / name)
    rows = rows[half]
    graphs = parse_captions([row[0] for row in rows])
    pairs = list(zip(graphs, rows, strict=True))
    agree = sum((cat_reason(graph) is None) == (row[1] == "keep") for graph, row in pairs)
    assert agree >= decisions
    assert sum(graph.complexity == int(row[3]) for graph, row in pairs) >= complexities
