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

from diht_jax.readers import registry
from tests.fuzz.damage import NO_OBJECT, NOT_UTF8, ODD, Draw, damaged, flipped, noise, words
from tests.fuzz.judge import ERROR, Refused, attempt, judge_entries, judge_read, require

# Paths in a table that lead to no picture of the folder.
_BAD_PATHS = ["", " ", "missing.png", "../outside.png", "/etc/hostname", "images", "images/.."]
_BAD_PATHS += ["link.png", "pipe.png", "nul\0.png", "images/" + "x" * 300, "x/" * 3000, "~/a.png"]
_BAD_PATHS += ["http://host/a.png", "lone\ud800.png", "images/0.png/0.png", "images/\n.png"]
_BAD_LINES = [line for line in NO_OBJECT if line]
_BAD_LINES += [b"{}", b"\0", b"\xef\xbb\xbf", b'{"n": ' + b"9" * 5000 + b"}"]
_BAD_LINES += [b'{"image": "images/0.png", "caption": "%s"}' % bad for bad in NOT_UTF8]


class _Table:
    """Rows with their images; the rows' keys stand in a column. One row is to be damaged."""

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

    def lines(self) -> list[bytes]:
        """The rows as they stand in the file, without the header."""
        if self.kind == "jsonl":
            return [json.dumps(row).encode() + b"\n" for row in self.rows]
        return [self._csv(row.values()) for row in self.rows]

    def header(self) -> bytes:
        """The first line of a csv."""
        return b"" if self.kind == "jsonl" else self._csv(self.rows[0])

    def _csv(self, values: Any) -> bytes:
        buffer = io.StringIO()
        csv.writer(buffer, delimiter="\t" if self.kind == "tsv" else ",").writerow(values)
        return buffer.getvalue().encode("utf-8", "surrogatepass")

    def read(self) -> Any:
        """Pairs as (key, value), and counts."""
        options = {"key_column": "id", "rows_per_shard": self.draw(integers(1, 4))}
        source = registry.open_source(str(self.path), **options)
        return [(p.key, (p.image, p.caption)) for p in source], source.skipped

    def judge(self, header: bytes, lines: list[bytes], *touched: str, **verdict: bool) -> str:
        """Writes the file and reads it: all rows but those touched must come."""
        self.path.write_bytes(header + b"".join(lines))
        intact = {key: value for key, value in self.values.items() if key not in touched}
        return judge_read(self.read, self.path, intact, touched, may_rename=True, **verdict)


def check_lines(draw: Draw, folder: pathlib.Path) -> str:
    """One line replaced, or bits in it flipped: no other row may suffer."""
    table = _Table(draw, folder)
    lines = table.lines()
    body = lines[table.index].rstrip(b"\r\n")
    end = lines[table.index][len(body) :]
    is_jsonl = table.kind == "jsonl"
    changed = draw(one(_BAD_LINES) | flipped(body) if is_jsonl else flipped(body))
    marks = b'\r\n",\t\\{}:[]\xef\xbb\xbf'  # these may touch other rows of a csv
    assume(is_jsonl or all(changed.count(mark) == body.count(mark) for mark in marks))
    lines[table.index] = changed.replace(b"\n", b" ") + end
    return table.judge(table.header(), lines, table.bad, may_fail=False)


def check_values(draw: Draw, folder: pathlib.Path) -> str:
    """A cell of another type, or none: no other row may suffer, and a row needs no key."""
    table = _Table(draw, folder, "jsonl")
    row, field = table.rows[table.index], draw(one(["image", "caption", "id", "note"]))
    row[field] = draw(one([*ODD, [["x"]], "x" * 100_000]))
    if draw(integers(0, 3)) == 3:
        del row[field]
    outcome = table.judge(b"", table.lines(), table.bad, may_fail=False)
    if field == "id":
        found, skipped = table.read()
        require(len(found) == len(table.rows) and not skipped, "a row without an own key is lost")
    return outcome


def check_paths(draw: Draw, folder: pathlib.Path) -> str:
    """A path that leads out, or to no picture, is skipped; only a csv may be refused for it."""
    table = _Table(draw, folder)
    path = table.rows[table.index]["image"] = draw(one(_BAD_PATHS))
    may_fail = table.kind != "jsonl"
    outcome = table.judge(table.header(), table.lines(), table.bad, may_fail=may_fail)
    if outcome != ERROR:
        require(table.bad not in dict(table.read()[0]), f"a picture at {path!r:.50}")
    return outcome


def check_damaged_file(draw: Draw, folder: pathlib.Path) -> str:
    """Any damage: rows that lie whole before it, and on lines of their own, must come."""
    table = _Table(draw, folder)
    data = table.header() + b"".join(table.lines())
    changed = draw(damaged(data))
    same = len(os.path.commonprefix([data, changed]))
    intact, position = {}, len(table.header())
    for row, line in zip(table.rows, table.lines(), strict=True):
        position += len(line)
        if position <= same:
            intact[row["id"]] = table.values[row["id"]]
    table.path.write_bytes(changed)
    result = attempt(table.read, table.path)
    if isinstance(result, Refused):
        return ERROR
    # What was cut off or overwritten cannot be counted; the rest is.
    return judge_entries([pair for pair in result[0] if pair[0] in intact], result[1], intact)


def check_forms_of_csv(draw: Draw, folder: pathlib.Path) -> str:
    """Rows with too many or too few fields, blank lines, marks, odd endings: others stay."""
    table = _Table(draw, folder, "csv", "tsv")
    lines, header, bad = table.lines(), table.header(), table.index
    form = draw(integers(0, 6))
    if form == 0:
        delimiter = b"\t" if table.kind == "tsv" else b","
        lines[bad] = delimiter.join([b"a"] * draw(one([1, 3, 5, 1000]))) + b"\r\n"
    elif form == 1:
        lines[bad] = lines[bad].replace(b"images", b'"images')
    elif form == 2:
        lines.insert(bad, draw(one([b"\r\n", b"\n", b"\n\n\n"])))
    elif form == 3:
        header = b"\xef\xbb\xbf" + header
    elif form == 4:
        header, *lines = (line.replace(b"\r\n", b"\n") for line in (header, *lines))
    elif form == 5:
        lines[-1] = lines[-1].rstrip()
    else:
        lines[bad] = lines[bad].replace(b",n", b"," + draw(one(NOT_UTF8)))
    touched = [table.bad] if form < 2 else []
    return table.judge(header, lines, *touched, may_fail=form == 1)


def check_no_table(draw: Draw, folder: pathlib.Path) -> str:
    """A table without its columns, or without rows, is an error."""
    table = _Table(draw, folder)
    header, lines = draw(one([b"", b"\n", b" \n\n", table.header()])), []
    if table.kind != "jsonl" and draw(st.booleans()):
        odd = [b"", b"\n", b"a,b,c\n", b"image;caption;id\n", b"\xff\xfe\n", b'"image\n', b"\0\n"]
        header, lines = draw(one(odd)), table.lines()
    return table.judge(header, lines, *table.values, must_fail=True)


def check_class_folder(draw: Draw, folder: pathlib.Path) -> str:
    """Folders with odd entries beside the pictures."""
    root, values = folder / "classes", {}
    for number in range(draw(integers(1, 3))):
        odd = root / (draw(one(["dog", "ca\u00f1on", "x_y", "a b"])) + str(number))
        odd.mkdir(parents=True)
        for picture in range(draw(integers(1, 3))):
            data = values[f"{odd.name}/{picture}.png"] = draw(noise(300))
            (odd / f"{picture}.png").write_bytes(data)
    os.mkfifo(odd / "pipe.jpg")
    (odd / "lost.png").symlink_to("/nowhere/at/all.png")
    (odd / "folder.png").mkdir()
    (odd / ".hidden.png").write_bytes(b"hidden")
    (odd / "notes.txt").write_bytes(draw(noise(9)))
    (root / "empty").mkdir()
    if draw(st.booleans()):
        (odd / "round").symlink_to(root)  # a folder that holds itself

    def read() -> Any:
        source = registry.open_source(str(root))
        pairs = [(p.key, p.image) for p in source]
        return [pair for pair in pairs if pair[0] in values], source.skipped

    return judge_read(read, root, dict(sorted(values.items())))
