"""Parses tasks from user input: a text on a command line, or a section of a config.

Both forms are first read into a `_Request` and then handled by the same code, which gives them the
same meaning. Apart from files of class names, no data is read here.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from diht_jax.config.checks import nearest_name, suggest
from diht_jax.evaluation.embedding.entries import Units
from diht_jax.evaluation.protocols.base import (
    Protocol,
    Task,
    parse_templates,
    parse_text,
    read_class_names,
)
from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.sources import registry
from diht_jax.evaluation.suite import (
    BENCHMARK_PREFIX,
    CLASSIFICATION,
    DATACOMP,
    MULTILABEL,
    NO_SOURCE,
    RETRIEVAL,
    TASKS_BY_NAME,
    SuiteEntry,
    datacomp_folder,
)
from diht_jax.readers import tfds
from diht_jax.readers.registry import name_options, option_defaults
from diht_jax.storage.files import exists, join

# Reader options with text values, and the options of the benchmark layouts.
_READER_OPTIONS = option_defaults()
SOURCE_OPTIONS = tuple(
    name
    for name in dict.fromkeys([*_READER_OPTIONS, *registry.OPTIONS])
    if name not in _READER_OPTIONS or isinstance(_READER_OPTIONS[name].default, str | None)
)
# Options that DataComp's measurement needs where the defaults of a task differ.
_DATACOMP_OPTIONS = {RETRIEVAL: "?caption_template={caption}", MULTILABEL: "?interpolation=all"}
_DATACOMP = "datacomp:"
_TASK_FIELDS = {field.name for field in dataclasses.fields(Task)}


def parse_tasks(texts: str | Sequence[str], **defaults: Any) -> list[Task]:
    """Parses tasks from their text form.

    Args:
        texts: one or more of these forms:

            NAME                a built-in task, such as "cifar10"
            NAME=SOURCE         a built-in task on another source: "cifar10=/data/test.tar"
            KIND:SOURCE         "retrieval:/data/a.tar", "classification:tfds:food101:validation"
            NAME=KIND:SOURCE    the same with a name of your choice
            clip_benchmark:DIR[:SPLIT], NAME=clip_benchmark:DIR
                                kind, class names and templates come from the folder
            datacomp:DIR        the tasks whose folders DataComp's download script wrote to DIR

            Options follow the source: "?templates=a {};the {}", "?class_names=FILE",
            "?label=FIELD", "?caption_template={caption}", or an option of the source, such as
            "?data_dir=DIR". Further options are joined with "&".
        **defaults: `class_names`, `templates` or `caption_template` as in `Task`, for each task
            whose protocol has that option and that does not set it.

    Returns:
        One task per text, in order; "datacomp:DIR" may yield several.

    Raises:
        ValueError: an unknown task, kind or option (suggests the nearest), a duplicate name, a
            built-in task without a source, default class names for several classifications.
    """
    whole: list[str] = []
    for text in map(str.strip, [texts] if isinstance(texts, str) else texts):
        if whole and text.isdecimal():  # "?splits=1,2,3", which was split at its commas
            whole[-1] += f",{text}"
        elif text.startswith(_DATACOMP):
            whole += expand_datacomp(text)
        elif text:
            whole.append(text)
    tasks: dict[str, Task] = {}
    for text in whole:
        task = _make_task(_read_text(text), defaults)
        if task.name in tasks:
            raise ValueError(
                f"two tasks are called '{task.name}'; name one of them, such as "
                f"'other={task.kind}:{task.source}'"
            )
        tasks[task.name] = task
    if "class_names" in defaults:
        classifications = [name for name, task in tasks.items() if task.kind == CLASSIFICATION]
        if len(classifications) > 1:
            raise ValueError(
                f"one file of class names for {len(classifications)} tasks ({classifications}); "
                "give each its own, such as 'classification:SOURCE?class_names=FILE'"
            )
    return list(tasks.values())


def parse_config_tasks(tasks: str | Mapping[str, Any] | None) -> list[Task]:
    """Parses the tasks of `config.evaluation.tasks`.

    Args:
        tasks: comma-separated texts for `parse_tasks`; or a mapping from name to section, which
            has `kind`, `source`, and the options of both. A section named after a built-in task
            needs no kind, and no source if that task has one. A section with a source
            "clip_benchmark:DIR" needs no kind. A key set to None counts as not set.

    Returns:
        One task per text, in order; or one per section, in the order of a ConfigDict, by name.

    Raises:
        ValueError: as `parse_tasks`; the message begins with the key, such as
            "config.evaluation.tasks.cifar.templates".
    """
    if tasks is None or isinstance(tasks, str):
        return parse_tasks((tasks or "").split(","))
    return [_make_task(_read_section(name, section), {}) for name, section in tasks.items()]


def open_source(task: Task) -> Units:
    """Opens the source of a task as units; reads no image.

    Errors name options as in a task, such as "?image_column=".
    """
    try:
        return task.open() if task.open else registry.open_units(task.source, task.source_options)
    except ValueError as error:
        message = f"task '{task.name}': {name_options(str(error), '?{}=')}"
        raise ValueError(message) from error


def check_task(task: Task) -> Protocol:
    """Returns the protocol of a task; raises ValueError if the task lacks what it needs."""
    protocol = PROTOCOLS[task.kind]
    try:
        if protocol.check is not None:
            protocol.check(task)
    except ValueError as error:
        raise ValueError(f"task '{task.name}': {error}") from error
    return protocol


def expand_datacomp(text: str) -> list[str]:
    """Returns the texts for `parse_tasks` of all existing task folders of a "datacomp:DIR"."""
    root = text.removeprefix(_DATACOMP)
    texts, missing = [], []
    for theirs, ours in DATACOMP.items():
        kind, folder = TASKS_BY_NAME[ours].kind, join(root, datacomp_folder(theirs))
        source = f"{BENCHMARK_PREFIX}{folder}{_DATACOMP_OPTIONS.get(kind, '')}"
        needed = join(folder, "test", "nshards.txt")
        if kind == "winogavil":
            source = needed = f"{folder}/winogavil_dataset.csv"
        if exists(needed):
            texts.append(f"{ours}={source}")
        else:
            missing.append(datacomp_folder(theirs))
    if not texts:
        raise ValueError(
            f"task '{text}': none of DataComp's folders is in '{root}', such as {missing[0]}; "
            "expected what its download_evalsets.py writes (options belong to single tasks)"
        )
    if missing:
        logging.warning("%s: %d folders are missing: %s", text, len(missing), ", ".join(missing))
    return texts


class _Request(NamedTuple):
    """One task as a user writes it, before any lookup.

    Without a kind it is the built-in task of that name. Options are keyed by the name that the user
    types; their values are texts or config values.
    """

    where: str  # prefix of messages: "task 'cifar10?label=x'", "config.evaluation.tasks.cifar"
    name: str
    kind: str | None
    source: str
    options: Mapping[str, Any]
    is_text: bool = True

    def error(self, message: str, option: str | None = None) -> ValueError:
        """Returns an error whose message names the task and option at fault."""
        key = f".{option}" if option and not self.is_text else ""
        return ValueError(f"{self.where}{key}: {message}")


def _read_text(text: str) -> _Request:
    where = f"task '{text}'"
    # "?" also occurs in globs, so only "?word=" starts the options.
    body, *behind = re.split(r"\?(?=\w+=)", text, maxsplit=1)
    options = dict(re.findall(r"(?s)(\w+)=(.*?)(?=&\w+=|\Z)", "".join(behind)))
    named = re.match(r"([\w.-]+)=(.*)", body)
    name, body = named.groups() if named else (None, body)
    kind, _, source = body.partition(":")
    # "winoground" is both a task and a kind.
    if kind in PROTOCOLS and body not in TASKS_BY_NAME:
        if not source:
            raise ValueError(f"{where}: expected a source after '{kind}:'")
        return _Request(where, name or _name_of_source(source), kind, source, options)
    if name in TASKS_BY_NAME:
        return _Request(where, name, None, body, options)
    if kind == registry.BENCHMARK:  # the folder states its kind
        kind = registry.words_of_source(body, {})["kind"]
        return _Request(where, name or _name_of_source(source), kind, body, options)
    if name is None and body in TASKS_BY_NAME:
        return _Request(where, body, None, TASKS_BY_NAME[body].source, options)
    typed, kinds = kind if source else name or body, [*PROTOCOLS, registry.BENCHMARK]
    known = kinds if source else [*TASKS_BY_NAME, *kinds]
    nearest = nearest_name(typed, known)
    raise ValueError(
        f"unknown task '{text}'; "
        + (f"did you mean '{nearest}'? Or " if nearest else "")
        + f"for data of your own write KIND:SOURCE, KIND one of {', '.join(PROTOCOLS)}. Tasks by "
        f"name: {', '.join(TASKS_BY_NAME)}"
    )


def _read_section(name: str, section: Any) -> _Request:
    where = f"config.evaluation.tasks.{name}"
    if not hasattr(section, "items"):
        raise ValueError(
            f"{where}: expected a section such as dict(kind='retrieval', source='/data/a.tar'), "
            f"got {type(section).__name__} {section!r:.80}"
        )
    options = {key: value for key, value in section.items() if value is not None}
    kind = options.pop("kind", None)
    entry = TASKS_BY_NAME.get(name) if kind is None else None
    source = options.pop("source", entry.source if entry else "")
    request = _Request(where, name, kind, source, options, is_text=False)
    if not isinstance(source, str):
        raise request.error(f"expected a text, got {source!r:.80}", "source")
    if kind is not None and kind not in PROTOCOLS:
        raise request.error(f"unknown kind '{kind}'; {suggest(str(kind), PROTOCOLS)}", "kind")
    is_folder = source.startswith(BENCHMARK_PREFIX)
    if kind is None and entry is None and not is_folder:
        raise request.error(
            f"expected one of {', '.join(PROTOCOLS)}; no task '{name}' is built in that would "
            f"need none ({suggest(name, TASKS_BY_NAME)})",
            "kind",
        )
    if entry is None and not source:
        raise request.error("expected a source, such as '/data/a.tar'", "source")
    if re.search(r"\?\w+=", source):
        raise request.error(f"'{source:.200}': give the options behind '?' as keys", "source")
    if kind is None and entry is None:
        return request._replace(kind=registry.words_of_source(source, {})["kind"])
    return request


def _make_task(request: _Request, defaults: Mapping[str, Any]) -> Task:
    name, source = request.name, request.source
    entry = TASKS_BY_NAME[name] if request.kind is None else None
    if entry is not None and not source:
        folder = datacomp_folder(entry.datacomp)
        form = entry.form or f"clip_benchmark:DIR, DIR being {folder} in CLIP_benchmark's layout"
        raise ValueError(
            f"task '{name}' has no source of its own, since it is not read from TFDS; it is "
            f"measured on {entry.split}. Give that as "
            + (f"'{name}={form}'" if request.is_text else form)
        )
    kind = str(request.kind) if entry is None else entry.kind
    protocol = PROTOCOLS[kind]
    given, source_options = _parse_options(request, kind)
    for option in protocol.options.keys() & defaults.keys():
        given.setdefault(option, defaults[option])
    is_folder = source.startswith(BENCHMARK_PREFIX)
    fields: dict[str, Any] = dict(protocol.defaults)
    words: dict[str, Any] = {}
    if entry is not None:
        source_options = _source_options_of_entry(entry, source) | source_options
    prefix = source.partition(":")[0]
    if prefix in registry.LAYOUTS and (entry or is_folder or "class_names" not in given):
        words = registry.words_of_source(source, source_options)
        found = words.pop("kind", kind)
        if entry is not None and found != kind:
            raise ValueError(f"{source} is a '{found}' set, not a '{kind}' one")
    fields |= words
    if entry is not None:
        # In CLIP_benchmark's layout the labels index the folder's own class names.
        fields |= _fields_of_entry(entry, source, (words if is_folder else {}) | given)
    fields |= given
    own = {}
    for key in _TASK_FIELDS & fields.keys():
        own[key] = fields.pop(key)
    # Kinds or options that only an annotation file can satisfy name its reader.
    reader = protocol.reader
    by_name = source.endswith(".jsonl") and "image_name" in source_options
    if reader is None and (by_name or source.endswith(".json")) and prefix not in registry.LAYOUTS:
        reader = registry.ANNOTATIONS
    if reader not in (None, prefix):
        source = f"{reader}:{source}"
    try:
        task = Task(name, kind, source, source_options, **own, options=fields)
        check_task(task)
    except ValueError as error:
        raise error if request.is_text else request.error(str(error)) from error
    return task


def _parse_options(request: _Request, kind: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Splits options into fields of `Task` (or its protocol options) and options of the source."""
    given, source_options = {}, {}
    options = PROTOCOLS[kind].options
    for name, value in request.options.items():
        try:
            if name in SOURCE_OPTIONS:
                source_options[name] = parse_text(value)
            elif name in options:
                given[name] = options[name](value)
            else:
                hint = suggest(name, (*options, *SOURCE_OPTIONS))
                raise ValueError(f"a '{kind}' task has no option '{name}'; {hint}")
        except (TypeError, ValueError) as error:
            raise request.error(str(error), name) from error
    return given, source_options


def _source_options_of_entry(entry: SuiteEntry, source: str) -> dict[str, str]:
    """Returns the options of a named task that apply to its default source, form or layout."""
    prefix = source.partition(":")[0]
    if prefix in registry.LAYOUTS:
        known = registry.LAYOUTS[prefix].options
        return {name: value for name, value in entry.source_options.items() if name in known}
    is_annotations = entry.source == NO_SOURCE and source.endswith((".json", ".jsonl"))
    return dict(entry.source_options) if source == entry.source or is_annotations else {}


def _fields_of_entry(entry: SuiteEntry, source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `Task` fields of a named task, except those that the user gives.

    Given fields are not computed, because they may need a package that is not installed.
    """
    fields: dict[str, Any] = dict(entry.options)
    names = entry.class_names
    if names is None and source.startswith(tfds.PREFIX):
        names = entry.tfds_class_names
    if names is not None and "class_names" not in given:
        fields["class_names"] = read_class_names(names)
    if entry.templates is not None and "templates" not in given:
        fields["templates"] = parse_templates(entry.templates)
    return fields


def _name_of_source(source: str) -> str:
    """Returns a task name for a source: "emoji" for "/data/emoji.tar", "food101_test" for TFDS."""
    is_path = "/" in source or "." in source
    stem = pathlib.PurePath(source).name.split(".")[0] if is_path else source.removeprefix("tfds:")
    return re.sub(r"[^\w-]+", "_", stem).strip("_") or "task"
