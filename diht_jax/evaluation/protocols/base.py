"""Tasks, the words of their prompts, and protocols: a protocol measures all tasks of one kind.

The files of this folder make a `Protocol` for each kind of task, which `registry.PROTOCOLS` lists.
The parsing of tasks, the results file and the tables take everything from that object. What a
protocol gives is data; `evaluation/page.py` makes pictures of it.
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
    """One evaluation: a source of data and how it is measured."""

    name: str  # of the results; unique within a run
    kind: str  # of `registry.PROTOCOLS`
    source: str  # what `sources.registry.open_units` takes, with its options
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # One per integer label; None finds them in the data of a classification. For "vqa" the
    # candidate answers.
    class_names: tuple[str, ...] | None = None
    # Prompts, each with one "{}" for the class name; for "entailment" one for each relation, with
    # "{}" for the hypothesis.
    templates: tuple[str, ...] = PLAIN_TEMPLATES
    label_field: str | None = None  # metadata field of the label, where it is not "label"
    # Prompt with "{caption}" around a caption; None is the one that the model was trained with.
    caption_template: str | None = None
    # Of the protocol alone, by name; those that are not given are missing.
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Opens the source, where it is none of `sources.registry`.
    open: Callable[[], Units] | None = None

    def __post_init__(self):
        check_templates(self.templates)
        fill_caption_template(self.prompt, "")

    @property
    def names(self) -> tuple[str, ...]:
        """The class names of a task that cannot be without them."""
        return self.class_names or ()

    @property
    def prompt(self) -> str:
        """The caption template; `evaluate_task` has put that of the model in place of None."""
        return CAPTION_SLOT if self.caption_template is None else self.caption_template


class Metric(NamedTuple):
    """Unit and label of a metric."""

    # "share" of 1, shown in percent; "score", a number of any size, shown as it is; "rank", counted
    # from 1, of which less is better.
    unit: Unit
    label: str = ""  # what people call it; the name where empty

    @property
    def lower_is_better(self) -> bool:
        """True where a smaller value is the better one."""
        return self.unit == "rank"


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
    if value.startswith(BENCHMARK_PREFIX):
        name = value.removeprefix(BENCHMARK_PREFIX)
        lines = _read_benchmark("en_zeroshot_classification_templates.json", name)
        return check_templates([line.replace("{c}", CLASS_SLOT) for line in lines])
    parts = read_text(value[1:]).splitlines() if value.startswith("@") else value.split(";")
    return check_templates([part.strip() for part in parts if part.strip()])


def fill_caption_template(template: str, caption: str) -> str:
    """The template with the caption instead of "{caption}"; braces in the caption stay.

    The caption goes in as it is (a full stop at its end is kept), as in the official code. A
    template that does not hold "{caption}" exactly once is a ValueError.
    """
    if template.count(CAPTION_SLOT) != 1:
        raise ValueError(
            f"caption template {template!r}: expected '{CAPTION_SLOT}' once, such as "
            f"'{PHOTO_TEMPLATE}', or '{CAPTION_SLOT}' alone for the plain caption"
        )
    return template.replace(CAPTION_SLOT, caption)


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
    if text.startswith(BENCHMARK_PREFIX):
        names = _read_benchmark("en_classnames.json", text.removeprefix(BENCHMARK_PREFIX))
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


class Option(NamedTuple):
    """An option of a task, such as "templates" in "cifar10?templates=a {}"."""

    # Makes its value from a text or from the value in a config; raises ValueError.
    parse: Callable[[Any], Any]
    # Of `Task`; None puts the value into `Task.options` under the option's name.
    field: str | None = None


def parse_text(value: Any) -> str:
    """The value, which must be a text."""
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {type(value).__name__} {value!r:.80}")
    return value


def choice(name: str, *values: str) -> Option:
    """An option called `name` that has one of a few values."""

    def parse(value: Any) -> str:
        if str(value) not in values:
            raise ValueError(f"{name}={value}: expected {' or '.join(values)}")
        return str(value)

    return Option(parse)


CLASS_NAMES = Option(read_class_names, "class_names")
TEMPLATES = Option(parse_templates, "templates")
LABEL = Option(parse_text, "label_field")
CAPTION_TEMPLATE = Option(parse_text, "caption_template")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Result of a protocol on a task."""

    encoded: EncodedImages  # the images
    num_items: int  # independent items to resample, such as images
    # The metrics if item i had been there `counts[i]` times, int [num_items].
    measure: Callable[[np.ndarray], dict[str, float]]
    protocol: dict[str, Any]  # for the results file, how it was measured (prompts, ties)
    counts: dict[str, int]  # for the results file; "images" at the least
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # its other entries
    result: Any = None  # what `evaluation/page.py` draws examples of; None for no examples

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of all items, each once."""
        return self.measure(np.ones(self.num_items, np.int64))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The parsing, checks, measurement and metrics of tasks of one kind."""

    # Measures a task with an encoder of its source; what that lacks is a ValueError.
    run: Callable[[Task, Encoder], Measured]
    metrics: Mapping[str, Metric]  # all that `run` may give, in the order of the tables
    # By the name that users type.
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    # Values of `Task`'s fields where they differ from its own.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Raises ValueError where a task lacks what the protocol needs; the task's name is put before
    # the message.
    check: Callable[[Task], None] | None = None
    reader: str | None = None  # of `sources.registry`, where the kind leaves no choice


def check_has_class_names(task: Task, what: str = "class names") -> None:
    """Raises ValueError where a task has no class names."""
    if not task.class_names:
        raise ValueError(
            f"a '{task.kind}' task needs {what}; add '?class_names=FILE' (or '&class_names=FILE' "
            "behind another option)"
        )
