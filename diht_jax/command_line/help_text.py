"""Texts of `--help` and `--config.help`, which fit on a screen.

`--helpfull` has the rest: the full description of a command, and all flags with their types. The
meaning of config keys is written once, in comments next to the keys. `--config.help` and the
documentation's pages of keys read these comments.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from diht_jax.config.checks import suggest, walk

_PACKAGES = pathlib.Path(__file__).resolve().parents[2]  # the folder with all packages
# Flags shared by many commands, which are listed last.
_GROUPS = {
    "flags of the model": ("step", "ema", "image_size", "context_length", "dim", "architecture"),
    "flags of job arrays": ("task_index", "num_tasks"),
}
# Rarely needed flags, shown by name only.
_NAMED_ONLY = (
    "coordinator_address",
    "num_processes",
    "process_id",
    "heartbeat_timeout_secs",
    "start_warning_secs",
)
_LEAST_COLUMNS, _MOST_COLUMNS = 60, 100
_WIDEST_LEFT = 24
_LONGEST_VALUE = 60


def command_flags() -> list[flags.Flag]:
    """Returns the flags that this command defines, in order, without absl's own."""
    found = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    module_of = flags.FLAGS.find_module_defining_flag
    return [flag for flag in found if not str(module_of(flag.name)).startswith("absl.")]


def describe_command(
    description: str, found: Iterable[flags.Flag], *, has_config: bool = False
) -> str:
    """Returns the help of a command: description, example, and flags, its own first."""
    first, *others = description.strip().split("\n\n")
    example = next((part for part in others if part.startswith("    ")), "")
    parts = [first, example] if example else [first]
    shown = {f.name: f for f in found if not (f.help or "").startswith("Alias for ")}
    grouped = {name for names in _GROUPS.values() for name in names}.union(_NAMED_ONLY)
    parts.append(_block("flags:", [f for name, f in shown.items() if name not in grouped]))
    for title, names in _GROUPS.items():
        group = [shown[name] for name in names if name in shown]
        parts += [_block(f"{title}:", group)] if group else []
    last = []
    if has_config:
        last.append("--config.KEY=VALUE sets a key; --config.help [SECTION] lists them.")
    named = [f"--{name}" for name in _NAMED_ONLY if name in shown]
    if named:
        last.append(f"On clusters that JAX cannot ask: {', '.join(named)}.")
    last.append("--helpfull describes all of it.")
    lines = (textwrap.fill(line, _columns(), break_on_hyphens=False) for line in last)
    return "\n\n".join([*parts, "\n".join(lines)])


def describe_keys(
    config: ml_collections.ConfigDict, section: str, comments: Mapping[str, str]
) -> str:
    """Describes the keys of a section with values and meanings, and lists its sub-sections.

    Args:
        config: default values, or those of a recipe.
        section: dotted name; "" for the top level.
        comments: dotted name -> meaning of the key.
    """
    found = {name: value for name, (value, _) in walk(config).items()}
    sections = [n for n, v in found.items() if isinstance(v, ml_collections.ConfigDict) and len(v)]
    if section in found and section not in sections:  # a key: shown by itself
        return "\n".join(_rows([_key_row(section, found[section], comments)]))
    if section and section not in sections:
        hint = suggest(section, sections)
        raise ValueError(f"--config.help={section}: there is no such section; {hint}")
    prefix = f"{section}." if section else ""
    inside = [n for n in found if n.startswith(prefix) and "." not in n.removeprefix(prefix)]
    rows = [_key_row(name, found[name], comments) for name in inside if name not in sections]
    counts = [
        f"{name} ({sum(n.startswith(f'{name}.') and n not in sections for n in found)})"
        for name in inside
        if name in sections
    ]
    title = f"Keys of {section or 'the top level'}, --config.KEY=VALUE:"
    parts = ["\n".join([title, *_rows(rows)])]
    if counts:
        text = f"Sections, by --config.help SECTION: {', '.join(counts)}."
        parts.append(textwrap.fill(text, _columns(), break_on_hyphens=False))
    return "\n\n".join(parts)


def _block(title: str, found: Sequence[flags.Flag]) -> str:
    return "\n".join([title, *_rows([_flag_row(flag) for flag in found])])


def _flag_row(flag: flags.Flag) -> tuple[str, str]:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default = flag.default_as_str
    has_default = not flag.boolean and default not in (None, "''", "'None'")
    text = re.sub(
        r"^<(.*?)>: ", lambda match: f"{match[1].replace('|', ' or ')}: ", flag.help or ""
    )
    return name, f"{text} ({default.strip(chr(39))})" if has_default else text


def _key_row(name: str, value: Any, comments: Mapping[str, str]) -> tuple[str, str]:
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    text = textwrap.shorten(repr(value), _LONGEST_VALUE, placeholder=" ...")
    return f"{name}={text}", comments.get(name, "")


def _rows(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Formats rows in two columns; a left part that is too wide gets its own line."""
    widest = min(_WIDEST_LEFT, max((len(left) for left, _ in rows), default=0))
    lines = []
    for left, right in rows:
        room = _columns() - widest - 4
        texts = textwrap.wrap(right, room, break_on_hyphens=False) or [""]
        if len(left) > widest:
            lines.append(f"  {left}")
            left = ""
            texts = texts if texts != [""] else []
        for number, text in enumerate(texts):
            lines.append(f"  {left if number == 0 else '':<{widest}}  {text}".rstrip())
    return lines


def _columns() -> int:
    return min(_MOST_COLUMNS, max(_LEAST_COLUMNS, shutil.get_terminal_size((80, 24)).columns))


def read_comments(files: Mapping[str, str]) -> dict[str, str]:
    """Returns dotted name -> comment of the keys in some files.

    Args:
        files: prefix of keys -> the files that describe them, separated by spaces, such as
            "diht_jax/losses/*.py". The first comment found for a key is used.
    """
    found: dict[str, str] = {}
    for prefix, patterns in files.items():
        for pattern in patterns.split():
            for path in sorted(_PACKAGES.glob(pattern)):
                for name, text in comments_of(path.read_text("utf-8")).items():
                    if text:
                        found.setdefault(prefix + name, text)
    return found


# Start of a line with a key: `"section.key": `, `field: type` or `config.section.key = `.
_KEY = re.compile(r'\s+(?:"([\w.]+)": |(\w+): \w|\w+\.([\w.]+) = )')
_COMMENT = re.compile(r"(.*?)(?:^|\s)\s*# (.*)")
# An attribute in the docstring of a dataclass.
_DOCUMENTED = re.compile(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", re.MULTILINE)


def comments_of(source: str) -> dict[str, str]:
    """Returns key -> comment for the keys in a source file; comments are above or after the key.

    Args:
        source: Python, with keys as `config.section.key = default`, as `"section.key": default`
            in a dict, or as fields of a dataclass, which its docstring or a comment describes.
    """
    found: dict[str, str] = {}
    above: list[str] = []
    name = None
    for line in source.splitlines():
        comment = _COMMENT.fullmatch(line)
        if comment and not comment[1].strip():
            above.append(comment[2])
            continue
        if key := _KEY.match(line):
            name = key[1] or key[2] or key[3]
            name = None if found.get(name) else name
        elif not line.strip():
            name = None
        texts = [*(above if key else []), *([comment[2]] if comment else [])]
        if name and texts:
            found[name] = " ".join(filter(None, [found.get(name), *texts]))
        above = []
    for part in source.split("Attributes:\n")[1:]:
        for names, text in _DOCUMENTED.findall(part.partition('"""')[0]):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
