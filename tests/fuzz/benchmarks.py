"""What the evaluation reads beside the training sources: CLIP_benchmark's folders, annotations.

Also the state that `diht_jax.embed` leaves in its output, with which it goes on.
"""

from __future__ import annotations

import io
import json
import pathlib
import struct
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from diht_jax.data.records.schema import Pair
from diht_jax.evaluation.embedding import files
from diht_jax.evaluation.sources.registry import check_source, read_source
from tests.fuzz.cases import (
    DEEP_JSON,
    ERROR,
    NOT_UTF8,
    SUCCESS,
    Draw,
    Refused,
    attempt,
    judge_entries,
    require,
)
from tests.fuzz.tar_archives import END, member

_NOTES = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class BenchmarkFolder:
    """A data set of two tars, with what must come out of it."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        self.root = folder / "set"
        self.type = draw.choice(list(_NOTES))
        (self.root / "test").mkdir(parents=True)
        self.entries: dict[str, tuple[bytes, bytes]] = {}  # key -> image, note
        self.values: dict[str, Any] = {}
        for number in range(draw.randint(4, 7)):
            key, image = f"s/{number}", draw.randbytes(draw.randint(1, 500))
            label = draw.randint(0, 2)
            flags = [draw.randint(0, 1) for _ in range(3)]
            captions = [f"{draw.text(3)} {i}" for i in range(draw.randint(1, 3))]
            note, value = {
                "classification": (b"%d" % label, label),
                "multilabel": (_npy(np.array(flags)), [i for i, f in enumerate(flags) if f]),
                "retrieval": ("\n".join(captions).encode(), captions),
            }[self.type]
            self.entries[key] = image, note
            self.values[key] = image, value
        self.files = {"test/nshards.txt": b"2\n", "classnames.txt": b"ant\nhot dog\nbee\n"}
        self.files["zeroshot_classification_templates.txt"] = b"a {c}.\nthe {c}.\n"
        if self.type != "classification":
            self.files["dataset_type.txt"] = self.type.encode()
        self.tars: dict[str, bytes] = {}
        for shard in (0, 1):
            blobs = [self.blob(key) for key in list(self.entries)[shard::2]]
            self.tars[f"test/{shard}.tar"] = b"".join(blobs) + END
        self.order = [*list(self.entries)[::2], *list(self.entries)[1::2]]

    def blob(self, key: str) -> bytes:
        """The members of one pair."""
        image, note = self.entries[key]
        return member(f"{key}.png", image) + member(f"{key}.{_NOTES[self.type]}", note)

    def read(self) -> Any:
        """Pairs as (key, value) and skipped counts; or `Refused`."""
        for name, data in (self.files | self.tars).items():
            (self.root / name).write_bytes(data)
        source = f"clip_benchmark:{self.root}"

        def read_all():
            check_source(source, {})
            return _collect(read_source(source, {}), self._value)

        return attempt(read_all, self.root)

    def _value(self, pair: Pair) -> Any:
        if self.type == "retrieval":
            return pair.image, pair.metadata.get("captions", [pair.caption])
        return pair.image, pair.metadata["label" if self.type == "classification" else "labels"]

    def judge(self, *touched: str, may_fail: bool = True) -> str:
        """All good pairs, or an error that names a file of the folder."""
        result = self.read()
        if isinstance(result, Refused):
            require(may_fail, f"refused: {result.message}")
            return ERROR
        intact = {key: self.values[key] for key in self.order if key not in touched}
        return judge_entries(*result, intact, touched, may_rename=bool(touched))


def _collect(entries: Iterator[Any], value_of: Any) -> tuple[list, dict[str, int]]:
    found, skipped = [], {}
    for entry in entries:
        if isinstance(entry, Pair):
            found.append((entry.key, value_of(entry)))
        else:
            skipped[entry.reason] = skipped.get(entry.reason, 0) + 1
    return found, skipped


def _bad_note(draw: Draw, folder: pathlib.Path) -> str:
    """A label that is none costs its own picture, counted."""
    data = BenchmarkFolder(draw, folder)
    key = draw.choice(list(data.entries))
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1152921504606846976,)}\n"
    giant = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    notes = {
        "classification": [b"", b"first", b"1.5", b"9" * 5000, b"\xff", b"1 2", b"\0"],
        "multilabel": [b"", draw.flip(_npy([0, 1, 1])), draw.cut(_npy([0, 1, 1])), giant]
        + [_npy(np.array([{}, 1], object)), _npy(np.array("x")), _npy(np.zeros((2, 2)))]
        + [_npy([0.5, 1]), _npy([7, 8, 9]), b"\x93NUMPY", _npy(np.zeros(2, [("a", "i4")]))],
        "retrieval": [b"", b"\n \n", *NOT_UTF8],
    }
    image, note = data.entries[key]
    data.entries[key] = image, draw.choice(notes[data.type])
    for name in data.tars:
        data.tars[name] = data.tars[name].replace(
            member(f"{key}.{_NOTES[data.type]}", note),
            member(f"{key}.{_NOTES[data.type]}", data.entries[key][1]),
        )
    return data.judge(key, may_fail=False)


def _bad_tar(draw: Draw, folder: pathlib.Path) -> str:
    data = BenchmarkFolder(draw, folder)
    name = draw.choice(list(data.tars))
    place = int(name[5])
    form = draw.randrange(4)
    contents = data.tars[name].removesuffix(END)
    if form == 0:  # cut off
        data.tars[name] = contents[: draw.randrange(len(contents))]
        return _require_error(data)
    if form == 1:  # damaged header
        start = draw.randrange(len(contents) // 512) * 512
        while contents[start + 257 : start + 262] != b"ustar":
            start = draw.randrange(len(contents) // 512) * 512
        damaged = bytearray(contents)
        damaged[start] ^= 1
        data.tars[name] = bytes(damaged) + END
        return _require_error(data)
    if form == 2:  # a hole of zeros where the second pair begins
        first = data.blob(data.order[0] if place == 0 else list(data.entries)[1])
        data.tars[name] = first + bytes(512) + contents[len(first) + 512 :] + END
        return _require_error(data)
    first = list(data.entries)[place]
    odd = [
        member("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("a.png", size=2**40),
        member("readme"),
        member(f"{first}.png", b"again") + member(f"{first}.cls", b"1"),
        member("x.cfg", b"other"),
    ]
    data.tars[name] = draw.choice(odd) + contents + END
    return data.judge(first)


def _require_error(data: BenchmarkFolder) -> str:
    outcome = data.judge()
    require(outcome == ERROR, "a damaged archive was read as a shorter one")
    return outcome


def _bad_files(draw: Draw, folder: pathlib.Path) -> str:
    """Counts, types, class names and templates that are none."""
    data = BenchmarkFolder(draw, folder)
    name = draw.choice(
        ["test/nshards.txt", "classnames.txt", "dataset_type.txt"]
        + ["zeroshot_classification_templates.txt"]
    )
    texts = [b"", b"\n\n", b"0", b"-1", b"3", b"9" * 30, b"9" * 5000, b"two", b"1.0", b"a {}{c}"]
    texts += [*NOT_UTF8, "²".encode(), "٣".encode(), b"\0", b"x" * 10_000, b"ant\n\nbee"]
    data.files[name] = draw.choice(texts)
    if draw.random() < 0.1:
        data.files[name] = b""
        del data.tars[draw.choice(list(data.tars))]
    outcome = data.judge()
    if name in ("test/nshards.txt", "dataset_type.txt"):
        require(outcome == ERROR, f"{name} = {data.files[name]!r:.80}")
    return outcome


class Annotations:
    """A file of rows on images, several rows on each."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        self.folder = folder
        self.is_lines = draw.random() < 0.5
        self.path = folder / ("rows.jsonl" if self.is_lines else "rows.json")
        self.rows = []
        self.values = {}
        for number in range(draw.randint(2, 5)):
            name = f"{number}.png"
            image = draw.randbytes(draw.randint(1, 99))
            (folder / name).write_bytes(image)
            captions = [f"{draw.text(3)} {i}" for i in range(draw.randint(1, 3))]
            self.rows += [{"image": name, "caption": caption, "n": 1} for caption in captions]
            self.values[name] = image, captions

    def write(self, rows: list[Any] | None = None) -> bytes:
        """The file's contents."""
        texts = [json.dumps(row, ensure_ascii=False) for row in rows or self.rows]
        text = "\n".join(texts) if self.is_lines else f"[{', '.join(texts)}]"
        return text.encode("utf-8", "surrogatepass")

    def judge(self, data: bytes, *touched: str, may_fail: bool = True) -> str:
        """All images that were not touched, or an error that names the file."""
        self.path.write_bytes(data)
        source = f"annotations:{self.path}"

        def read_all():
            return _collect(
                read_source(source, {}),
                lambda pair: (pair.image, pair.metadata.get("captions", [pair.caption])),
            )

        result = attempt(read_all, self.path)
        if isinstance(result, Refused):
            require(may_fail, f"refused: {result.message}")
            return ERROR
        intact = {name: value for name, value in self.values.items() if name not in touched}
        return judge_entries(*result, intact, touched, may_rename=True)


def _bad_rows(draw: Draw, folder: pathlib.Path) -> str:
    data = Annotations(draw, folder)
    place = draw.randrange(len(data.rows))
    name = data.rows[place]["image"]
    form = draw.randrange(3)
    rows: list[Any] = list(data.rows)
    if form == 0:
        rows[place] = draw.choice([3, None, [], "x", {}, {"caption": "x"}])
        return data.judge(data.write(rows), name)
    field = draw.choice(["image", "caption"])
    values = [None, 3, 1.5, [], {}, ["a", None], "", "\ud800", "../x.png", "/etc/hostname", "a\0b"]
    values += ["x" * 5000, True, "missing.png", "line\u2028break", "\x1c"]
    rows[place] = {**rows[place], field: draw.choice(values)}
    return data.judge(data.write(rows), name)


def _damaged_rows(draw: Draw, folder: pathlib.Path) -> str:
    data = Annotations(draw, folder)
    contents = data.write()
    damaged = draw.choice(
        [draw.cut(contents), DEEP_JSON, b"", b"{}", b"3", b"\xff" + contents, contents + b"]x"]
        + [b'[{"image": ' + b"1" * 5000 + b"}]", b"[" + contents]
    )
    if not damaged or (data.is_lines and contents.startswith(damaged)):
        # A jsonl that ends early, on a whole row or on none, is a shorter one.
        rows = sum(1 for line in damaged.split(b"\n") if line)
        data.values = {}
        outcome = data.judge(damaged, *(row["image"] for row in data.rows[:rows]))
        require(outcome == ERROR or data.is_lines, "an empty file is no list")
        return outcome
    outcome = data.judge(damaged, *data.values)
    require(outcome == ERROR or data.is_lines, "this is no list of rows")
    return outcome


def _odd_but_good_rows(draw: Draw, folder: pathlib.Path) -> str:
    """Marks at the beginning, odd line breaks in texts, more fields: all of it is good."""
    data = Annotations(draw, folder)
    for row in data.rows:
        row["more"] = draw.choice(["a\u2028b", "\x85", "\x1c\x0b", {"deep": [1]}, None])
    contents = data.write()
    if draw.random() < 0.5:
        contents = b"\xef\xbb\xbf" + contents
    if data.is_lines and draw.random() < 0.5:
        contents = contents.replace(b"\n", b"\r\n\n")
    return data.judge(contents, may_fail=False)


def _winoground(draw: Draw, folder: pathlib.Path) -> str:
    (folder / "images").mkdir()
    rows = []
    for number in range(3):
        row: dict[str, Any] = {"id": number}
        for side in (0, 1):
            row |= {f"image_{side}": f"{number}_{side}", f"caption_{side}": draw.text(3)}
            (folder / "images" / f"{number}_{side}.png").write_bytes(b"%d%d" % (number, side))
        rows.append(row)
    bad = rows[draw.randrange(3)]
    field = draw.choice(["image_0", "image_1", "caption_0", "caption_1", "id"])
    bad[field] = draw.choice([None, 3, [], "\ud800", "../../x", "/etc/hostname", "none", "\0"])
    path = folder / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = f"winoground:{path}"
    result = attempt(lambda: _collect(read_source(source, {}), lambda p: p.image), path)
    if isinstance(result, Refused):
        require(not isinstance(bad[field], str), f"refused: {result.message}")
        return ERROR
    touched = [f"{bad['id']}_{field[-1]}"] if field.startswith("image") else []
    intact = {f"{n}_{s}": b"%d%d" % (n, s) for n in range(3) for s in (0, 1)}
    return judge_entries(*result, {k: v for k, v in intact.items() if k not in touched}, touched)


def _embedding_state(draw: Draw, folder: pathlib.Path) -> str:
    """`embeddings.json` and the parts' statistics, with which an embedding run goes on."""
    settings = {"model_sha256": "0" * 64, "format": "npz", "shard_size": 9, "source": []}
    files.claim(folder, settings)
    files.claim(folder, settings)  # the same again is fine
    path = folder / files.SETTINGS_FILE
    contents = path.read_bytes()
    choices = [draw.damage(contents), DEEP_JSON, b"[]", b"3", b"null", *NOT_UTF8, b"{}"]
    damaged = draw.choice(choices)
    path.write_bytes(damaged)
    result = attempt(lambda: files.claim(folder, settings), folder)
    require(
        isinstance(result, Refused) or json.loads(damaged) == settings,
        "other settings were taken for the same",
    )
    part = folder / "embeddings-00000-00000.json"
    stats = {"file": "a.npz", "pairs": 3, "entries": 4, "dropped": {}, "is_last": True}
    contents = json.dumps(stats).encode()
    part.write_bytes(draw.choice([draw.damage(contents), DEEP_JSON, b"[]", b"{}", b"null"]))
    found = attempt(lambda: files.read_stats(part), part)
    if not isinstance(found, Refused):
        require(found.keys() >= stats.keys(), f"statistics of a part: {found}")
        return SUCCESS
    return ERROR


MUTATIONS = {
    "bad note": _bad_note,
    "bad tar": _bad_tar,
    "bad files": _bad_files,
    "bad rows": _bad_rows,
    "damaged rows": _damaged_rows,
    "odd but good rows": _odd_but_good_rows,
    "winoground": _winoground,
    "state of an embedding run": _embedding_state,
}
