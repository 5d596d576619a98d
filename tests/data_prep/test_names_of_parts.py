"""Names of parts: they follow from an input's path below its root, and from nothing else."""

import pytest

from data_prep import sources
from data_prep.sources import Input, find_root
from diht_jax.readers.registry import SourceShard


def _inputs(folder: str, *names: str) -> list[Input]:
    return [Input(SourceShard("webdataset", f"{folder}/{name}"), folder) for name in names]


def test_the_other_inputs_do_not_matter():
    ten = sources.hash_inputs(_inputs("/a", *map(str, range(10))))
    assert len(set(ten)) == 10 and all(len(name) == 16 for name in ten)
    some = sources.hash_inputs(_inputs("/elsewhere/a", "7", "new", "2"))
    assert (some[0], some[2]) == (ten[7], ten[2])


def test_parts_of_a_file_and_equal_paths_differ():
    whole = SourceShard("table", "/a/t.csv", 0, 10)
    halves = [SourceShard("table", "/a/t.csv", 0, 5), SourceShard("table", "/a/t.csv", 5, 10)]
    (alone,) = sources.hash_inputs([Input(whole, "/a")])
    assert len({alone, *sources.hash_inputs([Input(half, "/a") for half in halves])}) == 3
    longer = SourceShard("table", "/a/t.csv", 0, 12)  # the same file, replaced
    assert sources.hash_inputs([Input(longer, "/a")]) == [alone]
    both = _inputs("/x/a/in", "1", "2") + _inputs("/x/b/in", "2") + _inputs("/x/b/in", "2")
    names = sources.hash_inputs(both)
    assert len(set(names)) == 4
    assert names[0] == sources.hash_inputs(_inputs("/any", "1"))[0]
    moved = _inputs("/y/a/in", "1", "2") + _inputs("/y/b/in", "2") + _inputs("/y/b/in", "2")
    assert sources.hash_inputs(moved) == names  # the ends of the roots tell them apart


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("{}/in/*.tar", "{}/in"),
        ("{}/i?/*.tar", "{}"),
        ("{}/in/t.csv?image_column=a/b&caption_column=c", "{}/in"),
        ("s3://b/in/*/[ab].tar", "s3://b/in"),
    ],
)
def test_the_root_of_what_was_typed(tmp_path, text, root):
    (tmp_path / "in").mkdir()
    assert find_root(text.format(tmp_path)) == root.format(tmp_path)
