"""The site: every page is in the navigation and short, and every config key is described."""

import importlib
import re

import pytest
import yaml

from diht_jax.command_line.help_text import comments_of
from tests.docs.pages import PAGES, REPOSITORY, page_name
from tests.docs.test_links import CONFIGS, known_keys

DOCS = REPOSITORY / "docs"
MOST_BYTES = 15_000
MOST_WORDS_OF_README = 900


@pytest.fixture(scope="module")
def hooks():
    """Returns a function that imports a hook's file by name, as mkdocs does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "hooks"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def pages_of_keys(hooks):
    return hooks("config_keys").format_pages()


def pages_of(navigation):
    """Returns the files of a part of the navigation, in order."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in pages_of(part)]


def test_every_page_is_in_the_navigation_once():
    text = re.sub(r"!!python/\S+", "", (REPOSITORY / "mkdocs.yml").read_text())
    listed = pages_of(yaml.safe_load(text)["nav"])
    made = {
        "index.md",
        "contributing.md",
        "extending.md",
        *(f"reference/config/{name}.md" for name in CONFIGS),
    }
    if (REPOSITORY / "CHANGELOG.md").exists():
        made.add("changelog.md")
    made |= {f"notebooks/{path.stem}.md" for path in DOCS.glob("notebooks/*.ipynb")}
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(made | written)


@pytest.mark.parametrize("path", [p for p in PAGES if DOCS in p.parents], ids=page_name)
def test_pages_are_short(path):
    assert path.stat().st_size < MOST_BYTES


def test_public_names_exist_and_are_described():
    text = (DOCS / "reference" / "api.md").read_text("utf-8")
    names = re.findall(r"^(?:::: |      heading: )(\S+)$", text, re.MULTILINE)
    assert "diht_jax.load_model" in names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text("utf-8").split()) <= MOST_WORDS_OF_README


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_described(pages_of_keys, name):
    page = pages_of_keys[name]
    described = re.findall(r"^`([\w.]+)`\n:   \S", page, re.MULTILINE)
    keys = known_keys(CONFIGS[name]())
    sections = {key.rpartition(".")[0] for key in keys}
    assert sorted(described) == sorted(keys - sections)


def test_comments_are_those_of_their_keys():
    source = '''
class Size:
    """A size.

    Attributes:
        width, height: in
            pixels.
    """

    width: int = 1
    height: int = 1
    # Of the page.
    depth: int = 1

def defaults(config):
    # Above.
    config.alpha = 1  # And behind.
    config.section.beta = 2  # of the section

KEYS = {
    # Two lines
    # above.
    "gamma.delta": 3,
    "epsilon": 4,
}
'''
    found = {name: text for name, text in comments_of(source).items() if text}
    assert found == {
        "width": "in pixels.",
        "height": "in pixels.",
        "depth": "Of the page.",
        "alpha": "Above. And behind.",
        "section.beta": "of the section",
        "gamma.delta": "Two lines above.",
    }
