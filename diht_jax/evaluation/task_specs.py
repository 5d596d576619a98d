"""What a task is, the built-in ones, and their text form on command lines and in configs.

Called by `tasks` and the command. Nothing is read here but files of class names; evaluating is
the work of `tasks`.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diht_jax.data.readers import list_shards
from diht_jax.evaluation import prompts

CLASSIFICATION = "classification"
RETRIEVAL = "retrieval"
KINDS = (CLASSIFICATION, RETRIEVAL)


@dataclasses.dataclass(frozen=True)
class Task:
    """One evaluation.

    Attributes:
        name: names the results; unique within a run.
        kind: "classification" or "retrieval".
        source: what `diht_jax.data.readers.open_source` takes.
        source_options: its options, such as {"data_dir": ..., "image_column": ...}.
        class_names: classification: one per integer label; None finds them in the data.
        templates: classification: prompts, each with one "{}".
        label_field: classification: metadata field of the label, where it is not "label".
        caption_template: retrieval: prompt with "{caption}".
    """

    name: str
    kind: str
    source: str
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] = prompts.PLAIN_TEMPLATES
    label_field: str | None = None
    caption_template: str = prompts.CAPTION_TEMPLATE

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"task '{self.name}': kind '{self.kind}' is neither '{CLASSIFICATION}' nor "
                f"'{RETRIEVAL}'"
            )
        prompts.check_templates(self.templates)
        prompts.fill_caption_template(self.caption_template, "")


def _imagenet() -> Task:
    names, templates = prompts.imagenet_prompts()
    return Task(
        "imagenet",
        CLASSIFICATION,
        "tfds:imagenet2012:validation",
        class_names=names,
        templates=templates,
    )


# TFDS has no Flickr30k, so that task needs a source ("flickr30k_retrieval=PATH").
_NO_SOURCE = ""
_BUILT_IN: dict[str, Callable[[], Task]] = {
    "cifar10": lambda: Task(
        "cifar10",
        CLASSIFICATION,
        "tfds:cifar10:test",
        class_names=prompts.CIFAR10_CLASSES,
        templates=prompts.CIFAR10_TEMPLATES,
    ),
    "imagenet": _imagenet,
    # The 5,000 images of Karpathy and Li's test split.
    "coco_retrieval": lambda: Task(
        "coco_retrieval",
        RETRIEVAL,
        "tfds:coco_captions:test",
        source_options={"caption_feature": "captions/text"},
    ),
    "flickr30k_retrieval": lambda: Task("flickr30k_retrieval", RETRIEVAL, _NO_SOURCE),
}

_OPTIONS = ("class_names", "templates", "label", "caption_template")
_SOURCE_OPTIONS = (
    "data_dir",
    "image_feature",
    "caption_feature",
    "image_column",
    "caption_column",
    "key_column",
    "image_root",
)


def built_in_tasks() -> tuple[str, ...]:
    """Names that `parse_tasks` knows."""
    return tuple(_BUILT_IN)


def parse_tasks(texts: str | Sequence[str], **defaults: Any) -> list[Task]:
    """Tasks from their text form.

    Args:
        texts: each one of

            NAME                a built-in task, such as "cifar10"
            NAME=SOURCE         the same on another source, such as "cifar10=/data/test.tar"
            KIND:SOURCE         "retrieval:/data/a.tar", "classification:tfds:food101:validation"
            NAME=KIND:SOURCE    the same under a name of one's own

            and after each of them options: "?templates=a {};the {}", "?class_names=FILE",
            "?label=FIELD", "?caption_template={caption}", or one of the source, such as
            "?data_dir=DIR"; more with "&" between them.
        **defaults: `class_names`, `templates` or `caption_template` as in `Task`, for all tasks
            that have no such option.

    Returns:
        One task per text, in order.

    Raises:
        ValueError: an unknown task, kind or option (names the nearest), a name used twice, a
            built-in task without a source, default class names for several classifications.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    tasks = [_parse_task(text.strip(), defaults) for text in texts if text.strip()]
    classifications = [task.name for task in tasks if task.kind == CLASSIFICATION]
    if "class_names" in defaults and len(classifications) > 1:
        raise ValueError(
            f"one file of class names for {len(classifications)} tasks ({classifications}); give "
            "each its own, such as 'classification:SOURCE?class_names=FILE'"
        )
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise ValueError(
                f"two tasks are called '{task.name}'; name one of them, such as "
                f"'other={task.kind}:{task.source}'"
            )
        seen.add(task.name)
    return tasks


def check_source(task: Task) -> None:
    """Raises ValueError when there is nothing to read for a task; reads no image."""
    list_shards(task.source, **task.source_options)


def _parse_task(text: str, defaults: dict[str, Any]) -> Task:
    # A "?" also stands in globs, so only "?word=" starts the options.
    body, *options = re.split(r"\?(?=\w+=)", text, maxsplit=1)
    named = re.match(r"([\w.-]+)=(.*)", body)
    name, body = named.groups() if named else (None, body)
    kind, _, source = body.partition(":")
    if kind in KINDS:
        if not source:
            raise ValueError(f"task '{text}': expected a source after '{kind}:'")
        task = Task(name or _name_of_source(source), kind, source)
    elif name in _BUILT_IN:
        task = dataclasses.replace(_BUILT_IN[name](), source=body, source_options={})
    elif name is None and body in _BUILT_IN:
        task = _BUILT_IN[body]()
    else:
        raise ValueError(_unknown_task_message(text, name or body))
    if not task.source:
        raise ValueError(
            f"task '{task.name}' has no source of its own (TFDS lacks it); give one, such as "
            f"'{task.name}=/data/{task.name}.tar'"
        )
    changes = dict(defaults)
    source_options = dict(task.source_options)
    for option in re.split(r"&(?=\w+=)", options[0]) if options else ():
        key, value = option.split("=", 1)
        if key in _SOURCE_OPTIONS:
            source_options[key] = value
        else:
            changes.update(_parse_option(text, key, value))
    changes["source_options"] = source_options
    irrelevant = (
        {"caption_template"} if task.kind == CLASSIFICATION else {"class_names", "templates"}
    )
    changes = {key: value for key, value in changes.items() if key not in irrelevant}
    return dataclasses.replace(task, **changes)


def _parse_option(text: str, key: str, value: str) -> dict[str, Any]:
    if key == "class_names":
        return {"class_names": prompts.read_class_names(value)}
    if key == "templates":
        return {"templates": prompts.parse_templates(value)}
    if key == "label":
        return {"label_field": value}
    if key == "caption_template":
        return {"caption_template": value}
    known = _OPTIONS + _SOURCE_OPTIONS
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(known)}"
    raise ValueError(f"task '{text}': unknown option '{key}'; {hint}")


def _unknown_task_message(text: str, name: str) -> str:
    nearest = difflib.get_close_matches(name, _BUILT_IN, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"built in: {', '.join(_BUILT_IN)}"
    return (
        f"unknown task '{text}'; {hint} For data of your own write 'classification:SOURCE' or "
        "'retrieval:SOURCE'"
    )


def _name_of_source(source: str) -> str:
    """ "/data/emoji.tar" -> "emoji", "tfds:food101:validation" -> "food101_validation"."""
    is_path = "/" in source or "." in source
    stem = pathlib.PurePath(source).name.split(".")[0] if is_path else source.removeprefix("tfds:")
    return re.sub(r"[^\w-]+", "_", stem).strip("_") or "task"
