"""Parts of a first hour for each way to end; the worker of a test imports this file."""

import os
import pathlib
import time


def good(setting, **arguments):
    """Counts its calls in the output folder."""
    calls = pathlib.Path(setting.output, "calls")
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    return arguments | {"calls": len(calls.read_text()), "not_a_number": float("nan")}


def raises(setting):
    """Raises a Python exception."""
    raise ValueError("no such thing")


def crashes(setting):
    """Ends its process, as a fault in a library does."""
    os.abort()


def hangs(setting):
    """Runs longer than any time limit."""
    time.sleep(600)
