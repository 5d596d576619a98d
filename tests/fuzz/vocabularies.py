"""Vocabularies, class names and templates: the small text files that numbers take meaning from."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from diht_jax.data.records import vocabulary
from diht_jax.data.records.tfrecord import TFRecordWriter
from diht_jax.data.records.vocabulary import ConceptList, Vocabulary
from diht_jax.evaluation import prompts
from tests.fuzz.cases import DEEP_JSON, ERROR, NOT_UTF8, SUCCESS, Draw, Refused, attempt, require


class Labelled:
    """A labelled folder: vocabularies, a shard and its statistics."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        self.folder = folder
        parts = []
        for kind in vocabulary.KINDS:
            names = [f"{kind[:3]} {draw.text(1)} {n}" for n in range(draw.randint(1, 5))]
            counts = [draw.randint(0, 999) for _ in names]
            parts.append(ConceptList(kind, tuple(names), tuple(counts)))
        self.vocabulary = Vocabulary(*parts)
        vocabulary.write_vocabulary(folder, self.vocabulary)
        self.shard = folder / "pairs-train-00000.tfrecord"
        with TFRecordWriter(self.shard) as writer:
            writer.write(b"a record")
        self.stats = folder / f"{self.shard.name}{vocabulary.STATS_SUFFIX}"
        self.write_stats(self.vocabulary.describe())

    def path(self, kind: str) -> pathlib.Path:
        """Of the file of one kind."""
        return pathlib.Path(vocabulary.vocabulary_path(self.folder, kind))

    def write_stats(self, described: Any) -> None:
        """What the shard's statistics say of its vocabulary."""
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


def _damaged_vocabulary(draw: Draw, folder: pathlib.Path) -> str:
    """The hash in the first line covers the names; the counts are for people."""
    data = Labelled(draw, folder)
    path = data.path(draw.choice(vocabulary.KINDS))
    path.write_bytes(draw.damage(path.read_bytes()))
    return data.judge()


def _edited_vocabulary(draw: Draw, folder: pathlib.Path) -> str:
    """Lines that somebody took out, doubled, swapped or wrote anew."""
    data = Labelled(draw, folder)
    path = data.path(draw.choice(vocabulary.KINDS))
    lines = path.read_text().split("\n")
    place = draw.randrange(2, len(lines) - 1)
    number, name, count = lines[place].split("\t")
    form = draw.randrange(7)
    if form == 0:
        del lines[place]
    elif form == 1:
        lines.insert(place, lines[place])
    elif form == 2:
        lines[place] = f"{number}\t{name} x\t{count}"
    elif form == 3:
        lines[place] = draw.choice(["", "\t\t", name, f"{name}\t{number}", f"{number}\t{name}"])
    elif form == 4:
        lines[place] = f"{draw.choice(['-1', '9' * 5000, 'x', '1.0', ''])}\t{name}\t{count}"
    elif form == 5:
        lines[place] = f"{number}\t{name}\t{draw.choice(['x', '', '9' * 5000, '1.5'])}"
    else:
        lines[0] = draw.choice(
            ["", "#", "# objects", lines[0].replace("# ", ""), "# x y 1 concepts"]
        )
    path.write_text("\n".join(lines))
    return data.judge(must_fail=True)


def _swapped_vocabularies(draw: Draw, folder: pathlib.Path) -> str:
    """Objects for attributes, or another data set's."""
    data = Labelled(draw, folder)
    first, second = map(data.path, vocabulary.KINDS)
    form = draw.randrange(3)
    if form == 0:
        contents = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(contents)
    elif form == 1:
        draw.choice([first, second]).unlink()
    else:
        other = folder / "other"
        other.mkdir()
        names = Labelled(draw, other).vocabulary.objects.names
        if names == data.vocabulary.objects.names:
            return SUCCESS
        first.write_bytes(
            pathlib.Path(vocabulary.vocabulary_path(other, vocabulary.KINDS[0])).read_bytes()
        )
    return data.judge(must_fail=True)


def _bad_stats(draw: Draw, folder: pathlib.Path) -> str:
    """Statistics that are none, or name another vocabulary."""
    data = Labelled(draw, folder)
    described = data.vocabulary.describe()
    form = draw.randrange(3)
    if form == 0:
        data.stats.write_bytes(draw.damage(data.stats.read_bytes()))
        return data.judge()
    if form == 1:
        kind = draw.choice(vocabulary.KINDS)
        odd = [None, 3, "x", [], {}, {"size": 3}, {"hash": 3}, {"hash": "0" * 16, "size": 1}]
        described[kind] = draw.choice(odd)
        data.write_stats(draw.choice([described, None, 3, [], "text", {}]))
    else:
        contents = [b"", b"[]", b"3", b"{}", DEEP_JSON, b'{"counts": 3}', b'{"counts": []}']
        data.stats.write_bytes(draw.choice([*contents, *NOT_UTF8]))
    return data.judge(must_fail=True)


def _class_names(draw: Draw, folder: pathlib.Path) -> str:
    """One name a line, or a JSON list: as many names as there were, or an error."""
    names = [f"{draw.text(2)} {n}" for n in range(draw.randint(1, 6))]
    path = folder / draw.choice(["names.txt", "names.json"])
    if path.suffix == ".json":
        contents = json.dumps(names).encode()
        odd = [DEEP_JSON, b"{}", b"[]", b"[1]", b'["a", null]', b'"text"', b"", *NOT_UTF8, b"[["]
    else:
        contents = "\n".join(names).encode()
        odd = [b"", b"\n", b"a\n\nb", *NOT_UTF8, b"\n" * 1000, b"a\n \nb"]
    form = draw.randrange(3)
    if form == 0:
        path.write_bytes(draw.choice([contents, b"\xef\xbb\xbf" + contents]))
        found = attempt(lambda: prompts.read_class_names(path), path)
        require(found == tuple(names), f"read {found!r:.200}, written {names}")
        return SUCCESS
    path.write_bytes(draw.choice(odd) if form == 1 else draw.damage(contents))
    found = attempt(lambda: prompts.read_class_names(path), path)
    require(isinstance(found, Refused) or form == 2, f"names of nothing: {found!r:.80}")
    if isinstance(found, Refused):
        return ERROR
    require(all(isinstance(n, str) for n in found) and len(found) > 0, f"{found!r:.80}")
    return SUCCESS


def _templates(draw: Draw, folder: pathlib.Path) -> str:
    path = folder / "templates.txt"
    good = ["a photo of a {}.", "{}", "a {} {{}}"[:4]]
    odd = [b"", b"no slot", b"{} and {}", *NOT_UTF8, b"{0}\n", b"{c}", b"\n\n", b"a {}\nno"]
    if draw.random() < 0.3:
        path.write_text("\n".join(good))
        found = attempt(lambda: prompts.parse_templates(f"@{path}"), path)
        require(found == tuple(good), f"{found}")
        return SUCCESS
    path.write_bytes(draw.choice(odd))
    result = attempt(lambda: prompts.parse_templates(f"@{path}"), path, "template", "Template")
    require(isinstance(result, Refused), f"templates of nothing: {result}")
    return ERROR


MUTATIONS = {
    "damaged vocabulary": _damaged_vocabulary,
    "edited vocabulary": _edited_vocabulary,
    "swapped vocabularies": _swapped_vocabularies,
    "bad statistics": _bad_stats,
    "class names": _class_names,
    "templates": _templates,
}
