"""Sources of the evaluation alone: CLIP_benchmark's folders, files of annotations."""

from __future__ import annotations

import io
import json
import pathlib
import struct
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from tests.fuzz import damage
from tests.fuzz.damage import DEEP_JSON, NOT_UTF8, ODD, Draw, noise, words
from tests.fuzz.judge import judge_source
from tests.fuzz.kinds.tars import BLOCK, END, member

_NOTES = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class _Folder:
    """A data set of CLIP_benchmark in two tars, with what must come out of it."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        self.root = folder
        self.type = draw(one(list(_NOTES)))
        (folder / "test").mkdir()
        self.files = {"test/nshards.txt": b"2\n", "classnames.txt": b"ant\nhot dog\nbee\n"}
        self.files["zeroshot_classification_templates.txt"] = b"a {c}.\nthe {c}.\n"
        if self.type != "classification":
            self.files["dataset_type.txt"] = self.type.encode()
        self.notes: dict[str, bytes] = {}
        self.values: dict[str, Any] = {}
        for key in [f"s/{number}" for number in range(draw(integers(4, 7)))]:
            label, flags = draw(integers(0, 2)), draw(st.tuples(*[integers(0, 1)] * 3))
            captions = [f"{draw(words(3))} {i}" for i in range(draw(integers(1, 3)))]
            self.notes[key], value = {
                "classification": (b"%d" % label, label),
                "multilabel": (_npy(np.array(flags)), [i for i, f in enumerate(flags) if f]),
                "retrieval": ("\n".join(captions).encode(), captions),
            }[self.type]
            self.values[key] = draw(noise(500, 1)), value
        self.fill_tars()

    def fill_tars(self) -> None:
        """Puts the pairs into the two archives."""
        blobs = [
            member(f"{key}.png", image) + member(f"{key}.{_NOTES[self.type]}", self.notes[key])
            for key, (image, _) in self.values.items()
        ]
        half = len(blobs) // 2
        self.files["test/0.tar"] = b"".join(blobs[:half]) + END
        self.files["test/1.tar"] = b"".join(blobs[half:]) + END

    def _value(self, pair: Any) -> Any:
        if self.type == "retrieval":
            return pair.image, pair.metadata.get("captions", [pair.caption])
        return pair.image, pair.metadata["label" if self.type == "classification" else "labels"]

    def judge(self, *touched: str, **verdict: bool) -> str:
        """Writes the files and reads them."""
        for name, data in self.files.items():
            (self.root / name).write_bytes(data)
        source = f"clip_benchmark:{self.root}"
        verdict |= {"may_rename": bool(touched)}
        return judge_source(source, self.root, self._value, self.values, *touched, **verdict)


def check_bad_note(draw: Draw, folder: pathlib.Path) -> str:
    """An invalid label costs its own picture, counted."""
    data = _Folder(draw, folder)
    key = draw(one(list(data.values)))
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1152921504606846976,)}\n"
    giant = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    odd_arrays = [np.array([{}, 1], object), np.array("x"), np.zeros((2, 2)), [0.5, 1], [7, 8, 9]]
    odd_arrays.append(np.zeros(2, [("a", "i4")]))
    changed = draw(damage.flipped(_npy([0, 1, 1])) | damage.cut(_npy([0, 1, 1])))
    notes = {
        "classification": [b"", b"first", b"1.5", b"9" * 5000, b"\xff", b"1 2", b"\0"],
        "multilabel": [b"", giant, b"\x93NUMPY", changed, *map(_npy, odd_arrays)],
        "retrieval": [b"", b"\n \n", *NOT_UTF8],
    }
    data.notes[key] = draw(one(notes[data.type]))
    data.fill_tars()
    return data.judge(key, may_fail=False)


def check_bad_files(draw: Draw, folder: pathlib.Path) -> str:
    """Invalid counts, types, names and templates; tars that are missing or end early."""
    data = _Folder(draw, folder)
    must = ["test/nshards.txt", "dataset_type.txt", "test/0.tar", "test/1.tar"]
    name = draw(one([*must, "classnames.txt", "zeroshot_classification_templates.txt"]))
    texts = [b"", b"\n\n", b"0", b"-1", b"3", b"9" * 30, b"9" * 5000, b"two", b"1.0", b"a {}{c}"]
    texts += [*NOT_UTF8, "²".encode(), "٣".encode(), b"\0", b"x" * 10_000, b"ant\n\nbee"]
    if not name.endswith(".tar"):
        data.files[name] = draw(one(texts))
    elif draw(st.booleans()):
        data.files[name] = draw(damage.cut(data.files[name][:-BLOCK]))
    else:
        del data.files[name]
    return data.judge(must_fail=name in must)


class _Annotations:
    """A file of rows on images, several rows on each."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        self.is_lines = draw(st.booleans())
        self.path = folder / ("rows.jsonl" if self.is_lines else "rows.json")
        self.rows: list[Any] = []
        self.values = {}
        for name in [f"{number}.png" for number in range(draw(integers(3, 6)))]:
            image = draw(noise(300, 1))
            (folder / name).write_bytes(image)
            captions = [f"{draw(words(4))} {i}" for i in range(draw(integers(1, 2)))]
            self.rows += [{"image": name, "caption": text} for text in captions]
            self.values[name] = (image, captions)

    def contents(self) -> bytes:
        """The rows as they stand in the file."""
        texts = [json.dumps(row, ensure_ascii=False) for row in self.rows]
        text = "\n".join(texts) if self.is_lines else f"[{', '.join(texts)}]"
        return text.encode("utf-8", "surrogatepass")

    def judge(self, data: bytes, *touched: str, **verdict: bool) -> str:
        """All images that were not touched, or an error that names the file."""
        self.path.write_bytes(data)
        value_of = lambda p: (p.image, p.metadata.get("captions", [p.caption]))  # noqa: E731
        verdict |= {"may_rename": bool(touched)}
        source = f"annotations:{self.path}"
        return judge_source(source, self.path, value_of, self.values, *touched, **verdict)


def check_rows(draw: Draw, folder: pathlib.Path) -> str:
    """A row that is no object, or whose image or caption is another thing, costs its image."""
    data = _Annotations(draw, folder)
    bad = draw(integers(0, len(data.rows) - 1))
    touched = data.rows[bad]["image"]
    odd = [3, None, [], "x", {}, {"caption": "x"}]
    odd += [{**data.rows[bad], field: value} for field in ("image", "caption") for value in ODD]
    data.rows[bad] = draw(one(odd))
    return data.judge(data.contents(), touched)


def check_damaged_rows(draw: Draw, folder: pathlib.Path) -> str:
    """A file that is no list of rows; a jsonl that ends on a whole row is a shorter one."""
    data = _Annotations(draw, folder)
    contents = data.contents()
    odd = [DEEP_JSON, b"", b"{}", b"3", b"\xff" + contents, contents + b"]x", b"[" + contents]
    changed = draw(damage.cut(contents) | one([*odd, b'[{"image": ' + b"1" * 5000 + b"}]"]))
    touched = list(data.values)
    if data.is_lines and contents.startswith(changed):
        rows = sum(1 for line in changed.split(b"\n") if line)
        data.values, touched = {}, list({row["image"]: 1 for row in data.rows[:rows]})
    return data.judge(changed, *touched, must_fail=not data.is_lines)
