"""Tables of all keys of a config: type, range, default, and the comment in the code.

The keys come from `default_config`, and what they mean from the comments next to where they are
written (or, for the fields of a dataclass, from its docstring), so that nothing is told twice.
"""

from __future__ import annotations

import ast
import io
import os
import pathlib
import re
import tokenize
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from data_prep.duplicates import config as duplicates_config
from data_prep.filtering import config as filter_config
from data_prep.labelling import config as label_config
from diht_jax.config.checks import PathsOrSections, TextOrSections, walk
from diht_jax.config.keys import Key
from diht_jax.training import recipe

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# Prefix of keys -> files whose comments describe them; "*" stands for any files.
_PREP = {
    "ray.": "data_prep/jobs/cluster.py",
    "source.": "diht_jax/readers/*.py",
}
_PLACES: dict[str, dict[str, str]] = {
    "train": {
        "": "diht_jax/config/keys.py",
        "model.overrides.": "diht_jax/models/architecture.py diht_jax/models/zoo.py",
        "loss.": "diht_jax/losses/*.py",
        "affinity.": "diht_jax/extras/affinity.py",
        "captioning.": "diht_jax/extras/captioning.py",
        "concepts.": "diht_jax/training/terms/concepts.py",
    },
    "filter": {
        "": "data_prep/filtering/config.py data_prep/steps/*.py",
        "spotter.": "data_prep/text_spotting/*.py",
        **_PREP,
    },
    "label": {
        "": "data_prep/labelling/config.py",
        "heads.": "data_prep/labelling/config.py",
        "clip_teachers.": "data_prep/teachers/clip.py",
        "teacher.": "data_prep/teachers/registry.py",
        "teacher.swag.": "data_prep/teachers/swag.py",
        "teacher.torch.": "data_prep/teachers/torch_module.py",
        "teacher.precomputed.": "data_prep/teachers/precomputed.py",
        **_PREP,
    },
    "duplicates": {"": "data_prep/duplicates/config.py", **_PREP},
}
_COMMANDS: dict[str, tuple[str, str, Callable[[], ml_collections.ConfigDict]]] = {
    "train": ("Keys of a recipe", "diht_jax.train", recipe.default_config),
    "filter": ("Keys of the filter", "data_prep.filter", filter_config.default_config),
    "label": ("Keys of the labels", "data_prep.label", label_config.default_config),
    "duplicates": ("Keys of duplicates", "data_prep.duplicates", duplicates_config.default_config),
}
_RESUME = {"fixed": "", "end": "a resumed run may set another end", "free": "free on resume"}


def format_pages() -> dict[str, str]:
    """The pages as Markdown by their names, such as "train"."""
    return {name: _format_page(name) for name in _COMMANDS}


def comments_of(source: str) -> dict[str, str]:
    """Comments of the keys that are written in a file.

    Args:
        source: Python, with keys as `c.section.key = default`, as `"section.key": default` in a
            dict, or as fields of a dataclass whose docstring describes them.
    """
    own_line, inline = _comments_by_line(source)

    def comment(node: ast.AST) -> str:
        first = node.lineno
        above = []
        while first - 1 - len(above) in own_line:
            above.insert(0, own_line[first - 1 - len(above)])
        behind = [inline[n] for n in range(first, node.end_lineno + 1) if n in inline]
        return " ".join([*above, *behind])

    found: dict[str, str] = {}
    for scope in ast.walk(ast.parse(source)):
        if isinstance(scope, ast.ClassDef):
            for name, text in _documented_fields(scope).items():
                found.setdefault(name, text)
        elif isinstance(scope, ast.Dict):
            for key, value in zip(scope.keys, scope.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    whole = ast.Dict(lineno=key.lineno, end_lineno=value.end_lineno)
                    found[key.value] = found.get(key.value) or comment(whole)
        elif isinstance(scope, ast.FunctionDef):
            for name, node in _assigned_keys(scope):
                found[name] = found.get(name) or comment(node)
    return found


def _comments_by_line(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Texts of comments: those with a line of their own, and those behind code."""
    own_line, inline = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt:"):
            alone = not token.line[: token.start[1]].strip()
            (own_line if alone else inline)[token.start[0]] = token.string.lstrip("# ")
    return own_line, inline


def _assigned_keys(function: ast.FunctionDef) -> list[tuple[str, ast.AST]]:
    """Keys that a function gives to a config; `c = config.clip = ...` makes `c` a section."""
    sections: dict[str, str] = {}
    found = []
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        chains = [ast.unparse(t) for t in node.targets if isinstance(t, ast.Attribute)]
        for chain in chains:
            root, _, name = chain.partition(".")
            found.append((sections.get(root, "") + name, node))
        for target in node.targets:
            if isinstance(target, ast.Name) and chains:
                sections[target.id] = chains[0].partition(".")[2] + "."
    return found


def _documented_fields(node: ast.ClassDef) -> dict[str, str]:
    fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    listed = (ast.get_docstring(node) or "").partition("Attributes:\n")[2]
    found = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE):
        for name in names.split(", "):
            if name in fields:
                found[name] = " ".join(text.split())
    return found


def _all_comments(command: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for prefix, patterns in _PLACES[command].items():
        for pattern in patterns.split():
            for path in sorted(REPOSITORY.glob(pattern)):
                for name, text in comments_of(path.read_text("utf-8")).items():
                    if text:
                        found.setdefault(prefix + name, text)
    return found


def _format_page(command: str) -> str:
    title, module, default_config = _COMMANDS[command]
    keys = recipe.all_keys() if command == "train" else {}
    comments = _all_comments(command)
    sections: dict[str, list[str]] = {}
    for name, (value, kind) in walk(default_config()).items():
        if isinstance(value, ml_collections.ConfigDict) and not issubclass(kind, TextOrSections):
            continue  # a section, whose keys follow
        facts = [_format_type(kind, keys.get(name)), f"default {_format_default(value)}"]
        if isinstance(key := keys.get(name), Key) and command == "train":
            facts.append(_RESUME[key.resume])
        meaning = _link_pages(_as_sentence(comments.get(name, "")))
        lines = [f"`{name}`", f":   {meaning}  "]
        lines += [f"    *{'; '.join(filter(None, facts))}*", ""]
        sections.setdefault(name.rpartition(".")[0], []).extend(lines)
    parts = [
        f"# {title}\n",
        f"`--config.KEY=VALUE` of `python -m {module}` sets a key. This page is made from the "
        "code. A default of `None` means that the key is not set.\n",
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
    """A comment with a capital at its start, unless that is a name or a unit."""
    word = re.match(r"[a-z]*", comment)[0]
    is_word = len(word) > 2 or word in ("of", "in", "at", "as", "or", "a")
    return word.capitalize() + comment[len(word) :] if is_word else comment


def _link_pages(text: str) -> str:
    """Names of pages become links."""

    def link(match: re.Match) -> str:
        return f"[{match[2]}]({os.path.relpath(match[1], 'reference/config')})"

    return re.sub(r"docs/([\w/]*?(\w+)\.md)", link, text)
