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


def test_a_wrong_call_is_found(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("from diht_jax.storage import files\n\nfiles.join(1, 2)\n")
    done = check(str(path), "--project", str(REPOSITORY))
    assert (done.returncode, done.stdout.count("invalid-argument-type")) == (1, 2), done.stdout
