"""Tables beside images (jsonl, csv, tsv) and class folders, through `diht_jax.readers`."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from tests.fuzz.damage import NO_OBJECT, NOT_UTF8, ODD, Draw, damaged, flipped, noise, words
from tests.fuzz.judge import judge_source

# Paths in a table that are no image of the folder.
_BAD_PATHS = ["", " ", "missing.png", "../outside.png", "/etc/hostname", "images", "images/.."]
_BAD_PATHS += ["link.png", "pipe.png", "nul\0.png", "images/" + "x" * 300, "x/" * 3000, "~/a.png"]
_BAD_PATHS += ["http://host/a.png", "lone\ud800.png", "images/0.png/0.png", "images/\n.png"]
_BAD_LINES = [line for line in NO_OBJECT if line]
_BAD_LINES += [b"{}", b"\0", b"\xef\xbb\xbf", b'{"n": ' + b"9" * 5000 + b"}"]
_BAD_LINES += [b'{"image": "images/0.png", "caption": "%s"}' % bad for bad in NOT_UTF8]


class _Table:
    """Rows with their images, whose keys are a column. A case damages one row."""

    def __init__(self, draw: Draw, folder: pathlib.Path, *kinds: str):
        self.draw, self.kind = draw, draw(one(kinds or ("jsonl", "csv", "tsv")))
        self.path = folder / f"table.{self.kind}"
        (folder / "images").mkdir()
        (folder.parent / "outside.png").write_bytes(b"outside")
        (folder / "link.png").symlink_to(folder.parent / "outside.png")
        os.mkfifo(folder / "pipe.png")
        self.rows: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {}
        for number in range(draw(integers(3, 8))):
            image, name, caption = draw(noise(500, 1)), f"images/{number}.png", draw(words())
            (folder / name).write_bytes(image)
            row = {"id": f"row{number}", "image": name, "caption": caption, "note": "n"}
            self.rows.append(row)
            self.values[row["id"]] = (image, caption)
        self.index = draw(integers(0, len(self.rows) - 1))
        self.bad = f"row{self.index}"
        self.header = b"" if self.kind == "jsonl" else self._csv(self.rows[0])

    def lines(self) -> list[bytes]:
        """Returns the rows as lines of the file, without the header."""
        if self.kind == "jsonl":
            return [json.dumps(row).encode() + b"\n" for row in self.rows]
        return [self._csv(row.values()) for row in self.rows]

    def _csv(self, values: Any) -> bytes:
        buffer = io.StringIO()
        csv.writer(buffer, delimiter="\t" if self.kind == "tsv" else ",").writerow(values)
        return buffer.getvalue().encode("utf-8", "surrogatepass")

    def judge(self, header: bytes, lines: list[bytes], *touched: str, **verdict: bool) -> str:
        """Writes the file and reads it: all rows but the touched ones must come."""
        self.path.write_bytes(header + b"".join(lines))
        options = {"key_column": "id", "rows_per_shard": self.draw(integers(1, 4))}
        value_of = lambda pair: (pair.image, pair.caption)  # noqa: E731
        verdict |= {"may_rename": True}
        return judge_source(
            self.path, self.path, value_of, self.values, *touched, options=options, **verdict
        )


def check_lines(draw: Draw, folder: pathlib.Path) -> str:
    """Replaces one line or flips bits in it: no other row may change."""
    table = _Table(draw, folder)
    lines = table.lines()
    body = lines[table.index].rstrip(b"\r\n")
    end = lines[table.index][len(body) :]
    is_jsonl = table.kind == "jsonl"
    changed = draw(one(_BAD_LINES) | flipped(body) if is_jsonl else flipped(body))
    marks = b'\r\n",\t\\{}:[]\xef\xbb\xbf'  # these may affect other rows of a csv
    assume(is_jsonl or all(changed.count(mark) == body.count(mark) for mark in marks))
    lines[table.index] = changed.replace(b"\n", b" ") + end
    return table.judge(table.header, lines, table.bad, may_fail=False)


def check_values(draw: Draw, folder: pathlib.Path) -> str:
    """A cell of another type, null, or a path out of the folder: no other row may change.

    Only a csv may be refused because of a path.
    """
    table = _Table(draw, folder)
    row = table.rows[table.index]
    if draw(st.booleans()):
        row["image"] = draw(one(_BAD_PATHS))
        may_fail = table.kind != "jsonl"
        return table.judge(table.header, table.lines(), table.bad, may_fail=may_fail)
    assume(table.kind == "jsonl")
    field = draw(one(["image", "caption", "id", "note"]))
    row[field] = draw(one([*ODD, [["x"]], "x" * 100_000]))
    if draw(integers(0, 3)) == 3:
        del row[field]
    return table.judge(b"", table.lines(), table.bad, may_fail=False)


def check_damaged_file(draw: Draw, folder: pathlib.Path) -> str:
    """Any damage: intact rows before it must come; the rest need not be counted."""
    table = _Table(draw, folder)
    data = table.header + b"".join(table.lines())
    changed = draw(damaged(data))
    position, same = len(table.header), len(os.path.commonprefix([data, changed]))
    for row, line in zip(table.rows, table.lines(), strict=True):
        position += len(line)
        if position > same:
            del table.values[row["id"]]
    return table.judge(changed, [])


def check_forms_of_csv(draw: Draw, folder: pathlib.Path) -> str:
    """Rows with too many or too few fields, blank lines, BOMs, odd line ends: other rows stay."""
    table = _Table(draw, folder, "csv", "tsv")
    lines, header, bad = table.lines(), table.header, table.index
    delimiter = b"\t" if table.kind == "tsv" else b","
    forms = {
        "fields": lambda: delimiter.join([b"a"] * draw(one([1, 3, 5, 1000]))) + b"\r\n",
        "quote": lambda: lines[bad].replace(b"images", b'"images'),
        "blank": lambda: draw(one([b"\r\n", b"\n", b"\n\n\n"])) + lines[bad],
        "bytes": lambda: lines[bad].replace(b",n", b"," + draw(one(NOT_UTF8))),
    }
    form = draw(one([*forms, "mark", "endings"]))
    if form in forms:
        lines[bad] = forms[form]()
    elif form == "mark":
        header = b"\xef\xbb\xbf" + header
    else:
        header, *lines = (line.replace(b"\r\n", b"\n") for line in (header, *lines))
        lines[-1] = lines[-1].rstrip()
    touched = [table.bad] if form in ("fields", "quote", "bytes") else []
    return table.judge(header, lines, *touched, may_fail=form == "quote")


def check_no_table(draw: Draw, folder: pathlib.Path) -> str:
    """A table without its columns or without rows is an error."""
    table = _Table(draw, folder)
    header, lines = draw(one([b"", b"\n", b" \n\n", table.header])), []
    if table.kind != "jsonl" and draw(st.booleans()):
        odd = [b"", b"\n", b"a,b,c\n", b"image|caption|id\n", b"\xff\xfe\n", b'"image\n', b"\0\n"]
        header, lines = draw(one(odd)), table.lines()
    return table.judge(header, lines, *table.values, must_fail=True)
