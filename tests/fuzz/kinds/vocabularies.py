"""Vocabularies and class names: the small text files that numbers take meaning from."""

from __future__ import annotations

import json
import pathlib

from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.evaluation import prompts
from diht_jax.records import vocabulary
from diht_jax.records.tfrecord import TFRecordWriter
from diht_jax.records.vocabulary import ConceptList, Vocabulary
from tests.fuzz.damage import NOT_UTF8, Draw, changed_text, damage_folder, damaged, words
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, require


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


def check_labelled_folder(draw: Draw, folder: pathlib.Path) -> str:
    """Files damaged, swapped, gone or another data set's: the labels' own names, or an error."""
    written = _write(draw, folder)
    shard, *_ = folder.glob("*.tfrecord")
    contents = shard.read_bytes()
    if draw(integers(0, 3)) == 3:
        other = ConceptList(vocabulary.KINDS[0], ("other",), (0,))
        vocabulary.write_vocabulary(folder, Vocabulary(other, written.attributes))
        changed = []
    else:
        changed = damage_folder(draw, folder)
    shard.write_bytes(contents)
    found = attempt(lambda: vocabulary.find_vocabulary(str(folder)), folder)
    if isinstance(found, Refused):
        return ERROR
    # Without its statistics, nothing claims that the records are labelled.
    is_unlabelled = any(path.suffix == ".json" and not path.exists() for path in changed)
    same = found and [part.names for part in found] == [part.names for part in written]
    require(same or is_unlabelled, f"other names: {found!r:.300}")
    return SUCCESS


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
