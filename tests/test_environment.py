"""Set-up of a clone: `.ci/environment.sh` installs all packages and reads only the clone."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.make import REPOSITORY

# Stands in for Python: records its arguments.
RECORDER = '#!/bin/sh\necho "$@" >> calls\n'


@pytest.fixture
def checkout(tmp_path):
    """A folder with the set-up files, and an environment whose Python only records its calls."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / ".ci", folder / ".ci")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    return folder


def set_up(folder: pathlib.Path) -> list[str]:
    """Sources the script like run_demo.sh; returns the calls of the environment's Python."""
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail; source .ci/environment.sh; echo $python"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ".venv/bin/python\n"), done.stderr
    calls = folder / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return lines


def test_everything_is_installed_once_and_changes_again(checkout):
    requirements, project = set_up(checkout)
    assert requirements.endswith("-rrequirements.txt")
    assert project.endswith("--no-deps --no-build-isolation -e .")
    assert set_up(checkout) == []
    (checkout / "pyproject.toml").write_text("changed")
    assert [call.split()[-1] for call in set_up(checkout)] == ["."]
    (checkout / "requirements.txt").write_text("changed")
    assert [call.split()[-1] for call in set_up(checkout)] == ["-rrequirements.txt"]
