"""Vocabularies, class names and templates: the small text files that numbers take meaning from."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.data.records import vocabulary
from diht_jax.data.records.tfrecord import TFRecordWriter
from diht_jax.data.records.vocabulary import ConceptList, Vocabulary
from diht_jax.evaluation import prompts
from tests.fuzz.damage import DEEP_JSON, NO_OBJECT, NOT_UTF8, Draw, damaged, words
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, require


class _Labelled:
    """A labelled folder: vocabularies, a shard and its statistics."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        self.folder = folder
        parts = []
        for kind in vocabulary.KINDS:
            names = [f"{kind[:3]} {draw(words(1))} {n}" for n in range(draw(integers(1, 5)))]
            counts = [draw(integers(0, 999)) for _ in names]
            parts.append(ConceptList(kind, tuple(names), tuple(counts)))
        self.vocabulary = Vocabulary(*parts)
        vocabulary.write_vocabulary(folder, self.vocabulary)
        self.paths = [
            pathlib.Path(vocabulary.vocabulary_path(folder, kind)) for kind in vocabulary.KINDS
        ]
        shard = folder / "pairs-train-00000.tfrecord"
        with TFRecordWriter(shard) as writer:
            writer.write(b"a record")
        self.stats = folder / f"{shard.name}{vocabulary.STATS_SUFFIX}"
        self.write_stats(self.vocabulary.describe())

    def write_stats(self, described: Any) -> None:
        """How the shard's statistics describe its vocabulary."""
        self.stats.write_text(json.dumps({"counts": {vocabulary.STATS_KEY: described}}))

    def judge(self, must_fail: bool = False) -> str:
        """The vocabulary that was written, or an error that names a file."""
        found = attempt(lambda: vocabulary.find_vocabulary(str(self.folder)), self.folder)
        if isinstance(found, Refused):
            return ERROR
        require(not must_fail, "another vocabulary was taken for this one")
        for part, expected in zip(found, self.vocabulary, strict=True):
            require(part.names == expected.names, f"names {part.names}, written {expected.names}")
        return SUCCESS


def check_damaged_files(draw: Draw, folder: pathlib.Path) -> str:
    """The hash in the first line covers the names; the counts are for people."""
    data = _Labelled(draw, folder)
    path = draw(one([*data.paths, data.stats]))
    path.write_bytes(draw(damaged(path.read_bytes())))
    return data.judge()


def check_edited_vocabulary(draw: Draw, folder: pathlib.Path) -> str:
    """Lines that somebody took out, doubled, swapped or wrote anew."""
    data = _Labelled(draw, folder)
    path = draw(one(data.paths))
    lines = path.read_text().split("\n")
    place = draw(integers(2, len(lines) - 2))
    number, name, count = lines[place].split("\t")
    edits = [[], [lines[place]] * 2, [f"{number}\t{name} x\t{count}"]]
    edits += [[line] for line in ("", "\t\t", name, f"{name}\t{number}", f"{number}\t{name}")]
    edits += [[f"{n}\t{name}\t{count}"] for n in ("-1", "9" * 5000, "x", "1.0", "")]
    edits += [[f"{number}\t{name}\t{n}"] for n in ("x", "", "9" * 5000, "1.5")]
    heads = ["", "#", "# objects", lines[0].replace("# ", ""), "# x y 1 concepts"]
    if draw(integers(0, 4)) == 4:
        lines[0] = draw(one(heads))
    else:
        lines[place : place + 1] = draw(one(edits))
    path.write_text("\n".join(lines))
    return data.judge(must_fail=True)


def check_swapped_vocabularies(draw: Draw, folder: pathlib.Path) -> str:
    """Objects for attributes, one of the two alone, or another data set's."""
    data = _Labelled(draw, folder)
    first, second = data.paths
    form = draw(integers(0, 2))
    if form == 0:
        contents = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(contents)
    elif form == 1:
        draw(one(data.paths)).unlink()
    else:
        (folder / "other").mkdir()
        other = _Labelled(draw, folder / "other")
        assume(other.vocabulary.objects.names != data.vocabulary.objects.names)
        first.write_bytes(other.paths[0].read_bytes())
    return data.judge(must_fail=True)


def check_bad_statistics(draw: Draw, folder: pathlib.Path) -> str:
    """Statistics that are none, or describe another vocabulary."""
    data = _Labelled(draw, folder)
    described = data.vocabulary.describe()
    odd = [None, 3, "x", [], {}, {"size": 3}, {"hash": 3}, {"hash": "0" * 16, "size": 1}]
    others = [{**described, kind: value} for kind in vocabulary.KINDS for value in odd]
    contents = [*NO_OBJECT, b"{}", b'{"counts": 3}', b'{"counts": []}']
    chosen = draw(one([*others, None, 3, [], "text", {}, *contents]))
    if isinstance(chosen, bytes):
        data.stats.write_bytes(chosen)
    else:
        data.write_stats(chosen)
    return data.judge(must_fail=True)


def check_class_names(draw: Draw, folder: pathlib.Path) -> str:
    """One name a line, or a JSON list: as many names as there were, or an error."""
    names = draw(st.lists(words(2), min_size=1, max_size=6))
    names = [f"{name} {number}" for number, name in enumerate(names)]
    path = folder / draw(one(["names.txt", "names.json"]))
    if path.suffix == ".json":
        contents = json.dumps(names).encode()
        odd = [DEEP_JSON, b"{}", b"[]", b"[1]", b'["a", null]', b'"text"', b"", *NOT_UTF8, b"[["]
    else:
        contents = "\n".join(names).encode()
        odd = [b"", b"\n", b"a\n\nb", *NOT_UTF8, b"\n" * 1000, b"a\n \nb"]
    good = [contents, b"\xef\xbb\xbf" + contents]
    changed = draw(one(good) | one(odd) | damaged(contents))
    path.write_bytes(changed)
    found = attempt(lambda: prompts.read_class_names(path), path)
    require(changed not in good or found == tuple(names), f"read {found!r:.200}, not {names}")
    require(changed not in odd or isinstance(found, Refused), f"names of nothing: {found!r:.80}")
    if isinstance(found, Refused):
        return ERROR
    require(all(isinstance(n, str) for n in found) and len(found) > 0, f"{found!r:.80}")
    return SUCCESS


def check_templates(draw: Draw, folder: pathlib.Path) -> str:
    """A template a line, each with one slot."""
    path = folder / "templates.txt"
    good = b"a photo of a {}.\n{}\na {}"
    odd = [b"", b"no slot", b"{} and {}", *NOT_UTF8, b"{0}\n", b"{c}", b"\n\n", b"a {}\nno"]
    contents = draw(one([good, *odd]))
    path.write_bytes(contents)
    found = attempt(lambda: prompts.parse_templates(f"@{path}"), path, "template", "Template")
    if contents == good:
        require(found == ("a photo of a {}.", "{}", "a {}"), f"{found}")
        return SUCCESS
    require(isinstance(found, Refused), f"templates of nothing: {found}")
    return ERROR
