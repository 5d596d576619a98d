"""What the evaluation reads beside the training sources: CLIP_benchmark's folders, annotations.

Also the state that `diht_jax.embed` leaves in its output, with which it goes on.
"""

from __future__ import annotations

import io
import json
import pathlib
import struct
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.data.records.schema import Pair
from diht_jax.evaluation.embedding import files
from diht_jax.evaluation.sources.registry import check_source, read_source
from tests.fuzz.damage import (
    DEEP_JSON,
    NO_OBJECT,
    NOT_UTF8,
    Draw,
    cut,
    damaged,
    flipped,
    noise,
    words,
)
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, judge_read, require
from tests.fuzz.kinds.tar_archives import BLOCK, END, member

_NOTES = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _reader(source: str, value_of: Callable[[Pair], Any]) -> Callable[[], Any]:
    """Reads a source: (key, value) of every pair, and the counts of what was skipped."""

    def read() -> Any:
        check_source(source, {})
        found, skipped = [], {}
        for entry in read_source(source, {}):
            if isinstance(entry, Pair):
                found.append((entry.key, value_of(entry)))
            else:
                skipped[entry.reason] = skipped.get(entry.reason, 0) + 1
        return found, skipped

    return read


class _Folder:
    """A data set of CLIP_benchmark in two tars, with what must come out of it."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        self.root = folder / "set"
        self.type = draw(one(list(_NOTES)))
        (self.root / "test").mkdir(parents=True)
        self.entries: dict[str, tuple[bytes, bytes]] = {}  # key -> image, note
        self.values: dict[str, Any] = {}
        for number in range(draw(integers(4, 7))):
            key, image = f"s/{number}", draw(noise(500, 1))
            note, value = self._note(draw)
            self.entries[key] = image, note
            self.values[key] = image, value
        self.files = {"test/nshards.txt": b"2\n", "classnames.txt": b"ant\nhot dog\nbee\n"}
        self.files["zeroshot_classification_templates.txt"] = b"a {c}.\nthe {c}.\n"
        if self.type != "classification":
            self.files["dataset_type.txt"] = self.type.encode()
        self.order = [*list(self.entries)[::2], *list(self.entries)[1::2]]
        self.write_tars()

    def _note(self, draw: Draw) -> tuple[bytes, Any]:
        label, flags = draw(integers(0, 2)), draw(st.lists(integers(0, 1), min_size=3, max_size=3))
        captions = [f"{draw(words(3))} {i}" for i in range(draw(integers(1, 3)))]
        return {
            "classification": (b"%d" % label, label),
            "multilabel": (_npy(np.array(flags)), [i for i, f in enumerate(flags) if f]),
            "retrieval": ("\n".join(captions).encode(), captions),
        }[self.type]

    def blob(self, key: str) -> bytes:
        """The members of one pair."""
        image, note = self.entries[key]
        return member(f"{key}.png", image) + member(f"{key}.{_NOTES[self.type]}", note)

    def write_tars(self) -> None:
        """Puts every second pair into each of the two archives."""
        for shard in (0, 1):
            blobs = [self.blob(key) for key in list(self.entries)[shard::2]]
            self.files[f"test/{shard}.tar"] = b"".join(blobs) + END

    def _value(self, pair: Pair) -> Any:
        if self.type == "retrieval":
            return pair.image, pair.metadata.get("captions", [pair.caption])
        return pair.image, pair.metadata["label" if self.type == "classification" else "labels"]

    def judge(self, *touched: str, **verdict: bool) -> str:
        """All good pairs, or an error that names a file of the folder."""
        for name, data in self.files.items():
            (self.root / name).write_bytes(data)
        intact = {key: self.values[key] for key in self.order if key not in touched}
        read = _reader(f"clip_benchmark:{self.root}", self._value)
        return judge_read(read, self.root, intact, touched, may_rename=bool(touched), **verdict)


def check_bad_note(draw: Draw, folder: pathlib.Path) -> str:
    """A label that is none costs its own picture, counted."""
    data = _Folder(draw, folder)
    key = draw(one(list(data.entries)))
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1152921504606846976,)}\n"
    giant = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    odd_arrays = [np.array([{}, 1], object), np.array("x"), np.zeros((2, 2)), [0.5, 1], [7, 8, 9]]
    odd_arrays.append(np.zeros(2, [("a", "i4")]))
    damaged_array = draw(flipped(_npy([0, 1, 1])) | cut(_npy([0, 1, 1])))
    notes = {
        "classification": [b"", b"first", b"1.5", b"9" * 5000, b"\xff", b"1 2", b"\0"],
        "multilabel": [b"", giant, b"\x93NUMPY", damaged_array, *map(_npy, odd_arrays)],
        "retrieval": [b"", b"\n \n", *NOT_UTF8],
    }
    data.entries[key] = data.entries[key][0], draw(one(notes[data.type]))
    data.write_tars()
    return data.judge(key, may_fail=False)


def check_bad_tar(draw: Draw, folder: pathlib.Path) -> str:
    """Archives that are cut off, or have a damaged header or a hole, are errors."""
    data = _Folder(draw, folder)
    shard, form = draw(integers(0, 1)), draw(integers(0, 3))
    name, first = f"test/{shard}.tar", list(data.entries)[shard]
    contents = data.files[name].removesuffix(END)
    if form == 0:
        data.files[name] = draw(cut(contents))
    elif form == 1:
        starts = range(0, len(contents), BLOCK)
        headers = [s for s in starts if contents[s + 257 : s + 262] == b"ustar"]
        changed = bytearray(contents)
        changed[draw(one(headers))] ^= 1
        data.files[name] = bytes(changed) + END
    elif form == 2:  # where the second pair begins
        size = len(data.blob(first))
        data.files[name] = contents[:size] + bytes(BLOCK) + contents[size + BLOCK :] + END
    else:
        odd = [
            member("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            member("a.png", size=2**40),
            member("readme"),
            member(f"{first}.png", b"again") + member(f"{first}.cls", b"1"),
            member("x.cfg", b"other"),
        ]
        data.files[name] = draw(one(odd)) + contents + END
        return data.judge(first)
    return data.judge(must_fail=True)


def check_bad_files(draw: Draw, folder: pathlib.Path) -> str:
    """Counts, types, class names and templates that are none; a tar that is missing."""
    data = _Folder(draw, folder)
    must = ["test/nshards.txt", "dataset_type.txt"]
    name = draw(one([*must, "classnames.txt", "zeroshot_classification_templates.txt"]))
    texts = [b"", b"\n\n", b"0", b"-1", b"3", b"9" * 30, b"9" * 5000, b"two", b"1.0", b"a {}{c}"]
    texts += [*NOT_UTF8, "²".encode(), "٣".encode(), b"\0", b"x" * 10_000, b"ant\n\nbee"]
    data.files[name] = draw(one(texts))
    is_missing = draw(integers(0, 9)) == 9
    if is_missing:
        del data.files[f"test/{draw(integers(0, 1))}.tar"]
    return data.judge(must_fail=is_missing or name in must)


class _Annotations:
    """A file of rows on images, several rows on each."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        self.is_lines = draw(st.booleans())
        self.path = folder / ("rows.jsonl" if self.is_lines else "rows.json")
        self.rows: list[Any] = []
        self.values = {}
        for number in range(draw(integers(3, 6))):
            name, image = f"{number}.png", draw(noise(300, 1))
            (folder / name).write_bytes(image)
            captions = [f"{draw(words(4))} {i}" for i in range(draw(integers(1, 2)))]
            self.rows += [{"image": name, "caption": text} for text in captions]
            self.values[name] = (image, captions)
        self.bad = draw(integers(0, len(self.rows) - 1))

    def contents(self) -> bytes:
        """The rows as they stand in the file."""
        texts = [json.dumps(row, ensure_ascii=False) for row in self.rows]
        text = "\n".join(texts) if self.is_lines else f"[{', '.join(texts)}]"
        return text.encode("utf-8", "surrogatepass")

    def judge(self, data: bytes, *touched: str, **verdict: bool) -> str:
        """All images that were not touched, or an error that names the file."""
        self.path.write_bytes(data)
        read = _reader(
            f"annotations:{self.path}",
            lambda pair: (pair.image, pair.metadata.get("captions", [pair.caption])),
        )
        intact = {name: value for name, value in self.values.items() if name not in touched}
        return judge_read(read, self.path, intact, touched, may_rename=True, **verdict)


def check_bad_rows(draw: Draw, folder: pathlib.Path) -> str:
    """A row that is no object, or whose image or caption is another thing."""
    data = _Annotations(draw, folder)
    row = data.rows[data.bad]
    odd = [None, 3, 1.5, [], {}, ["a", None], "", "\ud800", "../x.png", "/etc/hostname", "a\0b"]
    odd += ["x" * 5000, True, "missing.png", "line\u2028break", "\x1c"]
    odd_rows = [3, None, [], "x", {}, {"caption": "x"}]
    odd_rows += [{**row, field: value} for field in ("image", "caption") for value in odd]
    data.rows[data.bad] = draw(one(odd_rows))
    return data.judge(data.contents(), row["image"])


def check_damaged_rows(draw: Draw, folder: pathlib.Path) -> str:
    """A file that is no list of rows; a jsonl that ends on a whole row is a shorter one."""
    data = _Annotations(draw, folder)
    contents = data.contents()
    odd = [DEEP_JSON, b"", b"{}", b"3", b"\xff" + contents, contents + b"]x", b"[" + contents]
    odd.append(b'[{"image": ' + b"1" * 5000 + b"}]")
    changed = draw(cut(contents) | one(odd))
    if data.is_lines and contents.startswith(changed):
        rows = sum(1 for line in changed.split(b"\n") if line)
        data.values = {}
        return data.judge(changed, *{row["image"]: 1 for row in data.rows[:rows]})
    return data.judge(changed, *data.values, must_fail=not data.is_lines)


def check_odd_but_good_rows(draw: Draw, folder: pathlib.Path) -> str:
    """Marks at the beginning, odd line breaks in texts, more fields: all of it is good."""
    data = _Annotations(draw, folder)
    for row in data.rows:
        row["more"] = draw(one(["a\u2028b", "\x85", "\x1c\x0b", {"deep": [1]}, None]))
    contents = draw(one([b"", b"\xef\xbb\xbf"])) + data.contents()
    if data.is_lines and draw(st.booleans()):
        contents = contents.replace(b"\n", b"\r\n\n")
    return data.judge(contents, may_fail=False)


def check_winoground(draw: Draw, folder: pathlib.Path) -> str:
    """A field of a row that is no path, no text or no key costs its own image."""
    (folder / "images").mkdir()
    rows = []
    for number in range(3):
        row: dict[str, Any] = {"id": number}
        for side in (0, 1):
            row |= {f"image_{side}": f"{number}_{side}", f"caption_{side}": draw(words(3))}
            (folder / "images" / f"{number}_{side}.png").write_bytes(b"%d%d" % (number, side))
        rows.append(row)
    bad = rows[draw(integers(0, 2))]
    field = draw(one(["image_0", "image_1", "caption_0", "caption_1", "id"]))
    touched = [f"{bad['id']}_{field[-1]}"] if field.startswith("image") else []
    bad[field] = draw(one([None, 3, [], "\ud800", "../../x", "/etc/hostname", "none", "\0"]))
    path = folder / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    intact = {f"{n}_{s}": b"%d%d" % (n, s) for n in range(3) for s in (0, 1)}
    intact = {key: value for key, value in intact.items() if key not in touched}
    read = _reader(f"winoground:{path}", lambda pair: pair.image)
    return judge_read(read, path, intact, touched, may_fail=not isinstance(bad[field], str))


def check_state_of_an_embedding_run(draw: Draw, folder: pathlib.Path) -> str:
    """`embeddings.json` and the parts' statistics, with which an embedding run goes on."""
    settings = {"model_sha256": "0" * 64, "format": "npz", "shard_size": 9, "source": []}
    files.claim(folder, settings)
    files.claim(folder, settings)  # the same again is fine
    path = folder / files.SETTINGS_FILE
    changed = draw(damaged(path.read_bytes()) | one([*NO_OBJECT, b"{}"]))
    path.write_bytes(changed)
    result = attempt(lambda: files.claim(folder, settings), folder)
    same = isinstance(result, Refused) or json.loads(changed) == settings
    require(same, "other settings were taken for the same")
    part = folder / "embeddings-00000-00000.json"
    stats = {"file": "a.npz", "pairs": 3, "entries": 4, "dropped": {}, "is_last": True}
    part.write_bytes(draw(damaged(json.dumps(stats).encode()) | one([*NO_OBJECT, b"{}"])))
    found = attempt(lambda: files.read_stats(part), part)
    if isinstance(found, Refused):
        return ERROR
    require(found.keys() >= stats.keys(), f"statistics of a part: {found}")
    return SUCCESS
