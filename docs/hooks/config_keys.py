"""Formats all keys of a config: type, range, default, and the comment in the code.

The keys come from `default_config`. Their meanings come from the comments next to them in the code
(or, for the fields of a dataclass, from its docstring), so each meaning is written only once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import ml_collections

from data_prep.duplicates import config as duplicates_config
from data_prep.filtering import config as filter_config
from data_prep.labelling import config as label_config
from diht_jax.command_line.help_text import read_comments
from diht_jax.config.checks import PathsOrSections, TextOrSections, walk
from diht_jax.config.keys import Key
from diht_jax.training import recipe

# Title, command, and the module with `default_config` and `COMMENT_FILES`.
_COMMANDS: dict[str, tuple[str, str, ModuleType]] = {
    "train": ("Keys of a recipe", "diht_jax.train", recipe),
    "filter": ("Keys of the filter", "data_prep.filter", filter_config),
    "label": ("Keys of the labels", "data_prep.label", label_config),
    "duplicates": ("Keys of duplicates", "data_prep.duplicates", duplicates_config),
}
_RESUME = {"fixed": "", "end": "a resumed run may set another end", "free": "free on resume"}


def format_pages() -> dict[str, str]:
    """Returns the pages as Markdown by name, such as "train"."""
    return {name: _format_page(name) for name in _COMMANDS}


def _format_page(command: str) -> str:
    title, command_name, module = _COMMANDS[command]
    keys = recipe.all_keys() if command == "train" else {}
    comments = read_comments(module.COMMENT_FILES)
    sections: dict[str, list[str]] = {}
    for name, (value, kind) in walk(module.default_config()).items():
        if isinstance(value, ml_collections.ConfigDict) and not issubclass(kind, TextOrSections):
            continue  # a section; its keys follow
        facts = [_format_type(kind, keys.get(name)), f"default {_format_default(value)}"]
        if isinstance(key := keys.get(name), Key) and command == "train":
            facts.append(_RESUME[key.resume])
        meaning = _link_pages(_as_sentence(comments.get(name, "")))
        lines = [f"`{name}`", f":   {meaning}  "]
        lines += [f"    *{'; '.join(filter(None, facts))}*", ""]
        sections.setdefault(name.rpartition(".")[0], []).extend(lines)
    parts = [
        f"# {title}\n",
        f"`--config.KEY=VALUE` of `python -m {command_name}` sets a key. This page is made from "
        "the code. A default of `None` means that the key is not set.\n",
    ]
    for section, lines in sorted(sections.items()):
        parts += [f"## {section or 'Top level'}\n", *lines]
    return "\n".join(parts)


def _format_type(kind: Any, key: Any) -> str:
    names: Mapping[Any, str] = {
        PathsOrSections: "paths, or sections",
        TextOrSections: "text, or sections",
        str: "text",
        tuple: "tuple",
    }
    name = names.get(kind, getattr(kind, "__name__", str(kind)))
    if isinstance(key, Key) and key.range is not None:
        name += f", {key.range}"
    return name


def _format_default(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        value = (*value[:3], ...)
        return f"`{', '.join('…' if v is ... else repr(v) for v in value)}`"
    if isinstance(value, ml_collections.ConfigDict):
        return "empty"
    return f"`{value!r}`"


def _as_sentence(comment: str) -> str:
    """Capitalises the first word of a comment, unless it is a name or a unit."""
    word = re.match(r"[a-z]*", comment)[0]
    is_word = len(word) > 2 or word in ("of", "in", "at", "as", "or", "a")
    return word.capitalize() + comment[len(word) :] if is_word else comment


def _link_pages(text: str) -> str:
    """Turns names of pages into links."""

    def link(match: re.Match) -> str:
        return f"[{match[2]}]({os.path.relpath(match[1], 'reference/config')})"

    return re.sub(r"docs/([\w/]*?(\w+)\.md)", link, text)
