"""Version numbers agree, all extras are documented, and third-party notices are complete."""

import re
import tomllib

import yaml

from tests.make import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())


def test_the_changelog_and_the_citation_are_of_this_version():
    releases = re.findall(
        r"(?m)^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", (REPOSITORY / "CHANGELOG.md").read_text()
    )
    version, date = releases[0]
    assert version == CITATION["version"] == PROJECT["version"]
    assert date == str(CITATION["date-released"])
    assert releases == sorted(releases, key=lambda release: release[1], reverse=True)


def test_the_page_of_the_installation_lists_every_extra():
    page = (REPOSITORY / "docs" / "guides" / "install.md").read_text()
    listed = re.findall(r"(?m)^\| `([\w-]+)` \|", page)
    assert sorted(listed) == sorted(PROJECT["optional-dependencies"])


def test_the_notice_names_what_is_there_once():
    text = (REPOSITORY / "NOTICE").read_text()
    named = re.findall(r"(?m)^((?:diht_jax|data_prep|configs)/\S+)$", text)
    data = (".gz", ".safetensors", ".tar", ".toml", ".txt")
    files = [path for path in (REPOSITORY / "diht_jax").rglob("*") if path.suffix in data]
    assert {str(path.relative_to(REPOSITORY)) for path in files} <= set(named)
    assert len(named) == len(set(named))
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []
    licences = {f"LICENSES/{path.name}" for path in (REPOSITORY / "LICENSES").iterdir()}
    assert set(re.findall(r"LICENSES/[\w.]+", text)) == licences
