"""Vocabularies, class names and templates: the small text files that numbers take meaning from."""

from __future__ import annotations

import json
import pathlib

from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.evaluation import prompts
from diht_jax.records import vocabulary
from diht_jax.records.tfrecord import TFRecordWriter
from diht_jax.records.vocabulary import ConceptList, Vocabulary
from tests.fuzz.damage import NOT_UTF8, Draw, changed_text, damage_folder, damaged, words
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, judge_value, must_refuse, require


def _write(draw: Draw, folder: pathlib.Path) -> Vocabulary:
    """A labelled folder: vocabularies, a shard and its statistics."""
    parts = []
    for kind in vocabulary.KINDS:
        names = [f"{kind[:3]} {draw(words(1))} {n}" for n in range(draw(integers(1, 5)))]
        parts.append(ConceptList(kind, tuple(names), tuple(range(len(names)))))
    vocabulary.write_vocabulary(folder, Vocabulary(*parts))
    shard = folder / "pairs-train-00000.tfrecord"
    with TFRecordWriter(shard) as writer:
        writer.write(b"a record")
    stats = {"counts": {vocabulary.STATS_KEY: Vocabulary(*parts).describe()}}
    (folder / f"{shard.name}{vocabulary.STATS_SUFFIX}").write_text(json.dumps(stats))
    return Vocabulary(*parts)


def _names_in(folder: pathlib.Path) -> list[tuple[str, ...]] | None:
    found = vocabulary.find_vocabulary(str(folder))
    return found and [part.names for part in found]


def check_labelled_folder(draw: Draw, folder: pathlib.Path) -> str:
    """Files damaged, edited, swapped or gone: the names are those of the labels, or an error."""
    names = [part.names for part in _write(draw, folder)]
    shard, *_ = folder.glob("*.tfrecord")
    contents = shard.read_bytes()
    changed = damage_folder(draw, folder)
    shard.write_bytes(contents)
    if any(path.suffix == ".json" and not path.exists() for path in changed):
        # Nothing claims that the records are labelled.
        return ERROR if isinstance(attempt(lambda: _names_in(folder), folder), Refused) else SUCCESS
    return judge_value(lambda: _names_in(folder), names, folder)


def check_another_vocabulary(draw: Draw, folder: pathlib.Path) -> str:
    """The vocabulary of another data set is not taken for this one's."""
    (folder / "other").mkdir()
    names, other = (_write(draw, path).objects.names for path in (folder, folder / "other"))
    assume(names != other)
    path = vocabulary.vocabulary_path(folder, vocabulary.KINDS[0])
    other_path = vocabulary.vocabulary_path(folder / "other", vocabulary.KINDS[0])
    pathlib.Path(path).write_bytes(pathlib.Path(other_path).read_bytes())
    return must_refuse(lambda: _names_in(folder), folder)


def check_class_names(draw: Draw, folder: pathlib.Path) -> str:
    """One name a line, or a JSON list: as many names as there were, or an error."""
    names = draw(st.lists(words(2), min_size=1, max_size=6, unique=True))
    path = folder / draw(one(["names.txt", "names.json"]))
    if path.suffix == ".json":
        contents = json.dumps(names).encode()
        odd = [b"[" * 200_000, b"{}", b"[]", b"[1]", b'["a", null]', b'"text"', b"[["]
    else:
        contents = "\n".join(names).encode()
        odd = [b"\n", b"a\n\nb", b"\n" * 1000, b"a\n \nb"]
    good, odd = [contents, b"\xef\xbb\xbf" + contents], [b"", *NOT_UTF8, *odd]
    changed = draw(one(good) | one(odd) | damaged(contents) | changed_text(contents))
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
    odd = [b"", b"no slot", b"{} and {}", *NOT_UTF8, b"{0}\n", b"{c}", b"\n\n", b"a {}\nno"]
    path.write_bytes(draw(one([b"a photo of a {}.\n{}", *odd])))
    names = (path, "template", "Template")
    read = lambda: prompts.parse_templates(f"@{path}")  # noqa: E731
    if path.read_bytes().startswith(b"a photo"):
        require(read() == ("a photo of a {}.", "{}"), "good templates")
        return SUCCESS
    return must_refuse(read, *names)
