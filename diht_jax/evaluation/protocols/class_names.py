"""Class names and integer labels, from the labels, names or captions of a source.

A source may have integers, names or only captions; the user may give the class names. Anything that
cannot be resolved without guessing is an error that names the record.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diht_jax.evaluation.protocols.base import CLASS_SLOT
from diht_jax.records.schema import Pair


class RawLabel(NamedTuple):
    """The class information of one pair."""

    key: str  # key of the pair, for messages
    label: int | str | None  # metadata["label"], or the task's label field
    class_name: str | None = None
    caption: str = ""


class Classes(NamedTuple):
    """Class names, the integer labels of the images, and their origin."""

    names: tuple[str, ...]
    labels: np.ndarray  # int32 [n], indices into the names
    origin: str  # for the results file: "names given", "captions", ...


def raw_label(pair: Pair, field: str | None = None) -> RawLabel:
    """Reads the label of a pair from metadata["label"], or from another field.

    A given field that is missing, or a label that is no integer or text, is a ValueError.
    """
    name = field or "label"
    label = pair.metadata.get(name)
    if field is not None and label is None:
        raise ValueError(
            f"record '{pair.key}' has no metadata field '{field}'; it has "
            f"{sorted(pair.metadata) or 'none'}"
        )
    class_name = pair.metadata.get("class_name") if field is None else None
    label = None if label is None else _check_label(pair.key, name, label)
    return RawLabel(pair.key, label, class_name and str(class_name), pair.caption)


def _check_label(key: str, field: str, label: Any) -> int | str:
    if isinstance(label, np.integer):
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(
            f"record '{key}': expected metadata field '{field}' to be an integer or a class "
            f"name, got {label!r:.80}"
        )
    return label


def resolve_labels(
    pair: Pair, field: str, names: Sequence[str], index: dict[str, int | None]
) -> list[int]:
    """Returns the integer labels that a field of a pair lists; empty if the field is missing.

    Errors as in `resolve_label`; also if the field is no list.
    """
    listed = pair.metadata.get(field, ())
    if not isinstance(listed, list | tuple):
        raise ValueError(
            f"record '{pair.key}': expected metadata field '{field}' to be a list of integers or "
            f"class names, got {listed!r:.80}"
        )
    labels = [_check_label(pair.key, field, label) for label in listed]
    return [resolve_label(RawLabel(pair.key, label), names, index) for label in labels]


def resolve_label(raw: RawLabel, names: Sequence[str], index: dict[str, int | None]) -> int:
    """Returns the integer label of a pair; `index` is the `name_index` of the class names.

    An integer is an index into `names`. A name matches in any case, and with "_" for " ".

    Raises:
        ValueError: no label, out of range, an unknown or ambiguous name, or an integer whose class
            differs from the class name in the data.
    """
    label = raw.class_name if raw.label in (None, "") else raw.label
    where = f"record '{raw.key}'"
    if label is None:
        raise ValueError(
            f"{where} has no label: expected metadata 'label' (integer or name) or 'class_name'"
        )
    if isinstance(label, str) and _plain(label) not in index and label.isdecimal():
        label = int(label)
    if isinstance(label, int):
        if not 0 <= label < len(names):
            raise ValueError(
                f"{where}: label {label} is outside of the {len(names)} class names given; one "
                "name per label is needed, in label order"
            )
        named = _plain(raw.class_name or "")
        named = "" if named == str(label) else named  # TFDS numbers classes that have no names
        # A name may be given longer: ImageNet's cardigan is a dog and, as another class, a garment.
        if index.get(named) not in (None, label) and named not in _plain(names[label]):
            raise ValueError(
                f"{where}: label {label} is '{raw.class_name}' in the data and '{names[label]}' in "
                "the class names given; one name per label of the data is needed, in label order"
            )
        return label
    if _plain(label) not in index:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(
            f"{where}: label '{label}' is none of the {len(names)} class names ({shown})"
        )
    found = index[_plain(label)]
    if found is None:
        raise ValueError(
            f"{where}: label '{label}' is the name of several classes; such a source needs "
            "integer labels"
        )
    return found


def read_splits(pair: Pair) -> list[int]:
    """Returns the test splits of an image: `metadata["splits"]` if it is a list of numbers."""
    splits = pair.metadata.get("splits")
    is_list = isinstance(splits, list) and all(type(split) is int for split in splits)
    return splits if is_list else []


def read_group(pair: Pair, field: str) -> int | str:
    """Returns the group of an image: a metadata field, or the number at a position of its KEY.npy.

    In CLIP_benchmark's layout `metadata["numbers"]` has the values of KEY.npy; positions start at
    0. A missing field, or a value that is no text or whole number, is a ValueError.
    """
    if field.isdecimal():
        numbers = pair.metadata.get("numbers", ())
        value = numbers[int(field)] if int(field) < len(numbers) else None
        has = f"{len(numbers)} numbers in its npy"
    else:
        value, has = pair.metadata.get(field), f"{sorted(pair.metadata) or 'no metadata'}"
    if value is None:
        raise ValueError(f"record '{pair.key}' has no group '{field}'; it has {has}")
    if isinstance(value, str):
        return value
    if not isinstance(value, int | float | np.number) or value % 1:
        raise ValueError(
            f"record '{pair.key}': expected group '{field}' to be a text or a whole number, got "
            f"{value!r:.80}"
        )
    return int(value)


def name_index(names: Sequence[str]) -> dict[str, int | None]:
    """Maps each plain class name to its index, or to None if several classes share the name.

    Names also occur without spaces, as in UCF-101's folders ("ApplyEyeMakeup").
    """
    index: dict[str, int | None] = {}
    joined: dict[str, int | None] = {}
    for i, name in enumerate(names):
        for found, key in ((index, _plain(name)), (joined, _plain(name).replace(" ", ""))):
            found[key] = None if key in found else i
    return joined | index


def derive_classes(raws: Sequence[RawLabel], templates: Sequence[str]) -> Classes:
    """Infers the classes from the data, when the user gave no names.

    Tries in this order: integer labels with their class names (or with one caption per label);
    names as labels; class names alone; captions, where each distinct one is a class. If all
    captions are made with one of `templates`, the prompt around the name is removed.

    Raises:
        ValueError: mixed labels, a label with several names, or captions that are not classes.
    """
    kinds = {type(raw.label): raw.key for raw in raws}
    if len(kinds) > 1:
        words: dict[type, str] = {int: "an integer", str: "a name", type(None): "none"}
        found = " and some ".join(f"{words[kind]} ('{key}')" for kind, key in kinds.items())
        raise ValueError(f"labels are mixed, some records have {found}; give all of them one kind")
    (kind,) = kinds
    if kind is str:
        texts, origin = [str(raw.label) for raw in raws], "names as labels"
    elif all(raw.class_name for raw in raws):
        texts, origin = [raw.class_name or "" for raw in raws], "class_name of the data"
    else:
        texts, origin = _strip_prompt([raw.caption for raw in raws], templates), "captions"
        # Free text is (almost) all distinct; a class without a second image is no class.
        if kind is not int and len(set(texts)) * 2 > len(raws):
            raise ValueError(
                f"record '{raws[0].key}' has neither 'label' nor 'class_name', and the captions "
                f"are no classes ({len(set(texts))} different ones for {len(raws)} images); add a "
                "label to the metadata, or use a retrieval task"
            )
    name_of: dict[int | str, str] = {}
    labels: list[int | str] = []
    for raw, text in zip(raws, texts, strict=True):
        label = raw.label if isinstance(raw.label, int) else text
        labels.append(label)
        if not text.strip():
            raise ValueError(f"record '{raw.key}': the label is blank; expected a class name")
        if name_of.setdefault(label, text) != text:
            raise ValueError(
                f"record '{raw.key}': label {label} goes with {name_of[label]!r} and {text!r}, so "
                "it does not name its class; give the class names (--class_names FILE)"
            )
    index = {label: number for number, label in enumerate(sorted(name_of))}
    names = tuple(name_of[label] for label in index)
    if origin != "captions":
        names = tuple(map(_spaced, names))
    elif kind is int:
        origin = "captions of the labels"
    return Classes(names, np.array([index[label] for label in labels], np.int32), origin)


def _strip_prompt(captions: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Strips the prompt from captions; returns them unchanged if no template fits all of them."""
    for template in templates:
        before, after = template.split(CLASS_SLOT)
        if (before or after) and all(
            caption.startswith(before)
            and caption.endswith(after)
            and len(caption) > len(before) + len(after)
            for caption in captions
        ):
            return [caption[len(before) : len(caption) - len(after)] for caption in captions]
    return list(captions)


def _plain(name: str) -> str:
    return " ".join(_spaced(name).casefold().split())


def _spaced(name: str) -> str:
    """Replaces "_" in names of folders and of TFDS by spaces.

    SUN397's names are paths: "/a/apse/indoor" becomes "apse indoor".
    """
    path = re.fullmatch("/[a-z]/(.+)", name)
    return (path[1].replace("/", " ") if path else name).replace("_", " ")
