"""Class names and prompt templates, and where to read them.

Words only: no model, no image.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from diht_jax.evaluation.sources.text_files import read_json, read_text

CLASS_SLOT = "{}"
CAPTION_SLOT = "{caption}"

_BENCHMARK_PREFIX = "clip_benchmark:"
_ALIASES = {"cifar10": "clip_benchmark:cifar10", "imagenet": "clip_benchmark:imagenet1k"}

PLAIN_TEMPLATES = ("a photo of a {}.",)
# The prompt of the official DiHT inference code for retrieval on COCO and Flickr30K.
CAPTION_TEMPLATE = "a photo of {caption}."


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple; none at all, or one without exactly one "{}", is a ValueError."""
    if not isinstance(templates, list | tuple) or not templates:
        raise ValueError(f"templates: expected a list of at least one template, got {templates!r}")
    for template in templates:
        if not isinstance(template, str) or template.count(CLASS_SLOT) != 1:
            raise ValueError(
                f"template {template!r}: expected '{CLASS_SLOT}' once, where the class name goes, "
                "such as 'a photo of a {}.'"
            )
    return tuple(templates)


def fill_template(template: str, class_name: str) -> str:
    """The template with the class name instead of "{}"; braces in the name stay."""
    return template.replace(CLASS_SLOT, class_name)


def fill_caption_template(template: str, caption: str) -> str:
    """The template with the caption instead of "{caption}"; braces in the caption stay.

    The caption goes in as it is (a full stop at its end is kept), as in the official code.

    Raises:
        ValueError: the template does not hold "{caption}" exactly once.
    """
    if template.count(CAPTION_SLOT) != 1:
        raise ValueError(
            f"caption template {template!r}: expected '{CAPTION_SLOT}' once, such as "
            f"'{CAPTION_TEMPLATE}', or '{CAPTION_SLOT}' alone for the plain caption"
        )
    return template.replace(CAPTION_SLOT, caption)


def parse_templates(value: str | Sequence[str]) -> tuple[str, ...]:
    """Templates as users give them.

    Args:
        value: "imagenet", "cifar10" or "clip_benchmark:NAME" for CLIP's, in the installed package
            clip_benchmark, "@FILE" for a file with one template a line, else templates with ";"
            between them; or a list of templates.

    Raises:
        ValueError: no such package, set or file, or a template without "{}".
    """
    if not isinstance(value, str):
        return check_templates(value)
    value = _ALIASES.get(value, value)
    if value.startswith(_BENCHMARK_PREFIX):
        name = value.removeprefix(_BENCHMARK_PREFIX)
        lines = _read_benchmark("en_zeroshot_classification_templates.json", name)
        return check_templates([line.replace("{c}", CLASS_SLOT) for line in lines])
    parts = read_text(value[1:]).splitlines() if value.startswith("@") else value.split(";")
    return check_templates([part.strip() for part in parts if part.strip()])


def read_class_names(value: str | Sequence[str]) -> tuple[str, ...]:
    """Class names as users give them; the position (from 0) is the integer label.

    Args:
        value: path of a text file with one name a line, or of a `.json` list; "imagenet" or
            "clip_benchmark:NAME" for those of an installed package; or a list of names.

    Raises:
        ValueError: no such file or package, a blank name, or no names.
    """
    if not isinstance(value, str | os.PathLike):
        return check_class_names(value, "class names")
    text = os.fspath(value)
    text = _ALIASES.get(text, text)
    if text.startswith(_BENCHMARK_PREFIX):
        names = _read_benchmark("en_classnames.json", text.removeprefix(_BENCHMARK_PREFIX))
        return check_class_names(names, text)
    if text.endswith(".json"):
        return check_class_names(read_json(text, list, "a JSON list of names"), text)
    return check_class_names(read_text(text).rstrip().splitlines(), text)


def check_class_names(names: Any, where: str) -> tuple[str, ...]:
    """The names without white space around them; a blank one, or none, is a ValueError."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: expected a list of names, got {names!r:.80}")
    names = tuple(name.strip() for name in names)
    if not names or "" in names:
        raise ValueError(
            f"{where}: expected one class name a line, "
            + (f"line {names.index('') + 1} is blank" if names else "the file is empty")
        )
    return names


def _read_benchmark(file: str, name: str) -> list[str]:
    """One entry of a data file of clip_benchmark; the package itself is not imported."""
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "these class names and templates come with clip-benchmark, which is not installed; run "
            "`pip install clip-benchmark`, or give class_names=FILE and templates=..."
        )
    path = pathlib.Path(spec.submodule_search_locations[0]) / "datasets" / file
    entries = read_json(str(path), dict, "a data file of clip-benchmark 1.6")
    if name not in entries:
        raise ValueError(f"{path} has no '{name}'; it has {', '.join(sorted(entries))}")
    return entries[name]
