"""Pages: text is escaped, and missing folders are created."""

import jinja2
import pytest

from diht_jax.pages import render as pages


@pytest.fixture
def templates(tmp_path, monkeypatch):
    """Returns a folder with the common template, to which a test adds others."""
    (tmp_path / "base.html").write_text((pages.TEMPLATES / "base.html").read_text())
    monkeypatch.setattr(pages, "TEMPLATES", tmp_path)
    pages._environment.cache_clear()
    yield tmp_path
    pages._environment.cache_clear()


def test_texts_of_a_page_are_escaped_and_missing_ones_are_an_error(templates):
    """Markup in a caption stays text, in cells, captions and attributes; bars are markup."""
    (templates / "x.html").write_text(
        '{% extends "base.html" %}{% import "base.html" as parts %}{% block body %}'
        '{{ parts.table(["<b>", "n", ""], [["<u>", 7, bar(0.5, 40)]], bars=1) }}'
        '{{ parts.figure("x", "\\" onload=x", "<caption>") }}{% endblock %}'
    )
    path = templates / "new" / "folder" / "x.html"
    page = pages.render("x.html", path, title="</title> \ud83d")
    assert path.read_text() == page.replace("\ud83d", "?")
    assert not any(text in page for text in ("<b>", "<u>", "<caption>", '" onload', "</title> "))
    assert "&lt;u&gt;" in page and '<td class="n">7</td>' in page
    assert '<td><span class="bar " style="width:calc(20.0 * var(--unit))"></span></td>' in page
    with pytest.raises(jinja2.UndefinedError, match="title"):
        pages.render("x.html")
