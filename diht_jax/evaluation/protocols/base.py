"""Tasks and protocols: a protocol measures all tasks of one kind.

A file of this folder makes one `Protocol`, and `registry.PROTOCOLS` lists it under its kind. The
parsing of tasks, the results file and the tables take everything from that object. What a protocol
gives is data; `evaluation/page.py` makes pictures of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from diht_jax.evaluation import prompts
from diht_jax.evaluation.embedding.encoding import EncodedImages, Encoder
from diht_jax.evaluation.embedding.entries import Units
from diht_jax.evaluation.sources.registry import open_units

Unit = Literal["share", "score", "rank"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One evaluation: a source of data and how it is measured.

    Attributes:
        name: names the results; unique within a run.
        kind: of `registry.PROTOCOLS`.
        source: what `sources.registry.open_units` takes.
        source_options: its options, such as {"data_dir": ..., "image_column": ...}.
        class_names: one per integer label; None finds them in the data of a classification. For
            "vqa" the candidate answers.
        templates: prompts, each with one "{}" for the class name; for "entailment" one for each
            relation, with "{}" for the hypothesis.
        label_field: metadata field of the label, where it is not "label".
        caption_template: prompt with "{caption}" around a caption; None is the one that the model
            was trained with.
        options: of the protocol alone, by name; those that are not given are missing.
    """

    name: str
    kind: str
    source: str
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] = prompts.PLAIN_TEMPLATES
    label_field: str | None = None
    caption_template: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        prompts.check_templates(self.templates)
        if self.caption_template is not None:
            prompts.fill_caption_template(self.caption_template, "")

    @property
    def names(self) -> tuple[str, ...]:
        """The class names of a task that cannot be without them."""
        if self.class_names is None:
            raise ValueError(f"task '{self.name}': class_names: expected names")
        return self.class_names

    @property
    def prompt(self) -> str:
        """The caption template, once that of the model stands for None."""
        if self.caption_template is None:
            raise ValueError(f"task '{self.name}': caption_template: expected a text")
        return self.caption_template

    def open_units(self) -> Units:
        """The parts of the source; reads no image.

        Raises:
            ValueError: it cannot be read.
        """
        return open_units(self.source, self.source_options)


@dataclasses.dataclass(frozen=True)
class Metric:
    """Unit and label of a metric.

    Attributes:
        unit: "share" of 1, shown in percent; "score", a number of any size, shown as it is; "rank",
            counted from 1, of which less is better.
        label: what people call it; the name where None.
    """

    unit: Unit
    label: str | None = None

    @property
    def lower_is_better(self) -> bool:
        """True where a smaller value is the better one."""
        return self.unit == "rank"


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a task, such as "templates" in "cifar10?templates=a {}".

    Attributes:
        parse: makes its value from a text or from the value in a config; raises ValueError.
        field: of `Task`; None puts the value into `Task.options` under the option's name.
    """

    parse: Callable[[Any], Any]
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


CLASS_NAMES = Option(prompts.read_class_names, "class_names")
TEMPLATES = Option(prompts.parse_templates, "templates")
LABEL = Option(parse_text, "label_field")
CAPTION_TEMPLATE = Option(parse_text, "caption_template")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Result of a protocol on a task.

    Attributes:
        encoded: the images.
        num_items: number of independent items to resample, such as images.
        measure: the metrics if item i had been there `counts[i]` times, int [num_items]; with ones
            the result.
        protocol: for the results file, how it was measured (prompts, ties).
        counts: for the results file; "images" at the least.
        details: other entries of the results file.
        result: what `evaluation/page.py` draws examples of; None for no examples.
    """

    encoded: EncodedImages
    num_items: int
    measure: Callable[[np.ndarray], dict[str, float]]
    protocol: dict[str, Any]
    counts: dict[str, int]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: Any = None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of all items, each once."""
        return self.measure(np.ones(self.num_items, np.int64))


# Measures a task with an encoder of its source; what that lacks for the protocol is a ValueError.
Run = Callable[[Task, Encoder], Measured]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The parsing, checks, measurement and metrics of tasks of one kind.

    Attributes:
        run: measures a task.
        metrics: all that `run` may give, in the order of the tables.
        options: by the name that users type.
        defaults: values of `Task`'s fields where they differ from its own.
        check: raises ValueError where a task lacks what the protocol needs; the message is put
            behind the task's name.
        reader: of `sources.registry`, where the kind leaves no choice.
    """

    run: Run
    metrics: Mapping[str, Metric]
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check: Callable[[Task], None] = lambda task: None
    reader: str | None = None


def check_has_class_names(task: Task, what: str = "class names") -> None:
    """Raises ValueError where a task has no class names."""
    if not task.class_names:
        raise ValueError(
            f"a '{task.kind}' task needs {what}; add '?class_names=FILE' (or '&class_names=FILE' "
            "behind another option)"
        )
