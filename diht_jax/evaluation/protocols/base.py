"""Tasks, their prompts, and protocols; a protocol measures all tasks of one kind.

The modules of this folder define a `Protocol` per kind of task, listed in `registry.PROTOCOLS`. The
parsing of tasks, the results file and the tables get everything from that object. A protocol
returns data; `evaluation/page.py` renders it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from diht_jax.evaluation.embedding.encoding import EncodedImages, Encoder
from diht_jax.evaluation.embedding.entries import Units
from diht_jax.evaluation.sources.files import read_json, read_text
from diht_jax.evaluation.suite import BENCHMARK_PREFIX, CAPTION_SLOT

Unit = Literal["share", "score", "rank"]
CLASS_SLOT = "{}"
PLAIN_TEMPLATES = ("a photo of a {}.",)
# The prompt of the official DiHT inference code for retrieval on COCO and Flickr30K.
PHOTO_TEMPLATE = "a photo of {caption}."
_ALIASES = {"cifar10": "clip_benchmark:cifar10", "imagenet": "clip_benchmark:imagenet1k"}


@dataclasses.dataclass(frozen=True)
class Task:
    """One evaluation: a data source and how it is measured."""

    name: str  # name in the results; unique within a run
    kind: str  # a key of `registry.PROTOCOLS`
    source: str  # source for `sources.registry.open_units`, with its options
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Index -> name for integer labels; None infers them from the data of a classification. For
    # "vqa" these are the candidate answers.
    class_names: tuple[str, ...] | None = None
    # Prompts, each with one "{}" for the class name. For "entailment", one prompt per relation with
    # "{}" for the hypothesis.
    templates: tuple[str, ...] = PLAIN_TEMPLATES
    label: str | None = None  # metadata field of the label, if it is not "label"
    # Prompt with "{caption}" for the caption; None uses the one that the model was trained with.
    caption_template: str | None = None
    # Options of the protocol, by name; only those that were given.
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Opens a source that is not in `sources.registry`.
    open: Callable[[], Units] | None = None

    def __post_init__(self):
        check_templates(self.templates)
        fill_caption_template(self.prompt, "")

    @property
    def names(self) -> tuple[str, ...]:
        """The class names, for tasks that require them."""
        return self.class_names or ()

    @property
    def prompt(self) -> str:
        """The caption template; `evaluate_task` has replaced None by the model's."""
        return CAPTION_SLOT if self.caption_template is None else self.caption_template


class Metric(NamedTuple):
    """Unit and label of a metric."""

    # "share": a fraction of 1, shown in percent. "score": any number, shown as it is. "rank":
    # counted from 1; lower is better.
    unit: Unit
    label: str = ""  # display name; the metric's name if empty

    @property
    def lower_is_better(self) -> bool:
        """Whether smaller values are better."""
        return self.unit == "rank"


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Returns the templates as a tuple; ValueError if empty or if one has not exactly one "{}"."""
    if not isinstance(templates, list | tuple) or not templates:
        raise ValueError(f"templates: expected a list of at least one template, got {templates!r}")
    for template in templates:
        if not isinstance(template, str) or template.count(CLASS_SLOT) != 1:
            raise ValueError(
                f"template {template!r}: expected '{CLASS_SLOT}' once, where the class name goes, "
                "such as 'a photo of a {}.'"
            )
    return tuple(templates)


def parse_templates(value: str | Sequence[str]) -> tuple[str, ...]:
    """Parses templates in the forms that users write.

    Args:
        value: "imagenet", "cifar10" or "clip_benchmark:NAME" for CLIP's templates from the
            installed package clip_benchmark; "@FILE" for a file with one template per line; or
            templates separated by ";", or a list of them.

    Raises:
        ValueError: no such package, set or file, or a template without "{}".
    """
    if not isinstance(value, str):
        return check_templates(value)
    value = _ALIASES.get(value, value)
    if value.startswith(BENCHMARK_PREFIX):
        name = value.removeprefix(BENCHMARK_PREFIX)
        lines = _read_benchmark("en_zeroshot_classification_templates.json", name)
        return check_templates([line.replace("{c}", CLASS_SLOT) for line in lines])
    parts = read_text(value[1:]).splitlines() if value.startswith("@") else value.split(";")
    return check_templates([part.strip() for part in parts if part.strip()])


def fill_caption_template(template: str, caption: str) -> str:
    """Replaces "{caption}" in the template; braces in the caption are kept.

    The caption is inserted unchanged (a final full stop is kept), as in the official code. A
    template without exactly one "{caption}" is a ValueError.
    """
    if template.count(CAPTION_SLOT) != 1:
        raise ValueError(
            f"caption template {template!r}: expected '{CAPTION_SLOT}' once, such as "
            f"'{PHOTO_TEMPLATE}', or '{CAPTION_SLOT}' alone for the plain caption"
        )
    return template.replace(CAPTION_SLOT, caption)


def read_class_names(value: str | Sequence[str]) -> tuple[str, ...]:
    """Reads class names in the forms that users write; the index of a name is its integer label.

    Args:
        value: path of a text file with one name per line, or of a `.json` list; "imagenet" or
            "clip_benchmark:NAME" for the names in the installed package; or a list of names.

    Raises:
        ValueError: a missing file or package, a blank name, or no names.
    """
    if not isinstance(value, str | os.PathLike):
        return check_class_names(value, "class names")
    text = os.fspath(value)
    text = _ALIASES.get(text, text)
    if text.startswith(BENCHMARK_PREFIX):
        names = _read_benchmark("en_classnames.json", text.removeprefix(BENCHMARK_PREFIX))
        return check_class_names(names, text)
    if text.endswith(".json"):
        return check_class_names(read_json(text, list, "a JSON list of names"), text)
    return check_class_names(read_text(text).rstrip().splitlines(), text)


def check_class_names(names: Any, where: str) -> tuple[str, ...]:
    """Returns the names, stripped; a blank name, or none at all, is a ValueError."""
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
    """Reads an entry of a data file of clip_benchmark, without importing the package."""
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


# Parses an option of a task, such as "templates" in "cifar10?templates=a {}", from a text or from a
# config value; raises ValueError.
Parser = Callable[[Any], Any]


def parse_text(value: Any) -> str:
    """Returns the value; raises ValueError if it is not a text."""
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {type(value).__name__} {value!r:.80}")
    return value


def choice(name: str, *values: str) -> Parser:
    """Returns the parser of an option called `name` with a fixed set of values."""

    def parse(value: Any) -> str:
        if str(value) not in values:
            raise ValueError(f"{name}={value}: expected {' or '.join(values)}")
        return str(value)

    return parse


@dataclasses.dataclass(frozen=True)
class Measured:
    """Result of running a protocol on a task."""

    encoded: EncodedImages  # the images
    num_items: int  # number of independent items for resampling, such as images
    # Computes the metrics with item i counted `counts[i]` times, int [num_items].
    measure: Callable[[np.ndarray], dict[str, float]]
    protocol: dict[str, Any]  # for the results file: how it was measured (prompts, ties)
    counts: dict[str, int]  # for the results file; has at least "images"
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # more of its entries
    result: Any = None  # data for the examples of `evaluation/page.py`; None for no examples

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics with every item counted once."""
        return self.measure(np.ones(self.num_items, np.int64))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Parsing, checks, measurement and metrics of the tasks of one kind."""

    # Measures a task with an encoder of its source; raises ValueError if the source lacks data.
    run: Callable[[Task, Encoder], Measured]
    metrics: Mapping[str, Metric]  # all metrics that `run` may return, in table order
    # Options by the name that users type: a field of `Task`, or else a key of `Task.options`.
    options: Mapping[str, Parser] = dataclasses.field(default_factory=dict)
    # Defaults of `Task` fields that differ from those of the class.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Raises ValueError if a task lacks what the protocol needs; callers prepend the name of
    # the task.
    check: Callable[[Task], None] | None = None
    reader: str | None = None  # a key of `sources.registry`, if the kind implies the reader


def check_has_class_names(task: Task, what: str = "class names") -> None:
    """Raises ValueError if a task has no class names."""
    if not task.class_names:
        raise ValueError(
            f"a '{task.kind}' task needs {what}; add '?class_names=FILE' (or '&class_names=FILE' "
            "behind another option)"
        )
