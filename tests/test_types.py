"""The type checker reports no errors for the packages."""

import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def test_the_packages_are_clean():
    ty = pytest.importorskip("ty").find_ty_bin()
    options = ["--python", sys.executable, "--output-format", "concise", "--error-on-warning"]
    done = subprocess.run([ty, "check", *options], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
