"""The documentation pages: README, CONTRIBUTING and docs/."""

import pathlib
import re

from tests.make import REPOSITORY

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
LAUNCH_FILES = sorted((REPOSITORY / "launch").iterdir())


def page_name(path: pathlib.Path) -> str:
    """Returns a page's name, such as `docs/guides/own_data.md`, for use as a test id."""
    return str(path.relative_to(REPOSITORY))


def python_blocks(path: pathlib.Path) -> list[str]:
    """Returns the fenced Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def without_code(text: str) -> str:
    """Returns a page's text without fenced and indented blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
