"""The workflows of `.github` are well formed, and their parts of the suite are all of it."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.parts import part_of

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def test_workflows_follow_the_schema():
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    done = subprocess.run(
        [*command, "vendor.github-workflows", *map(str, WORKFLOWS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_actionlint_finds_nothing():
    if not shutil.which("actionlint"):
        pytest.skip("actionlint is absent")
    done = subprocess.run(["actionlint", *WORKFLOWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_to_commits(path):
    actions = re.findall(r"uses: (\S+)", path.read_text())
    assert actions
    assert [action for action in actions if not re.search(r"@[0-9a-f]{40}$", action)] == []


def test_the_parts_of_the_workflow_are_the_whole_suite():
    matrix = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "tests.yml").read_text())
    parts = matrix["jobs"]["tests"]["strategy"]["matrix"]["part"]
    files = list(range(31))
    dealt = [part_of(files, part, len(parts)) for part in parts]
    assert sorted(sum(dealt, [])) == files


@pytest.mark.parametrize("part", [0, 5])
def test_a_part_that_is_not_there_is_refused(part):
    with pytest.raises(ValueError, match="--part"):
        part_of([1, 2], part, 4)
