"""What the keys of a config mean: the comments next to where they are written.

Nothing is told twice: `--config.help` and the site's pages of keys read the sources.
"""

from __future__ import annotations

import ast
import io
import pathlib
import re
import tokenize
from collections.abc import Mapping

_PACKAGES = pathlib.Path(__file__).resolve().parents[2]  # the folder that they are in


def read_comments(files: Mapping[str, str]) -> dict[str, str]:
    """The comments of keys, by their dotted names.

    Args:
        files: prefix of keys -> the files that describe them, with spaces between, such as
            "diht_jax/losses/*.py". What is found first counts.
    """
    found: dict[str, str] = {}
    for prefix, patterns in files.items():
        for pattern in patterns.split():
            for path in sorted(_PACKAGES.glob(pattern)):
                for name, text in comments_of(path.read_text("utf-8")).items():
                    if text:
                        found.setdefault(prefix + name, text)
    return found


def comments_of(source: str) -> dict[str, str]:
    """Comments of the keys that are written in a file.

    Args:
        source: Python, with keys as `c.section.key = default`, as `"section.key": default` in a
            dict, or as fields of a dataclass, which its docstring or a comment describes.
    """
    own_line, inline = _comments_by_line(source)

    def comment(node: ast.stmt | ast.expr) -> str:
        first = node.lineno
        above = []
        while first - 1 - len(above) in own_line:
            above.insert(0, own_line[first - 1 - len(above)])
        behind = [inline[n] for n in range(first, (node.end_lineno or first) + 1) if n in inline]
        return " ".join([*above, *behind])

    found: dict[str, str] = {}
    for scope in ast.walk(ast.parse(source)):
        if isinstance(scope, ast.ClassDef):
            documented = _documented_fields(scope)
            for node in scope.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    name = node.target.id
                    found[name] = found.get(name) or documented.get(name) or comment(node)
        elif isinstance(scope, ast.Dict):
            for key, value in zip(scope.keys, scope.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    whole = ast.Dict([], [], lineno=key.lineno, end_lineno=value.end_lineno)
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


def _assigned_keys(function: ast.FunctionDef) -> list[tuple[str, ast.stmt]]:
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
    targets = [n.target for n in node.body if isinstance(n, ast.AnnAssign)]
    fields = {target.id for target in targets if isinstance(target, ast.Name)}
    listed = (ast.get_docstring(node) or "").partition("Attributes:\n")[2]
    found = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE):
        for name in names.split(", "):
            if name in fields:
                found[name] = " ".join(text.split())
    return found
