"""What the evaluation reads beside the training sources: CLIP_benchmark's folders, annotations.

Also the state that `diht_jax.embed` leaves in its output, with which it goes on.
"""

from __future__ import annotations

import io
import json
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.evaluation.embedding import files
from diht_jax.evaluation.sources.registry import open_units, read_source
from diht_jax.records.schema import Pair
from tests.fuzz import damage
from tests.fuzz.damage import DEEP_JSON, NO_OBJECT, NOT_UTF8, ODD, Draw, noise, words
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, judge_read, require
from tests.fuzz.kinds.tars import BLOCK, END, member

_NOTES = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _judge(
    source: str,
    name: pathlib.Path,
    value_of: Callable[[Pair], Any],
    values: dict[str, Any],
    *touched: str,
    **verdict: bool,
) -> str:
    """All good pairs, in order, or an error that holds the name."""

    def read() -> Any:
        open_units(source, {})
        found, skipped = [], {}
        for entry in read_source(source, {}):
            if isinstance(entry, Pair):
                found.append((entry.key, value_of(entry)))
            else:
                skipped[entry.reason] = skipped.get(entry.reason, 0) + 1
        return found, skipped

    intact = {key: value for key, value in values.items() if key not in touched}
    return judge_read(read, name, intact, touched, may_rename=bool(touched), **verdict)


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
        keys = list(self.values)
        self.keys_of_tars = {"test/0.tar": keys[: len(keys) // 2]}
        self.keys_of_tars["test/1.tar"] = keys[len(keys) // 2 :]
        self.fill_tars()

    def fill_tars(self) -> None:
        """Puts the pairs into the two archives."""
        for name, keys in self.keys_of_tars.items():
            self.files[name] = b"".join(map(self.blob, keys)) + END

    def blob(self, key: str) -> bytes:
        """The members of one pair."""
        image, note = self.values[key][0], self.notes[key]
        return member(f"{key}.png", image) + member(f"{key}.{_NOTES[self.type]}", note)

    def _value(self, pair: Pair) -> Any:
        if self.type == "retrieval":
            return pair.image, pair.metadata.get("captions", [pair.caption])
        return pair.image, pair.metadata["label" if self.type == "classification" else "labels"]

    def judge(self, *touched: str, **verdict: bool) -> str:
        """Writes the files and reads them."""
        for name, data in self.files.items():
            (self.root / name).write_bytes(data)
        source = f"clip_benchmark:{self.root}"
        return _judge(source, self.root, self._value, self.values, *touched, **verdict)


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
    must = ["test/nshards.txt", "dataset_type.txt", *data.keys_of_tars]
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
        source = f"annotations:{self.path}"
        value_of = lambda p: (p.image, p.metadata.get("captions", [p.caption]))  # noqa: E731
        return _judge(source, self.path, value_of, self.values, *touched, **verdict)


def check_rows(draw: Draw, folder: pathlib.Path) -> str:
    """A row that is no object, or whose image or caption is another thing, costs its image."""
    data = _Annotations(draw, folder)
    bad = draw(integers(0, len(data.rows) - 1))
    touched = data.rows[bad]["image"]
    odd = [3, None, [], "x", {}, {"caption": "x"}]
    odd += [{**data.rows[bad], field: value} for field in ("image", "caption") for value in ODD]
    data.rows[bad] = draw(one(odd))
    return data.judge(data.contents(), touched)


def check_odd_but_good_rows(draw: Draw, folder: pathlib.Path) -> str:
    """Marks at the beginning, odd line breaks in texts, more fields: all of it is good."""
    data = _Annotations(draw, folder)
    for row in data.rows:
        row["more"] = draw(one(["a\u2028b", "\x85", "\x1c\x0b", {"deep": [1]}, None]))
    contents = draw(one([b"", b"\xef\xbb\xbf"])) + data.contents()
    if data.is_lines and draw(st.booleans()):
        contents = contents.replace(b"\n", b"\r\n\n")
    return data.judge(contents, may_fail=False)


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


def check_winoground(draw: Draw, folder: pathlib.Path) -> str:
    """A field of a row that is no path, no text or no key costs its own image."""
    (folder / "images").mkdir()
    sides = [f"{number}_{side}" for number in range(3) for side in (0, 1)]
    for name in sides:
        (folder / "images" / f"{name}.png").write_bytes(name.encode())
    rows: list[dict] = [{"id": number} for number in range(3)]
    for row in rows:
        row |= {f"image_{side}": f"{row['id']}_{side}" for side in (0, 1)}
        row |= {f"caption_{side}": draw(words(3)) for side in (0, 1)}
    bad = draw(integers(0, 2))
    field = draw(one(list(rows[bad])))
    value = rows[bad][field] = draw(one([None, 3, [], "\ud800", "../../x", "none", "\0"]))
    path = folder / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    touched = [f"{bad}_{field[-1]}"] if field.startswith("image") else []
    values = {name: name.encode() for name in sides}
    source, may_fail = f"winoground:{path}", not isinstance(value, str)
    return _judge(source, path, lambda p: p.image, values, *touched, may_fail=may_fail)


def check_state_of_an_embedding_run(draw: Draw, folder: pathlib.Path) -> str:
    """`embeddings.json` and the parts' statistics, with which an embedding run goes on."""
    settings = {"model_sha256": "0" * 64, "format": "npz", "shard_size": 9, "source": []}
    files.check_settings(folder, settings)
    files.check_settings(folder, settings)  # the same again is fine
    damage.damage_folder(draw, folder)
    result = attempt(lambda: files.check_settings(folder, settings), folder)
    same = isinstance(result, Refused) or json.loads((folder / files.SETTINGS_FILE).read_bytes())
    require(same is True or same == settings, "other settings were taken for the same")
    part = folder / "embeddings-00000-00000.json"
    stats = {"file": "a.npz", "pairs": 3, "entries": 4, "dropped": {}, "is_last": True}
    contents = json.dumps(stats).encode()
    part.write_bytes(draw(damage.damaged(contents) | one([*NO_OBJECT, b"{}"])))
    found = attempt(lambda: files.read_stats(part), part)
    if isinstance(found, Refused):
        return ERROR
    require(found.keys() >= stats.keys(), f"statistics of a part: {found}")
    return SUCCESS
