"""What a task is, the built-in ones, and their text form on command lines and in configs.

Called by `tasks` and the command. Nothing is read here but files of class names; evaluating is
the work of `tasks`.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diht_jax.data.readers import tfds
from diht_jax.evaluation import prompts
from diht_jax.evaluation.protocols.answers import (
    ANSWER_TEMPLATE,
    ENTAILMENT_PROMPTS,
    check_answer_template,
)
from diht_jax.evaluation.sources import benchmark_folder, registry
from diht_jax.evaluation.suite import (
    BINARY,
    CLASSIFICATION,
    ENTAILMENT,
    MULTILABEL,
    NO_SOURCE,
    RETRIEVAL,
    SUITE,
    VQA,
    WINOGROUND,
    SuiteEntry,
)

KINDS = (CLASSIFICATION, RETRIEVAL, MULTILABEL, BINARY, WINOGROUND, ENTAILMENT, VQA)


@dataclasses.dataclass(frozen=True)
class Task:
    """One evaluation.

    Attributes:
        name: names the results; unique within a run.
        kind: of `KINDS`.
        source: what `sources.read_source` takes.
        source_options: its options, such as {"data_dir": ..., "image_column": ...}.
        class_names: one per integer label; None finds them in the data of a classification. For
            "vqa" the candidate answers.
        templates: prompts, each with one "{}" for the class name; for "entailment" one for each
            relation, with "{}" for the hypothesis.
        label_field: metadata field of the label, where it is not "label".
        caption_template: retrieval and Winoground: prompt with "{caption}".
        answer_template: "vqa": prompt with "{question}" and "{answer}".
    """

    name: str
    kind: str
    source: str
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] = prompts.PLAIN_TEMPLATES
    label_field: str | None = None
    caption_template: str = prompts.CAPTION_TEMPLATE
    answer_template: str = ANSWER_TEMPLATE

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"task '{self.name}': kind '{self.kind}' is none of {', '.join(KINDS)}"
            )
        prompts.check_templates(self.templates)
        prompts.fill_caption_template(self.caption_template, "")
        check_answer_template(self.answer_template)
        if self.kind in (MULTILABEL, BINARY, VQA) and not self.class_names:
            what = "candidate answers" if self.kind == VQA else "class names"
            raise ValueError(
                f"task '{self.name}': a '{self.kind}' task needs {what}; add "
                "'?class_names=FILE' (or '&class_names=FILE' behind another option)"
            )
        if self.kind == ENTAILMENT and len(self.templates) != len(ENTAILMENT_PROMPTS):
            raise ValueError(
                f"task '{self.name}': expected {len(ENTAILMENT_PROMPTS)} templates, for "
                f"{', '.join(ENTAILMENT_PROMPTS)}; got {list(self.templates)}"
            )


_OPTIONS = ("class_names", "templates", "label", "caption_template", "answer_template")
_SOURCE_OPTIONS = (
    "data_dir",
    "image_feature",
    "caption_feature",
    "image_column",
    "caption_column",
    "key_column",
    "image_root",
    "image_name",
)
_KIND_OF_FOLDER = {
    benchmark_folder.CLASSIFICATION: CLASSIFICATION,
    benchmark_folder.MULTILABEL: MULTILABEL,
    benchmark_folder.RETRIEVAL: RETRIEVAL,
}
# Which of the prompts a kind has; others are not passed on to it.
_WORDS = ("class_names", "templates", "caption_template", "answer_template")
_WORDS_OF_KIND = {
    CLASSIFICATION: ("class_names", "templates"),
    MULTILABEL: ("class_names", "templates"),
    BINARY: ("class_names", "templates"),
    RETRIEVAL: ("caption_template",),
    WINOGROUND: ("caption_template",),
    ENTAILMENT: ("templates",),
    VQA: ("class_names", "answer_template"),
}


def built_in_tasks() -> tuple[str, ...]:
    """Names that `parse_tasks` knows."""
    return tuple(SUITE)


def parse_tasks(texts: str | Sequence[str], **defaults: Any) -> list[Task]:
    """Tasks from their text form.

    Args:
        texts: each one of

            NAME                a built-in task, such as "cifar10"
            NAME=SOURCE         the same on another source, such as "cifar10=/data/test.tar"
            KIND:SOURCE         "retrieval:/data/a.tar", "classification:tfds:food101:validation"
            NAME=KIND:SOURCE    the same under a name of one's own
            clip_benchmark:DIR[:SPLIT], NAME=clip_benchmark:DIR
                                kind, class names and templates of a folder in that layout

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
    registry.check_source(task.source, task.source_options)


def _parse_task(text: str, defaults: dict[str, Any]) -> Task:
    # A "?" also stands in globs, so only "?word=" starts the options.
    body, *options = re.split(r"\?(?=\w+=)", text, maxsplit=1)
    words = {key: value for key, value in defaults.items() if key in _WORDS}
    given_source_options = {}
    for option in re.split(r"&(?=\w+=)", options[0]) if options else ():
        key, value = option.split("=", 1)
        if key in _SOURCE_OPTIONS:
            given_source_options[key] = value
        else:
            words.update(_parse_option(text, key, value))
    fields = _fields_of_body(text, body, words)
    if not fields["source"]:
        name = fields["name"]
        raise ValueError(
            f"task '{name}' has no source of its own, since it is not read from TFDS; it is "
            f"measured on {SUITE[name].split}. Give that as '{name}={SUITE[name].form}'"
        )
    source_options = {**fields.get("source_options", {}), **given_source_options}
    fields["source"] = _complete_source(fields["kind"], fields["source"], source_options)
    ignored = set(_WORDS) - set(_WORDS_OF_KIND[fields["kind"]])
    fields.update({key: value for key, value in words.items() if key not in ignored})
    return Task(**{**fields, "source_options": source_options})


def _fields_of_body(text: str, body: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """Of a task without its options."""
    named = re.match(r"([\w.-]+)=(.*)", body)
    name, body = named.groups() if named else (None, body)
    kind, _, source = body.partition(":")
    # "winoground" is a task as well as a kind.
    if kind in KINDS and body not in SUITE:
        if not source:
            raise ValueError(f"task '{text}': expected a source after '{kind}:'")
        fields = {"name": name or _name_of_source(source), "kind": kind, "source": source}
        if kind == ENTAILMENT:
            fields["templates"] = tuple(ENTAILMENT_PROMPTS.values())
        return fields
    if name in SUITE:
        return {"name": name, **_fields_of_entry(SUITE[name], body, words)}
    if kind == registry.BENCHMARK:
        name = name or _name_of_source(source)
        return {"name": name, "source": body, **_fields_of_folder(body)}
    if name is None and body in SUITE:
        return {"name": body, **_fields_of_entry(SUITE[body], SUITE[body].source, words)}
    raise ValueError(_unknown_task_message(text, name or body))


def _fields_of_entry(entry: SuiteEntry, source: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """Of a task by name; class names that it lacks are those of a CLIP_benchmark folder.

    What the user gives in `words` is not made: it may come with a package that is absent.
    """
    fields: dict[str, Any] = {"kind": entry.kind, "source": source}
    is_annotations = entry.source == NO_SOURCE and source.endswith((".json", ".jsonl"))
    if source == entry.source or is_annotations:
        fields["source_options"] = entry.source_options
    if source.startswith(f"{registry.BENCHMARK}:"):
        folder = _fields_of_folder(source)
        if folder["kind"] != entry.kind:
            raise ValueError(f"{source} is a '{folder['kind']}' set, not a '{entry.kind}' one")
        fields.update(folder, source_options={})
    make_class_names = entry.class_names
    if make_class_names is None and source.startswith(tfds.PREFIX):
        make_class_names = entry.tfds_class_names
    if make_class_names is not None and "class_names" not in words:
        fields["class_names"] = make_class_names()
    word = "answer_template" if entry.kind == VQA else "templates"
    if entry.templates is not None and word not in words:
        fields[word] = entry.templates()[0] if entry.kind == VQA else entry.templates()
    return fields


def _complete_source(kind: str, source: str, options: Mapping[str, str]) -> str:
    """Names the reader of an annotation file, where kind or options leave no choice."""
    prefix = source.partition(":")[0]
    if kind == WINOGROUND and prefix != registry.WINOGROUND:
        return f"{registry.WINOGROUND}:{source}"
    is_list = source.endswith(".json") or (source.endswith(".jsonl") and "image_name" in options)
    if is_list and prefix not in (registry.WINOGROUND, registry.ANNOTATIONS):
        return f"{registry.ANNOTATIONS}:{source}"
    return source


def _fields_of_folder(source: str) -> dict[str, Any]:
    """Kind and words of a CLIP_benchmark folder."""
    folder = registry.find_benchmark_folder(source)
    fields: dict[str, Any] = {"kind": _KIND_OF_FOLDER[folder.type]}
    if folder.type == benchmark_folder.RETRIEVAL:
        return fields
    if folder.class_names is not None:
        fields["class_names"] = folder.class_names
    if folder.templates is not None:
        fields["templates"] = folder.templates
    return fields


def _parse_option(text: str, key: str, value: str) -> dict[str, Any]:
    if key == "class_names":
        return {"class_names": prompts.read_class_names(value)}
    if key == "templates":
        return {"templates": prompts.parse_templates(value)}
    if key == "label":
        return {"label_field": value}
    if key in ("caption_template", "answer_template"):
        return {key: value}
    known = _OPTIONS + _SOURCE_OPTIONS
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(known)}"
    raise ValueError(f"task '{text}': unknown option '{key}'; {hint}")


def _unknown_task_message(text: str, name: str) -> str:
    nearest = difflib.get_close_matches(name, SUITE, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"built in: {', '.join(SUITE)}"
    return (
        f"unknown task '{text}'; {hint} For data of your own write 'classification:SOURCE' or "
        "'retrieval:SOURCE', or another kind of task: "
        f"{', '.join(kind for kind in KINDS if kind not in (CLASSIFICATION, RETRIEVAL))}"
    )


def _name_of_source(source: str) -> str:
    """ "/data/emoji.tar" -> "emoji", "tfds:food101:validation" -> "food101_validation"."""
    is_path = "/" in source or "." in source
    stem = pathlib.PurePath(source).name.split(".")[0] if is_path else source.removeprefix("tfds:")
    return re.sub(r"[^\w-]+", "_", stem).strip("_") or "task"
