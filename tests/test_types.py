"""The type checker reports no errors for the packages."""

import subprocess
import sys

import pytest

from tests.make import REPOSITORY


def test_the_packages_are_clean():
    ty = pytest.importorskip("ty").find_ty_bin()
    options = ["--python", sys.executable, "--output-format", "concise", "--error-on-warning"]
    done = subprocess.run([ty, "check", *options], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
