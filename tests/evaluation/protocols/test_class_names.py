"""Labels: how each kind of source gets its class names."""

import pytest

from diht_jax.evaluation.protocols.class_names import (
    derive_classes,
    name_index,
    raw_label,
    resolve_label,
)
from diht_jax.records.schema import Pair

TEMPLATES = ("a photo of a {}.",)


def _raws(*rows):
    """Rows of (metadata, caption)."""
    return [
        raw_label(Pair(key=f"k{i}", image=b"", caption=caption, metadata=metadata))
        for i, (metadata, caption) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rows", "names", "labels"),
    [
        # Names as labels (the CIFAR tar): in alphabetical order.
        ([({"label": "frog"}, ""), ({"label": "deer"}, "")], ("deer", "frog"), [1, 0]),
        # Integers with class names (folders, TFDS): in label order, "_" is a space.
        (
            [({"label": 7, "class_name": "b_c"}, ""), ({"label": 2, "class_name": "z"}, "")],
            ("z", "b c"),
            [1, 0],
        ),
        # Integers whose captions name them.
        (
            [({"label": 1}, "a photo of a cat."), ({"label": 0}, "a photo of a dog.")],
            ("dog", "cat"),
            [1, 0],
        ),
        # Captions only.
        (
            [({}, f"a photo of a {name}.") for name in ("cat", "dog", "cat", "dog")],
            ("cat", "dog"),
            [0, 1, 0, 1],
        ),
    ],
)
def test_classes_found_in_the_data(rows, names, labels):
    classes = derive_classes(_raws(*rows), TEMPLATES)
    assert (classes.names, classes.labels.tolist()) == (names, labels)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([({}, "one"), ({}, "two"), ({}, "three")], "captions are no classes .3 different ones"),
        ([({"label": 1}, ""), ({"label": "cat"}, "")], "mixed.*'k1'.*'k0'|mixed.*'k0'.*'k1'"),
        (
            [({"label": 1}, "a cat"), ({"label": 1}, "a dog")],
            "'k1': label 1 goes with .*--class_names",
        ),
    ],
)
def test_what_would_be_a_guess_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        derive_classes(_raws(*rows), TEMPLATES)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (1, 1),
        ("Lawn_Mower", 1),
        ("CAT", 0),
        ("2", 2),
        ("crane", "several classes"),
        (5, "outside of the 5"),
        (-1, "outside of the 5"),
    ],
)
def test_labels_among_given_names(label, expected):
    names = ("cat", "lawn mower", "tench", "crane", "crane")
    (raw,) = _raws(({"label": label}, ""))
    if isinstance(expected, int):
        assert resolve_label(raw, names, name_index(names)) == expected
    else:
        with pytest.raises(ValueError, match=f"'k0'.*{expected}"):
            resolve_label(raw, names, name_index(names))


def test_another_field_holds_the_label():
    pair = Pair("k", b"", "", {"label": 3, "shape": "star", "class_name": "red"})
    assert raw_label(pair, "shape").label == "star"
    assert raw_label(pair, "shape").class_name is None
    with pytest.raises(ValueError, match="'k' has no metadata field 'colour'.*shape"):
        raw_label(pair, "colour")
