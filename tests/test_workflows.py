"""The workflows in `.github` are valid, and their parts cover the whole test suite."""

import subprocess
import sys

import pytest
import yaml

from tests.make import REPOSITORY
from tests.parts import part_of

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


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
