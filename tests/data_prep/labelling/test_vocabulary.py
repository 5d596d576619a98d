"""Vocabularies and targets, computed from the filter's files, against counts by hand."""

import collections
import json
import pathlib
import shutil

import numpy as np
import pytest

from data_prep.duplicates.rows import hash_texts
from data_prep.filter import run_filter
from data_prep.labelling import examples as concept_vocabulary
from data_prep.labelling.config import default_config
from data_prep.labelling.embeddings import key_ranks
from data_prep.labelling.examples import count_concepts, make_targets, read_targets
from diht_jax.records.catalog import find_shards
from diht_jax.records.vocabulary import ConceptList
from tests import make
from tests.data_prep.filtering.jobs import job_config, write_table

# The captions of each image and the concepts that they name, written by hand.
_IMAGES = [
    (["A black cat is chasing a small brown bird"], ["bird", "cat"], ["black", "brown", "small"]),
    (["a black dog runs", "a dog sleeps on a red sofa"], ["dog", "sofa"], ["black", "red"]),
    (["a dog runs"], ["dog"], []),
    (["sunset"], ["sunset"], []),
    (["https://example.com/cat.jpg"], [], []),
]


def _count(column: int, rows=_IMAGES) -> dict[str, int]:
    return dict(collections.Counter(name for row in rows for name in row[column]))


@pytest.fixture(scope="module")
def filtered(tmp_path_factory) -> pathlib.Path:
    """Folders by recipe: `convert` keeps all readable images, `cat` the first three of them."""
    folder = tmp_path_factory.mktemp("concepts")
    rows = [{"image": "good.png", "caption": captions} for captions, *_ in _IMAGES]
    rows.insert(1, {"image": "bad.png", "caption": "a blue whale swims"})
    source = write_table(folder, rows, {"good.png": make.png(), "bad.png": b"<html>"})
    for recipe in ("cat", "convert"):
        config = job_config(source, folder / recipe, recipe, concepts=True)
        config.source.rows_per_shard = config.examples_per_shard = 2
        assert run_filter(config) == {}
    return folder


def test_filter_counts_what_kept_captions_name(filtered):
    for recipe, rows in (("convert", _IMAGES), ("cat", _IMAGES[:3])):
        counts = concept_vocabulary.read_counts(find_shards(filtered / recipe))[0]
        assert counts == {"objects": _count(1, rows), "attributes": _count(2, rows)}
    stats = json.loads((filtered / "cat" / "stats.json").read_text())["counts"]
    assert (stats["kept"], stats["dropped"]["image"]) == (3, {"unreadable": 1})


def test_filter_keeps_what_each_record_names(filtered):
    shards = find_shards(filtered / "convert")
    assert len(shards) == 3
    names = ("dog", "cat", "black", "sofa")  # an attribute is not an object
    concepts = ConceptList("objects", names, (1,) * 4)
    objects = concept_vocabulary.concatenate([read_targets(shard, concepts) for shard in shards])
    expected = [sorted(names.index(n) for n in row[1] if n in names) for row in _IMAGES]
    assert [sorted(row[row >= 0].tolist()) for row in objects] == expected
    concepts = ConceptList("attributes", ("red", "black"), (1, 1))
    counts = [count_concepts(read_targets(shard, concepts), 2) for shard in shards]
    assert np.sum(counts, axis=0).tolist() == [1, 2]


def _build(counts, attributes=(), **changes):
    config = default_config().vocabulary
    config.update({"min_count": 1, "stop_objects": (), "stop_attributes": ()} | changes)
    counts = {"objects": counts, "attributes": dict(attributes)}
    return concept_vocabulary.build_vocabulary(counts, config)


def test_vocabulary_is_ordered_and_cut():
    counts = {"dog": 5, "ant": 7, "bee": 5, "cat": 9, "photo": 20, "rare": 4}
    attributes = {"red": 5, "photo": 6}
    vocabulary = _build(counts, attributes, min_count=5, stop_objects=("photo", "absent"))
    assert vocabulary.objects.names == ("cat", "ant", "bee", "dog")
    assert vocabulary.objects.counts == (9, 7, 5, 5)
    assert vocabulary.attributes.names == ("photo", "red")
    limited = _build(counts, attributes, max_objects=2, max_attributes=0)
    assert limited.objects.names == ("photo", "cat")
    shuffled = dict(sorted(counts.items(), reverse=True))
    assert _build(shuffled).objects.hash == _build(counts).objects.hash
    with pytest.raises(ValueError, match="min_count=30 leaves no concept.* occurs in 20 pairs"):
        _build(counts, min_count=30)


def test_statistics_of_another_shard_are_not_counted_twice(filtered, tmp_path):
    folder = shutil.copytree(filtered / "cat", tmp_path / "kept")
    first, *_, last = find_shards(folder)
    shutil.copy(f"{first}.stats.json", f"{last}.stats.json")
    expected = rf"{last}.stats.json: .*statistics of {pathlib.Path(first).name}"
    with pytest.raises(ValueError, match=expected):
        concept_vocabulary.read_counts(find_shards(folder))


def test_shards_without_concepts(filtered, tmp_path):
    shard = find_shards(filtered / "cat")[0]
    copy = tmp_path / "pairs-train-00000.tfrecord"
    copy.write_bytes(pathlib.Path(shard).read_bytes())
    nothing = ConceptList("objects", (), ())
    with pytest.raises(ValueError, match=r"concepts\.npz is missing.*concepts=True"):
        read_targets(str(copy), nothing)


@pytest.mark.filterwarnings("error")
def test_ranks_of_keys_by_any_seed():
    ranks = [key_ranks(hash_texts(["a"]), seed) for seed in (0, 1, 2**63, 2**64)]
    x = (int(hash_texts(["a"])[0]) + 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor % 2**64
    assert ranks[1][0] == ((x ^ x >> 31) >> 11) / 2**53
    assert ranks[3] == ranks[0] != ranks[2]


def test_repeat_factors_by_hand():
    # Of 16 records, all have concept 0, 4 also have concept 1, and one has concept 2.
    rows = [[0]] * 11 + [[0, 1]] * 4 + [[2, 0]]
    targets = make_targets(np.array([len(row) for row in rows]), np.array(sum(rows, [])))
    counts = count_concepts(targets, 3)
    factors = concept_vocabulary.concept_factors(counts, 16, 1.0)
    assert factors.tolist() == [1.0, 2.0, 4.0]
    repeated = concept_vocabulary.repeat_factors(targets, factors)
    assert repeated.tolist() == [1.0] * 11 + [2.0] * 4 + [4.0]
    fewer = concept_vocabulary.concept_factors(counts, 16, 0.25)
    assert fewer.tolist() == [1.0, 1.0, 2.0]
    none = make_targets(np.array([0, 1]), np.array([1]))
    assert concept_vocabulary.repeat_factors(none, factors).tolist() == [0.0, 2.0]
