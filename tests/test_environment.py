"""Set-up of a clone by `.ci/environment.sh`, which reads only the clone; workflows in `.github`."""

import pathlib
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.make import REPOSITORY
from tests.parts import part_of

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
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


def test_workflows_follow_the_schema():
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    done = subprocess.run(
        [*command, "vendor.github-workflows", *map(str, WORKFLOWS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_parts_of_the_workflow_are_the_whole_suite():
    matrix = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "tests.yml").read_text())
    parts = matrix["jobs"]["tests"]["strategy"]["matrix"]["part"]
    files = list(range(31))
    dealt = [part_of(files, part, len(parts)) for part in parts]
    assert sorted(sum(dealt, [])) == files
