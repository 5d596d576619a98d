"""Generates pages of the site and adapts their links.

The pages are README, CONTRIBUTING and CHANGELOG, the notebooks, and all keys of configs.
"""

from __future__ import annotations

import json
import os
import pathlib
import re

import config_keys
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# File next to `docs/` -> page of the site.
TOP_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# Own page for CONTRIBUTING's worked examples: one page would be twice as long as any other.
EXAMPLES_PAGE, EXAMPLES_BEGIN, EXAMPLES_ANCHOR = "extending.md", "\n## Add a ", "#add-a"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to the site."""
    made = {
        page: (REPOSITORY / name).read_text("utf-8")
        for name, page in TOP_PAGES.items()
        if (REPOSITORY / name).exists()
    }
    first, begin, examples = made["contributing.md"].partition(EXAMPLES_BEGIN)
    made["contributing.md"] = first.replace(
        f"]({EXAMPLES_ANCHOR}", f"]({EXAMPLES_PAGE}{EXAMPLES_ANCHOR}"
    )
    made[EXAMPLES_PAGE] = f"# Add a part\n{begin}{examples}"
    made |= {f"reference/config/{n}.md": text for n, text in config_keys.format_pages().items()}
    for path in sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{path.stem}.md"] = notebook_page(path)
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def notebook_page(path: pathlib.Path) -> str:
    """Returns a notebook as a Markdown page: its texts, and its code as blocks."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    title, *rest = parts
    return "\n\n".join(
        [title, f"[The notebook]({path.name}) runs on Colab and on a laptop.", *rest]
    )


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links to files of the repository as links of the site."""
    here = os.path.dirname(page.file.src_uri) or "."
    is_top = page.file.src_uri in (*TOP_PAGES.values(), EXAMPLES_PAGE)
    folder = "" if is_top else os.path.join("docs", here)

    def link(match: re.Match) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = os.path.normpath(os.path.join(folder, target))
        if not (REPOSITORY / path).exists():  # to another host, or code that looks like a link
            return match[0]
        if path not in TOP_PAGES and not path.startswith("docs/"):
            return label  # a file without a page
        to = TOP_PAGES.get(path, path.removeprefix("docs/"))
        if path == "CONTRIBUTING.md" and anchor.startswith(EXAMPLES_ANCHOR):
            to = EXAMPLES_PAGE
        if to.endswith(".ipynb") and not here.endswith("notebooks"):
            to = f"{to.removesuffix('.ipynb')}.md"
        return (
            f"[{label}]({os.path.relpath(to, os.path.dirname(page.file.src_uri) or '.')}{anchor})"
        )

    return re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)", link, markdown)
