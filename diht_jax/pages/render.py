"""Rendering of templates to self-contained pages, with escaped text and embedded images.

    render("duplicates.html", folder + "/report.html", title="Duplicates", cards=cards)

Jinja escapes all values in HTML, so captions, keys and file names need no escaping. Markup belongs
in templates; `bar` is for table cells that Python builds.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import pathlib
from typing import TYPE_CHECKING, Any

from diht_jax.storage import files

if TYPE_CHECKING:
    import jinja2
    import markupsafe
    from PIL import Image

TEMPLATES = pathlib.Path(__file__).parent / "templates"


def render(template: str, path: str | os.PathLike[str] | None = None, /, **data: Any) -> str:
    """Renders a page, and writes it if a path is given.

    Args:
        template: file name in `templates/`.
        path: local path or URL of the page; its folder is created if missing.
        **data: variables of the template; a missing one is an error.
    """
    # `is_page` is unset if `base.html` is only imported for its macros, which have no variables.
    page = _environment().get_template(template).render(is_page=True, **data)
    if path is not None:
        path = os.fspath(path)
        files.make_folder(os.path.dirname(path) or ".")
        # Captions from the web may contain lone surrogates, which UTF-8 cannot encode.
        files.write_bytes(path, page.encode("utf-8", "replace"))
    return page


def data_uri(picture: bytes, kind: str = "png") -> str:
    """Returns an encoded image as a data URI, for `<img src>`."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def thumbnail(image: Image.Image, side: int = 224) -> str:
    """Returns a thumbnail with at most `side` pixels on a side, as a data URI."""
    small = image.convert("RGB")  # a copy
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return data_uri(buffer.getvalue(), "jpeg")


def bar(share: float, width: int = 160, css: str = "") -> markupsafe.Markup:
    """Returns a horizontal bar, `width` pixels long for a share of 1; half on narrow screens."""
    from markupsafe import Markup

    style = f"width:calc({width * share:.1f} * var(--unit))"
    return Markup('<span class="bar {}" style="{}"></span>').format(css, style)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    names: dict[str, Any] = environment.globals
    names.update(bar=bar, data_uri=data_uri)
    environment.filters.update(count="{:,}".format, percent="{:.1%}".format)
    return environment
