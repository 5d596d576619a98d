"""Conditions on metadata: the language against SQLite, and their effect in the filter."""

import datetime
import decimal
import json
import random
import sqlite3

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from data_prep.steps.predicates import parse_condition
from tests.data_prep.filtering.jobs import job_config, read_counts

_ATOMS = (
    *("a < 0.5", "a >= b", "b != 2", "a + b * 2 > 3", "a / b <= 1.5", "-a < b - 1"),
    *('t == "en"', 't != "en"', 't in ("en", "de")', 't not in ("en", "xx")', "b in (1, 2.0)"),
    *("min(a, b) < 1", "max(a, b, 2) > 2", 't >= "de"'),
)
_VALUES = (None, 0.0, 0.25, 0.5, 1.0, 2.0, 3.5)


def _random_condition(rng: random.Random, depth: int) -> str:
    if depth == 0:
        return rng.choice(_ATOMS)
    left, right = (_random_condition(rng, depth - 1) for _ in range(2))
    return rng.choice((f"({left} and {right})", f"({left} or {right})", f"not ({left})"))


def test_conditions_are_those_of_sql_with_its_unknown_values():
    rng = random.Random(0)
    database = sqlite3.connect(":memory:")
    database.execute("create table pairs (a real, b real, t text)")
    rows = [
        (rng.choice(_VALUES), rng.choice(_VALUES), rng.choice((None, "en", "de", "fr")))
        for _ in range(60)
    ]
    database.executemany("insert into pairs values (?, ?, ?)", rows)
    seen = set()
    for text in [*_ATOMS, *(_random_condition(rng, rng.choice((1, 2, 3))) for _ in range(150))]:
        found = database.execute(f"select {text.replace(chr(34), chr(39))} from pairs")
        expected = [None if value is None else bool(value) for (value,) in found]
        condition = parse_condition(text)
        actual = [condition.holds(dict(zip("abt", row, strict=True))) for row in rows]
        assert actual == expected, text
        seen.update(actual)
    assert seen == {True, False, None}


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("0.5 < w / h < 2", {"w": 3, "h": 2}, True),
        ("a < 0.5", {"a": "0.25"}, True),  # text tables store numbers as text
        ("a < 0.5", {"a": "no number"}, None),
        ("a < 0.5", {"a": float("nan")}, None),
        ("a < 0.5", {"a": [0.1]}, None),
        ("t == 'en'", {"t": 1}, None),
        ("a / b > 1", {"a": 1, "b": 0}, None),
        ("len(caption) < 4", {"caption": "cat"}, True),
        ("a in (-1, 0)", {"a": -1}, True),
        ("a not in (-1, 0)", {"a": 1}, True),
        ("field('NSFW score') < 1", {"NSFW score": 0.5}, True),
    ],
)
def test_values_of_one_pair(text, fields, expected):
    assert parse_condition(text).holds(fields) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a < 0.5 <", "invalid syntax"),
        ("__import__('os').system('x') == 0", "no field, number or text"),
        ("(lambda: 1)() < a", "is no field"),
        ("open('x') == a", r"open\(\): expected min and max"),
        ("a in (1, -b)", "expected texts only, or numbers only"),
        ("a in (1, 'x')", "expected texts only, or numbers only"),
        ("(" * 300 + "a" + ")" * 300, "expected comparisons"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_condition(text)


_ROWS = [
    {"caption": "a dog runs", "punsafe": 0.1, "pwatermark": 0.2},
    {"caption": "a dog runs", "punsafe": 0.9, "pwatermark": 0.9},
    {"caption": "a red car", "punsafe": 0.1, "pwatermark": 0.6},
    {"caption": "a dog runs", "punsafe": None, "pwatermark": 0.1},
    {"caption": "a red car", "punsafe": 0.2, "pwatermark": 0.2},
]
_REQUIRE = ("punsafe  < 0.5", "pwatermark < 0.5")


def test_decimals_and_dates_of_a_table_are_compared(tmp_path):
    scores = [decimal.Decimal("0.1"), decimal.Decimal("0.9")]
    days = [datetime.date(2021, 1, 2)] * 2
    table = pyarrow.table({"caption": ["a dog runs"] * 2, "punsafe": scores, "day": days})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    require = ("punsafe < 0.5", "day > '2020-12-31'")
    config = job_config(
        str(tmp_path / "t.parquet"), tmp_path / "out", "metadata", predicates__require=require
    )
    assert run_filter(config) == {}
    assert pyarrow.parquet.read_table(tmp_path / "out" / "t.parquet").equals(table[:1])


@pytest.mark.parametrize(("missing", "kept"), [("drop", [0]), ("keep", [0, 3])])
def test_rows_without_images_are_filtered_first_and_counted(tmp_path, missing, kept):
    lines = [json.dumps(row) + "\n" for row in _ROWS]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    output = tmp_path / "out"
    config = job_config(
        str(tmp_path / "t.jsonl"),
        output,
        "metadata",
        predicates__require=_REQUIRE,
        predicates__missing=missing,
    )
    assert run_filter(config) == {}
    assert (output / "t.jsonl").read_text() == "".join(lines[i] for i in kept)
    unknown = {"punsafe < 0.5 is unknown": 1} if missing == "drop" else {}
    assert read_counts(output)["dropped"]["metadata"] == {
        "punsafe < 0.5 is false": 1,
        "pwatermark < 0.5 is false": 1,
        **unknown,
    }
    assert [row["stage"] for row in read_report(output)["funnel"]][1] == "metadata"
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["predicates"]["missing"], settings["metadata_rules"]) == (missing, 1)
