"""Tables beside images (jsonl, csv, tsv) and class folders, through `diht_jax.data.readers`."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from typing import Any

from diht_jax.data.readers import registry
from tests.fuzz.cases import (
    DEEP_JSON,
    ERROR,
    NOT_UTF8,
    Draw,
    Refused,
    attempt,
    judge_entries,
    require,
)

# Paths in a table that lead to no picture of the folder.
_BAD_PATHS = (
    *("", " ", "missing.png", "../outside.png", "/etc/hostname", "images", "images/..", "link.png"),
    *("pipe.png", "nul\0.png", "images/" + "x" * 300, "x/" * 3000, "http://host/a.png"),
    *("lone\ud800.png", "images/0.png/0.png", "~/a.png", "images/\n.png"),
)


class Table:
    """Rows with their images; the rows' keys stand in a column."""

    def __init__(self, draw: Draw, folder: pathlib.Path, kind: str):
        self.path = folder / f"table.{kind}"
        self.kind = kind
        (folder / "images").mkdir()
        (folder.parent / "outside.png").write_bytes(b"outside")
        (folder / "link.png").symlink_to(folder.parent / "outside.png")
        os.mkfifo(folder / "pipe.png")
        self.rows: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {}
        for number in range(draw.randint(3, 8)):
            image = draw.randbytes(draw.randint(1, 500))
            name = f"images/{number}.png"
            (folder / name).write_bytes(image)
            row = {"id": f"row{number}", "image": name, "caption": draw.text(), "note": "n"}
            self.rows.append(row)
            self.values[row["id"]] = (image, row["caption"])

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
        delimiter = "\t" if self.kind == "tsv" else ","
        csv.writer(buffer, delimiter=delimiter).writerow(values)
        return buffer.getvalue().encode("utf-8", "surrogatepass")

    def read(self, draw: Draw) -> Any:
        """Pairs as (key, value), and counts; or `Refused`."""

        def read_all():
            source = registry.open_source(
                str(self.path), key_column="id", rows_per_shard=draw.randint(1, 4)
            )
            return [(p.key, (p.image, p.caption)) for p in source], source.skipped

        return attempt(read_all, self.path)

    def judge(self, draw: Draw, data: bytes, *touched: str, may_fail: bool = True) -> str:
        """Writes the file and reads it."""
        self.path.write_bytes(data)
        result = self.read(draw)
        if isinstance(result, Refused):
            require(may_fail, f"refused as a whole: {result.message}")
            return ERROR
        intact = {key: value for key, value in self.values.items() if key not in touched}
        return judge_entries(*result, intact, touched, may_rename=True)


def _bad_lines(draw: Draw, folder: pathlib.Path) -> str:
    """One line of a jsonl replaced: no other row may suffer."""
    table = Table(draw, folder, "jsonl")
    lines = table.lines()
    place = draw.randrange(len(lines))
    lines[place] = (
        draw.choice(
            [
                b"{",
                b"[]",
                b"3",
                b"null",
                b'"x"',
                DEEP_JSON,
                b'{"image": 3}',
                b"{}",
                b"\0",
                b"\xef\xbb\xbf",
            ]
            + [b'{"image": "images/0.png", "caption": "%s"}' % bad for bad in NOT_UTF8]
            + [b'{"n": ' + b"9" * 5000 + b"}", draw.flip(lines[place][:-1]).replace(b"\n", b" ")]
            + [b'{"image": {"a": 1}, "caption": "x"}', b'{"image": ["images/0.png"], "caption": 1}']
        )
        + b"\n"
    )
    return table.judge(draw, b"".join(lines), f"row{place}", may_fail=False)


def _bad_values(draw: Draw, folder: pathlib.Path) -> str:
    table = Table(draw, folder, "jsonl")
    row = draw.choice(table.rows)
    name = row["id"]
    field = draw.choice(["image", "caption", "id", "note"])
    row[field] = draw.choice(
        [None, 3, 1.5, True, [], {}, [None], "", " ", "\ud800", [["x"]], "x" * 100_000]
    )
    if draw.random() < 0.3:
        del row[field]
    data = b"".join(table.lines())
    if field == "id":
        table.path.write_bytes(data)
        found, skipped = table.read(draw)
        require(len(found) == len(table.rows) and not skipped, "a row without an own key is lost")
        require(len({key for key, _ in found}) == len(found), "two rows with the same key")
        return "success"
    return table.judge(draw, data, name, may_fail=False)


def _bad_paths(draw: Draw, folder: pathlib.Path) -> str:
    table = Table(draw, folder, draw.choice(["jsonl", "csv", "tsv"]))
    row = draw.choice(table.rows)
    row["image"] = draw.choice(_BAD_PATHS)
    outcome = table.judge(draw, table.header() + b"".join(table.lines()), row["id"])
    if outcome != ERROR:
        found, _ = table.read(draw)
        require(row["id"] not in dict(found), f"a picture at {row['image']!r:.50}")
    else:
        require(table.kind != "jsonl", "the whole table was refused")
    return outcome


def _bits_in_a_row(draw: Draw, folder: pathlib.Path) -> str:
    """Flips that make no line break, delimiter or quote touch one row alone."""
    table = Table(draw, folder, draw.choice(["jsonl", "csv", "tsv"]))
    lines = table.lines()
    place = draw.randrange(len(lines))
    end = b"\r\n" if lines[place].endswith(b"\r\n") else b"\n"
    body = lines[place].removesuffix(end)
    marks = b'\r\n",\t\\{}:[]\xef\xbb\xbf'
    changed = draw.flip(body)
    while table.kind != "jsonl" and any(changed.count(m) != body.count(m) for m in marks):
        changed = draw.flip(body)
    lines[place] = changed.replace(b"\n", b" ") + end
    data = table.header() + b"".join(lines)
    return table.judge(draw, data, f"row{place}", may_fail=False)


def _damaged_file(draw: Draw, folder: pathlib.Path) -> str:
    """Any damage: rows that lie whole before it, and on lines of their own, must come."""
    table = Table(draw, folder, draw.choice(["jsonl", "csv", "tsv"]))
    data = table.header() + b"".join(table.lines())
    damaged = draw.damage(data)
    same = 0
    while same < min(len(data), len(damaged)) and data[same] == damaged[same]:
        same += 1
    position, touched = len(table.header()), []
    for row, line in zip(table.rows, table.lines(), strict=True):
        position += len(line)
        if position > same:
            touched.append(row["id"])
    table.path.write_bytes(damaged)
    result = table.read(draw)
    if isinstance(result, Refused):
        return ERROR
    found, skipped = result
    intact = {key: value for key, value in table.values.items() if key not in touched}
    before = [pair for pair in found if pair[0] in intact]
    # What was cut off or overwritten cannot be counted; the rest is.
    return judge_entries(before, skipped, intact)


def _csv_forms(draw: Draw, folder: pathlib.Path) -> str:
    """Rows with too many or too few fields, blank lines, marks, odd endings: others stay."""
    table = Table(draw, folder, draw.choice(["csv", "tsv"]))
    lines, header = table.lines(), table.header()
    place = draw.randrange(len(lines))
    delimiter = b"\t" if table.kind == "tsv" else b","
    form = draw.randrange(7)
    touched = [f"row{place}"]
    if form == 0:
        lines[place] = delimiter.join([b"a"] * draw.choice([1, 3, 5, 1000])) + b"\r\n"
    elif form == 1:
        lines.insert(place, draw.choice([b"\r\n", b"\n", b"\n\n\n"]))
        touched = []
    elif form == 2:
        header, touched = b"\xef\xbb\xbf" + header, []
    elif form == 3:
        end = draw.choice([b"\n", b"\r\n"])
        lines = [line.replace(b"\r\n", end) for line in lines]
        header, touched = header.replace(b"\r\n", end), []
    elif form == 4:
        lines[-1], touched = lines[-1].rstrip(), []
    elif form == 5:
        lines[place] = lines[place].replace(b",n", b"," + draw.choice(NOT_UTF8))
        touched = []
    else:
        lines[place] = lines[place].replace(b"images", b'"images')
    data = header + b"".join(lines)
    return table.judge(draw, data, *touched, may_fail=form == 6)


def _bad_header(draw: Draw, folder: pathlib.Path) -> str:
    table = Table(draw, folder, draw.choice(["csv", "tsv"]))
    headers = [b"", b"\n", b"a,b,c\n", b"image;caption;id\n", b"\xff\xfe\n", b'"image\n', b"\0\n"]
    data = draw.choice(headers) + draw.choice([b"", b"".join(table.lines())])
    outcome = table.judge(draw, data, *table.values)
    require(outcome == ERROR, "a table without its columns")
    return outcome


def _empty(draw: Draw, folder: pathlib.Path) -> str:
    kind = draw.choice(["jsonl", "csv", "tsv"])
    table = Table(draw, folder, kind)
    data = draw.choice([b"", b"\n", b" \n\n", table.header()])
    outcome = table.judge(draw, data, *table.values)
    require(outcome == ERROR, "a table without rows")
    return outcome


def _class_folder(draw: Draw, folder: pathlib.Path) -> str:
    """Folders with odd entries beside the pictures."""
    root = folder / "classes"
    values = {}
    for number in range(draw.randint(1, 3)):
        name = draw.choice(["dog", "ca\u00f1on", "x_y", "a b"]) + str(number)
        (root / name).mkdir(parents=True)
        for picture in range(draw.randint(1, 3)):
            data = draw.randbytes(draw.randint(0, 300))
            (root / name / f"{picture}.png").write_bytes(data)
            values[f"{name}/{picture}.png"] = data
    odd = root / name
    os.mkfifo(odd / "pipe.jpg")
    (odd / "lost.png").symlink_to("/nowhere/at/all.png")
    (odd / "folder.png").mkdir()
    (odd / ".hidden.png").write_bytes(b"hidden")
    (odd / "notes.txt").write_bytes(draw.randbytes(9))
    (root / "empty").mkdir()
    if draw.random() < 0.5:
        (odd / "round").symlink_to(root)  # a folder that holds itself

    def read():
        source = registry.open_source(str(root))
        return [(p.key, p.image) for p in source], source.skipped

    result = attempt(read, root)
    if isinstance(result, Refused):
        return ERROR
    found, skipped = result
    return judge_entries(
        [f for f in found if f[0] in values], skipped, dict(sorted(values.items()))
    )


MUTATIONS = {
    "bad lines": _bad_lines,
    "bad values": _bad_values,
    "bad paths": _bad_paths,
    "bits flipped in a row": _bits_in_a_row,
    "damaged file": _damaged_file,
    "forms of csv": _csv_forms,
    "bad header": _bad_header,
    "no rows": _empty,
    "class folder": _class_folder,
}
