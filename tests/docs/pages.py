"""The pages of the project: README, CONTRIBUTING and docs/."""

import pathlib
import re

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
LAUNCH_FILES = sorted((REPOSITORY / "launch").iterdir())


def page_name(path: pathlib.Path) -> str:
    """Such as `docs/guides/own_data.md`: the name of a test's case."""
    return str(path.relative_to(REPOSITORY))


def python_blocks(path: pathlib.Path) -> list[str]:
    """The fenced blocks of Python on a page, in their order."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def without_code(text: str) -> str:
    """A page's text without fenced and indented blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
