"""The type checker finds nothing in the packages."""

import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def check(*arguments: str) -> subprocess.CompletedProcess:
    ty = pytest.importorskip("ty").find_ty_bin()
    command = [ty, "check", "--python", sys.executable, "--output-format", "concise", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_the_packages_are_clean():
    done = check("--error-on-warning")
    assert done.returncode == 0, done.stdout
