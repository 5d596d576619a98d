"""The laboratory's data: exchanged captions, subsets, and data made by outdated rules."""

import collections
import json

import numpy as np
import pytest

from benchmarks.lab import concepts, data, second_web, variants
from benchmarks.lab.data import Data
from benchmarks.lab.variants import exchange
from data_prep.captions import cat_reason, parse_captions
from data_prep.synthetic import web
from diht_jax.records.samples import all_captions, caption_kinds
from diht_jax.records.schema import Record
from diht_jax.records.vocabulary import ConceptList, Vocabulary, find_vocabulary, write_vocabulary


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75])
def test_a_share_of_the_texts_changes_hands_and_all_of_those_change(share):
    texts = list("abcdefghij") * 40
    changed = exchange(texts, share, seed=3)
    assert collections.Counter(changed) == collections.Counter(texts)
    assert sum(a != b for a, b in zip(texts, changed, strict=True)) == share * len(texts)
    assert exchange(texts, share, seed=3) == changed
    assert share == 0 or exchange(texts, share, seed=4) != changed


def scene(*kinds):
    return {"objects": [{"shape": shape, "color": color} for shape, color in kinds]}


@pytest.fixture
def empty(tmp_path):
    """Data without any variant."""
    return Data(tmp_path, tmp_path, lambda seed: pytest.fail("no model is needed"))


def place(lab, name, records):
    """Writes a variant as if the laboratory had made it."""
    folder = lab.workdir / "data" / name
    folder.mkdir(parents=True)
    variants.write(folder, records)
    (folder / "complete.json").write_text(json.dumps(data.identity(name)))


@pytest.fixture
def lab(empty):
    """Data with raw and CAT variants: 20 and 6 records, every other one clean."""
    unseen, seen = variants.UNSEEN[0], ("circle", "blue")
    shown = {0: [unseen], 3: [seen], 6: [seen, unseen]}
    records = [
        Record(
            f"k{i}", b"png", f"text {i}",
            {"noise": ("clean", "mismatched")[i % 2], "scene": scene(*shown.get(i, []))},
            np.array([i], np.int32), np.array([1.0], np.float32),
            np.array([], np.int32), np.array([], np.float32),
        )
        for i in range(20)
    ]  # fmt: skip
    place(empty, "raw", records)
    place(empty, "cat", records[:18:3])
    return empty


def keys(folder):
    return [record.key for record in variants.read(folder)]


def test_subsets_of_the_raw_and_of_the_kept_pairs(lab):
    raw = keys(lab.make("raw"))
    some = keys(lab.make("random_0"))
    assert len(some) == 6 and [key for key in raw if key in some] == some
    assert keys(lab.make("random_1")) != some
    assert keys(lab.make("oracle")) == raw[::2]
    # No remaining pair shows a combination reserved for few-shot.
    assert keys(lab.make("unseen")) == ["k3", "k9", "k12", "k15"]
    with pytest.raises(ValueError, match="data 'nothing': no variant has such a name"):
        lab.make("nothing")


def test_new_captions_are_of_what_the_pictures_show(empty):
    pairs = [web.make_pair(web.Settings(), "train", index) for index in range(12)]
    place(empty, "raw", pairs)
    records = variants.read(empty.make("raw_recaptioned"))
    described = 0
    for record, pair in zip(records, pairs, strict=True):
        assert (record.caption, record.image) == (pair.caption, pair.image)
        new = all_captions(record)[1:]
        assert list(caption_kinds(record).values()) == ["alt", *["synthetic"] * len(new)]
        assert bool(new) == bool(pair.metadata["scene"])
        for text in new:
            described += 1
            assert any(o["shape"] in text for o in pair.metadata["scene"]["objects"]), text
    assert described > 20


def test_a_variant_is_made_once_and_anew_when_its_rules_change(lab):
    folder = lab.make("oracle")
    (folder / "leftover").touch()
    assert lab.make("oracle") == folder and (folder / "leftover").exists()
    (folder / "complete.json").unlink()  # interrupted: finished files are kept
    assert keys(lab.make("oracle")) == [f"k{i}" for i in range(0, 20, 2)]
    assert (folder / "leftover").exists()
    for marker in (folder / "complete.json", folder.with_name("oracle.begun.json")):
        marker.write_text("{}")  # made by other rules
    assert keys(lab.make("oracle")) == [f"k{i}" for i in range(0, 20, 2)]
    assert not (folder / "leftover").exists()


def test_rules_keep_the_same_pairs_and_words_as_when_the_data_were_made():
    pairs = [web.make_pair(web.Settings(), "train", index) for index in range(200)]
    photos = [f"a photo of {name}" for name in ("an airplane", "a deer", "a truck")]
    graphs = parse_captions([*(pair.caption for pair in pairs), *photos])
    kept = "".join(str(int(cat_reason(graph) is None)) for graph in graphs[: len(pairs)])
    words = [list(graph.objects) for graph in graphs[len(pairs) :]]
    assert (f"{int(kept, 2):x}", words) == (
        "b8fb83b2fea9b3febdd5a597775f6f9447697763df8fdaed57",
        [["airplane"], ["deer"], ["truck"]],
    ), "the data are others: raise SAME_SINCE_RULES of benchmarks/lab/data.py to RULES_VERSION"


def test_shuffled_labels_are_those_of_other_records(lab):
    folder = lab.workdir / "data" / "shuffled"
    folder.mkdir()
    words = {kind: ConceptList(kind, ("sun", "moon"), (5, 4)) for kind in ("objects", "attributes")}
    write_vocabulary(lab.make("raw"), Vocabulary(**words))
    variants.shuffle_labels(lab.make("raw"), folder)
    records = variants.read(folder)
    assert [record.key for record in records] == keys(lab.make("raw"))
    labels = [int(record.object_ids[0]) for record in records]
    assert sorted(labels) == list(range(20)) and sum(i == j for i, j in enumerate(labels)) < 5
    # Training finds the vocabulary of the labels.
    assert find_vocabulary(folder).objects.names == ("sun", "moon")


def test_the_second_web_has_right_captions_without_a_verb_and_captions_of_other_pictures():
    records = list(second_web.make_records(seed=5, count=120))
    kinds = np.array([record.metadata["noise"] for record in records])
    graphs = parse_captions([record.caption for record in records])
    is_kept = np.array([cat_reason(graph) is None for graph in graphs])
    kept = {kind: is_kept[kinds == kind].mean() for kind in second_web.KINDS}
    assert kept["sentence"] > 0.9
    assert max(kept["names"], kept["title"], kept["uninformative"]) < 0.1
    for record in records:
        shapes = {o["shape"] for o in record.metadata["scene"]["objects"]}
        named = {shape for shape in shapes if shape in record.caption.lower()}
        if record.metadata["noise"] in second_web.RIGHT:
            assert named == shapes, record.caption
        else:
            assert not named, record.caption


def test_a_second_web_is_that_of_its_seed_and_grows_at_its_end():
    def captions(seed, count):
        return [record.caption for record in second_web.make_records(seed, count)]

    assert captions(1, 6) == captions(1, 12)[:6]
    assert captions(1, 6) != captions(2, 6)


def test_the_arms_of_a_second_web_are_chosen_from_its_pairs(empty):
    raw = variants.read(empty.make("second_24_raw_3"))
    for gate, records in {"c": raw[::2], "a": raw[::3], "t": raw[4:]}.items():
        place(empty, f"second_24_only_{gate}_3", records)
    names = [record.key for record in raw]
    assert keys(empty.make("second_24_cat_3")) == [names[i] for i in (6, 12, 18)]
    assert keys(empty.make("second_24_c_and_t_3")) == names[4::2]
    assert len(keys(empty.make("second_24_random_3"))) == 3
    right = [r.key for r in raw if r.metadata["noise"] not in ("mismatched", "uninformative")]
    assert keys(empty.make("second_24_oracle_3")) == right


def test_the_arms_of_clip_art_are_chosen_from_the_draw_of_their_seed(empty):
    titles = ("Flat Theme", "red house", "flat theme", "two dogs", "FLAT THEME", "red house")
    pairs = [Record(f"{i:02d}", b"-", (*titles, f"title {i}")[min(i, 6)]) for i in range(40)]
    kept = {"raw": pairs, "only_c": pairs[::2], "only_a": pairs[::5], "only_t": pairs[10:]}
    for arm, records in kept.items():
        place(empty, f"clipart_all_{arm}", records)
    drawn = keys(empty.make("clipart_raw_1"))
    assert len(drawn) == 32 and drawn != keys(empty.make("clipart_raw_2"))
    assert keys(empty.make("clipart_c_and_t_1")) == [k for k in drawn if int(k) in range(10, 40, 2)]
    assert keys(empty.make("clipart_cat_1")) == [k for k in drawn if k in ("10", "20", "30")]
    own_title = keys(empty.make("clipart_own_title_1"))
    assert own_title == [k for k in drawn if k not in ("00", "02", "04")]
    assert len(keys(empty.make("clipart_random_1"))) == len(keys(empty.make("clipart_only_c_1")))


def test_held_out_concepts_are_in_no_training_caption_and_their_words_are():
    things = ("cat", "dog", "house", "tree", "ship")
    captions = [f"{color} {thing}" for color in ("red", "blue", "old") for thing in things]
    captions += ["unique", "red cat", "cat and dog"]
    found = concepts.split(captions * 40, seed=1)
    assert not {*found.train} & {*found.validation, *found.test}
    assert not {*found.validation} & {*found.test}
    known = {word for text in found.train for word in text.split()}
    assert all(set(text.split()) <= known for text in (*found.validation, *found.test))
    assert "unique" in found.train
    pairs = [
        Record("1F600-FE0F", b"", "a face", {"category": "Smileys"}),
        Record("1f601", b"", "a hand with dark skin tone", {"category": "People"}),
        Record("1f602", b"", "flag of a country", {"category": "Flags"}),
    ]
    assert concepts.choose_concepts(pairs) == {"1f600": "a face"}


def test_neighbours_vote_without_the_row_itself():
    rows = np.array([[1, 0], [2, 0.1], [1, -0.1], [0, 1], [0.1, 3], [-0.1, 1]], np.float32)
    texts = ["wrong", "left", "left", "up", "wrong too", "up"]
    some = variants.vote(rows, texts)
    # The ten nearest are all other rows here: "left" and "up" are twice as frequent as the rest.
    assert some[0] == "left" and some[4] == "up"


def test_the_arms_of_a_drawn_web_are_chosen_from_its_pairs(empty, monkeypatch):
    monkeypatch.setattr(variants, "WEB_PAIRS", 24)
    raw = variants.read(empty.make("drawn_raw_3"))
    assert [r.caption for r in raw] != [r.caption for r in variants.read(empty.make("drawn_raw_4"))]
    place(empty, "drawn_cat_3", raw[::3])
    assert len(keys(empty.make("drawn_random_3"))) == 8
    assert keys(empty.make("drawn_recaptioned_3")) == [record.key for record in raw[::3]]
    shown = [
        {(o["shape"], o["color"]) for o in (record.metadata.get("scene") or {}).get("objects", ())}
        for record in variants.read(empty.make("drawn_unseen_3"))
    ]
    assert 0 < len(shown) < 8 and not set().union(*shown) & set(variants.UNSEEN)
    # A different student of the first web scores each drawn web.
    assert data.identity("drawn_clip_score_3")["model"] == data.identity("clip_score_3")["model"]


def test_webs_of_other_amounts_are_the_first_pairs_of_the_largest(empty, monkeypatch):
    monkeypatch.setattr(variants, "AMOUNTS", (6, 12))

    def captions(name):
        return [record.caption for record in variants.read(empty.make(name))]

    assert captions("amount_6_raw_0") == captions("amount_12_raw_0")[:6]
    assert captions("amount_12_raw_1") != captions("amount_12_raw_0")
    raw = variants.read(empty.make("amount_12_raw_0"))
    assert keys(empty.make("amount_12_raw_1")) == [r.key for r in raw]
    place(empty, "amount_12_cat_0", raw[::3])
    assert keys(empty.make("amount_6_cat_0")) == [r.key for r in raw[:6:3]]
