"""Length and words of the pages."""

import json
import re

import pytest

from tests.docs.pages import PAGES, REPOSITORY, page_name

RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text("utf-8").split()) < 1100


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_pages_use_the_words_of_the_field(path):
    text = path.read_text("utf-8")
    for words in ("passed over", r"what is none", r"is none\b", r"\btold\b", r"\bplaces?\b"):
        assert not re.search(rf"(?i)(?<![`.]){words}(?!\.json)", text), words


@pytest.mark.parametrize("path", PAGES[2:], ids=page_name)
def test_pages_open_with_commands(path):
    opening = path.read_text("utf-8").partition("\n## ")[0]
    assert re.search(r"(?m)^ {4}(python|pip|bash) ", opening)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_benchmarks_page_has_every_result_with_command_and_date(path):
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text("utf-8")
    result = json.loads(path.read_text("utf-8"))
    module = re.search(r"-m (\S+)", result["command"]).group(1)
    assert path.name in page and f"python -m {module}" in page
    assert result["date_utc"][:10] in page
    machine = result["machine"]
    assert re.search(rf"\b{machine['cores']} cores?\b", page) and machine["cpu"] in page


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_no_conflict_is_left(path):
    assert not re.search(r"(?m)^(<{7} |>{7} |={7}$)", path.read_text("utf-8"))
