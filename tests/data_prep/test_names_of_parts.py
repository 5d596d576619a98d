"""Names of parts: they follow from an input, its rows, and its path below its root."""

from data_prep import sources
from data_prep.sources import Input
from diht_jax.readers.registry import SourceShard


def _inputs(folder: str, *names: str) -> list[Input]:
    return [Input(SourceShard("webdataset", f"{folder}/{name}"), folder) for name in names]


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
