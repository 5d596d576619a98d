"""Pages of one file without links to others: the frame, the style, and the parts that all share.

What a page shows belongs to the page: `page` here, and `labelling.report`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { --unit: 1px; }
body { font: 14px/1.45 system-ui, sans-serif; color: #1f2328; max-width: 1180px;
       margin: 24px auto; padding: 0 20px; }
h1 { font-size: 24px; } h2 { font-size: 18px; margin-top: 32px; } h3 { font-size: 15px; }
table { border-collapse: collapse; } td, th { padding: 3px 12px 3px 0; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #d0d7de; font-weight: 600; }
.note { color: #656d76; }
.columns { display: flex; flex-wrap: wrap; gap: 12px 48px; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 14px; }
.card { border: 1px solid #d0d7de; border-radius: 6px; padding: 10px; }
.card p { margin: 6px 0; font-size: 13px; overflow-wrap: anywhere; }
.card table { font-size: 12px; }
.bar { display: inline-block; height: 8px; background: #0969da; border-radius: 2px; }
.wide { overflow-x: auto; }
@media (max-width: 600px) {
  :root { --unit: .5px; }
  body { padding: 0 12px; }
  .wide table { font-size: 11px; }
  .wide td, .wide th { padding-right: 6px; vertical-align: bottom; }
  .wide th { font-size: 9px; hyphens: auto; overflow-wrap: anywhere; }
}
"""


def render_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page.

    Args:
        title: as plain text.
        parts: HTML of the body, in order.
        style: CSS beside `STYLE`.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def render_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1, bars: int = 0
) -> str:
    """A table.

    Args:
        header: HTML of the header's cells; empty for none.
        rows: HTML of the cells.
        texts: so many columns at the left are texts, the others numbers.
        bars: so many columns at the right are bars.
    """

    def render_row(cells: Sequence[str], tag: str) -> str:
        numbers = range(texts, len(cells) - bars)
        kinds = [" class=n" if i in numbers else "" for i in range(len(cells))]
        inner = (f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    head = render_row(header, "th") if header else ""
    return f"<table>{head}{''.join(render_row(row, 'td') for row in rows)}</table>"


def render_bar(share: float, width: int, css: str = "") -> str:
    """A bar of `share` (0 to 1) of so many px; of half as many on a narrow screen."""
    return f'<span class="bar {css}" style="width:calc({width * share:.1f} * var(--unit))"></span>'


def data_uri(data: bytes, kind: str) -> str:
    """An image as the address of itself.

    Args:
        data: encoded image.
        kind: "png" or "jpeg".
    """
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
