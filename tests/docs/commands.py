"""Finds the commands in the documentation, parses them with their own parsers, and runs them.

    python -m tests.docs.commands < argv.json

runs several commands one after another in this process, which imports packages only once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from absl import app, flags

from diht_jax import command_line
from tests import make
from tests.docs.pages import LAUNCH_FILES, PAGES, page_name

_MODULE = r"\bpython3? -m ([\w.]+)"
_CLUSTER = re.compile(r"(?m)^\s*(?:gcloud |srun |#SBATCH|docker |scontrol |apiVersion:)")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        page: such as "docs/guides/own_data.md".
            text: The command as written on the page, lines joined, without a trailing comment.
            is_inline: Whether the command is inside a sentence, where flags may be omitted.
            is_for_cluster: Whether the command is in a script for a cluster, or in a part of one.
    """

    page: str
    text: str
    is_inline: bool = False
    is_for_cluster: bool = False

    @property
    def module(self) -> str:
        """The module, such as "diht_jax.train"."""
        return re.search(_MODULE, self.text)[1]

    @property
    def arguments(self) -> list[str]:
        """The arguments after the module."""
        behind = self.text[re.search(_MODULE, self.text).end() :]
        return shlex.split(re.split(r"\s(?:;|&&|\||\\$)|;\s", behind.strip())[0])


def find_commands() -> list[Command]:
    """Returns all commands of all pages and launch files, in order."""
    found = [command for path in PAGES for command in commands_of(path)]
    return found + [c for path in LAUNCH_FILES for c in _commands_of_block(path.read_text(), path)]


def commands_of(path: pathlib.Path) -> list[Command]:
    """Returns the commands `python -m ...` of a page, from code blocks and backticks."""
    text = path.read_text("utf-8")
    if path.name == "CONTRIBUTING.md":
        text = text.partition("\n## Add a ")[0]
    text = re.sub(r"^```(?:python|text)\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"(?:^ {4,}\S.*\n|^ {4,}\S.*\Z)+", text, re.MULTILINE)
    blocks += re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    found = [command for block in blocks for command in _commands_of_block(block, path)]
    plain = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    for span in re.findall(r"`(python3? -m [^`]+)`", plain):
        found.append(Command(page_name(path), " ".join(span.split()), is_inline=True))
    return found


def _commands_of_block(block: str, path: pathlib.Path) -> Iterator[Command]:
    is_for_cluster = path in LAUNCH_FILES or _CLUSTER.search(block) is not None
    for line in re.sub(r"\\\n\s*", "", block.replace("\\\n", " \\\n")).splitlines():
        line = re.sub(r"\s#(?:\s.*|$)|^\s*#.*", "", line).strip()
        if re.search(_MODULE, line):
            yield Command(page_name(path), line, is_for_cluster=is_for_cluster)


@contextlib.contextmanager
def own_flags() -> Iterator[None]:
    """Hides all flags except those of absl and grain inside the context; restores them after."""

    def is_librarys(name: str) -> bool:
        # absl also owns the flags of config keys, such as "config.seed".
        owner = str(flags.FLAGS.find_module_defining_flag(name))
        return owner.startswith(("absl", "grain")) and "." not in name

    def defined() -> list[str]:
        return [name for name in list(flags.FLAGS) if not is_librarys(name)]

    before = {name: flags.FLAGS[name] for name in defined()}
    for name in before:
        delattr(flags.FLAGS, name)
    try:
        yield
    finally:
        for name in defined():
            delattr(flags.FLAGS, name)
        for name, flag in before.items():
            flags.FLAGS[name] = flag


def parse_command(
    module: str, arguments: list[str], check: Callable[[dict[str, Any]], None]
) -> None:
    """Parses a command line as the module does when it starts, without calling its `main`.

    Args:
            module: Module name, such as "diht_jax.train".
            arguments: Arguments after the module name.
            check: Called with the keyword arguments of `command_line.run` while the flags exist.

    Raises:
            SystemExit: The command line is invalid; the reason is on stderr.
    """

    def parse_only(main: Callable[..., None], **options: Any) -> None:
        unparsed = ("argv", "comment_files", "writes_to_stores")
        parsing = {name: value for name, value in options.items() if name not in unparsed}
        command_line.parse_flags(sys.argv, **parsing)
        check(options)

    with (
        own_flags(),
        mock.patch.object(command_line, "run", parse_only),
        mock.patch.object(app, "run", parse_only),
        mock.patch.object(sys, "argv", [module, *arguments]),
    ):
        _start(module)


def parsed_flags(module: str, arguments: list[str], *names: str) -> list[Any]:
    """Returns the values of flags after `parse_command`."""
    found: list[Any] = []
    parse_command(
        module, arguments, lambda _: found.extend(flags.FLAGS[name].value for name in names)
    )
    return found


def run_commands(commands: list[tuple[str, list[str]]]) -> None:
    """Runs commands in this process; exits at the first failure and names the command.

    For the module `-c`, the argument is Python code, as for the interpreter.
    """
    for module, arguments in commands:
        with own_flags(), mock.patch.object(sys, "argv", [module, *arguments]):
            print("RUN", module, shlex.join(arguments), flush=True)
            try:
                _start(module)
            except SystemExit as end:
                if end.code:
                    sys.exit(f"{module} {shlex.join(arguments)}: exit status {end.code}")


def run_in_one_process(commands: list[tuple[str, list[str]]], folder: pathlib.Path) -> str:
    """Runs commands in this folder, by `run_commands` in a new process; returns what they print."""
    variables = {"PYTHONPATH": str(make.REPOSITORY)}
    done = make.run_command(
        "tests.docs.commands", folder=folder, input=json.dumps(commands), **variables
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def _start(module: str) -> None:
    if module == "-c":
        exec(compile(sys.argv[1], "<page>", "exec"), {"__name__": "__main__"})
        return
    sys.modules.pop(module, None) if module.startswith("benchmarks") else None
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    run_commands(json.load(sys.stdin))
