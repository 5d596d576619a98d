"""Every benchmark result has its command on the page of benchmarks, and no merge is left open."""

import json
import re

import pytest

from tests.docs.pages import PAGES, REPOSITORY, page_name

RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_benchmarks_page_names_the_command_of_every_result(path):
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text("utf-8")
    result = json.loads(path.read_text("utf-8"))
    module = re.search(r"-m (\S+)", result["command"]).group(1)
    assert path.name in page and f"python -m {module}" in page
    assert result["date_utc"] and result["machine"]["cores"] and result["machine"]["cpu"]


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_no_conflict_is_left(path):
    assert not re.search(r"(?m)^(<{7} |>{7} |={7}$)", path.read_text("utf-8"))
