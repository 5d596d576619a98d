"""Runs commands in this process and prints the project files that each enters, as JSON.

    python -m tests.contributing.walk MODULE ARGUMENTS... [+ MODULE ARGUMENTS...]

Files are listed in the order of their first call. Calls during an import do not count; neither
does code that a later command skips because an earlier one has filled a cache.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import os
import re
import runpy
import sys
import threading
import types

from tests.docs.commands import own_flags
from tests.make import REPOSITORY


@functools.cache
def project_file(path: str) -> str | None:
    """Returns the path of a project file relative to the root; None for any other file."""
    name = os.path.relpath(path, REPOSITORY)
    return name if re.match(r"(diht_jax|data_prep)/.*\.py$", name) else None


def main(module: str, arguments: list[str]) -> list[str]:
    """Returns the files that a command enters."""
    entered: list[str] = []
    importing: collections.Counter[int] = collections.Counter()
    known: dict[int, types.CodeType] = {}  # by `id`; these need no further look

    def note(frame, event, _):
        code = frame.f_code
        if id(code) in known:
            return None
        if code.co_name == "<module>":
            if frame.f_globals.get("__name__") == "__main__":
                return None
            importing[threading.get_ident()] += 1
            frame.f_trace_lines = False
            return leave_import
        name = project_file(code.co_filename)
        if name and not importing[threading.get_ident()] and name not in entered:
            entered.append(name)
        if not name or not importing[threading.get_ident()]:
            known[id(code)] = code
        return None

    def leave_import(frame, event, _):
        if event == "return":
            importing[threading.get_ident()] -= 1
        return leave_import

    sys.argv = [module, *arguments]
    # Tracing instead of profiling, which would also call back for every C function.
    threading.settrace(note)
    sys.settrace(note)
    try:
        with own_flags():
            runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.settrace(None)
        threading.settrace(None)
    return entered


if __name__ == "__main__":
    groups = itertools.groupby(sys.argv[1:], "+".__eq__)
    commands = [list(words) for is_sign, words in groups if not is_sign]
    print("\n" + json.dumps([main(module, arguments) for module, *arguments in commands]))
