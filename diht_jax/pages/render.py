"""Renders a template to a page of one file: escaped texts, embedded pictures.

    render("duplicates.html", folder + "/report.html", title="Duplicates", cards=cards)

Jinja escapes every value that it prints into HTML, so captions, keys and file names go in as they
are. Markup belongs into templates; `bar` is for cells of tables that Python builds.
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
    from matplotlib.figure import Figure
    from PIL import Image

TEMPLATES = pathlib.Path(__file__).parent / "templates"


def render(template: str, path: str | os.PathLike[str] | None = None, /, **data: Any) -> str:
    """Renders a page, and writes it when a path is given.

    Args:
        template: file name in `templates/`.
        path: local path or URL of the page; its folder is made when missing.
        **data: variables of the template; one that it uses and that is missing is an error.

    Returns:
        The page.
    """
    # `is_page` tells the frame from an import of the macros next to it, which have no variables.
    page = _environment().get_template(template).render(is_page=True, **data)
    if path is not None:
        path = os.fspath(path)
        files.make_folder(os.path.dirname(path) or ".")
        # A caption from the web may hold half a surrogate pair, which UTF-8 does not have.
        files.write_bytes(path, page.encode("utf-8", "replace"))
    return page


def data_uri(picture: bytes | Image.Image | Figure) -> str:
    """A picture as the address of itself, for `<img src>`.

    Args:
        picture: encoded PNG, JPEG, GIF or WebP; or a Pillow image, which becomes a JPEG; or a
            figure of matplotlib, which becomes a PNG.
    """
    data = picture if isinstance(picture, bytes) else encode_picture(picture)
    kinds = {b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}
    kind = kinds.get(data[:4], "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(image: Image.Image, side: int = 224) -> str:
    """A small copy of a picture as a data URI.

    Args:
        image: RGB picture, left as it is.
        side: most pixels of the longer side.
    """
    small = image.copy()
    small.thumbnail((side, side))
    return data_uri(small)


def bar(share: float, width: int = 160, css: str = "") -> markupsafe.Markup:
    """A horizontal bar, half as long on a narrow screen.

    Args:
        share: filled part, from 0 to 1.
        width: pixels of a share of 1.
        css: further classes, such as the colour.
    """
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


def encode_picture(picture: Image.Image | Figure) -> bytes:
    """Encodes a Pillow image as JPEG, a figure of matplotlib as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.convert("RGB").save(buffer, "JPEG", quality=88)
    else:
        picture.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
