"""Draws the pipeline with pairs of the demo: the filter, a label, and a search.

    bash run_demo.sh
    python -m benchmarks.pipeline_picture     # writes docs/images/pipeline.svg

Pairs, reasons, counts and labels come from the output folder of `run_demo.sh`. Its last model runs
the search among the 500 held-out scenes. The metrics are those of `benchmarks/results/demo.json`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import pathlib
import tarfile
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from PIL import Image

import diht_jax
from benchmarks.record import RESULTS
from data_prep.decisions.report import read_report
from data_prep.reports.page import pairs_to_show
from diht_jax import command_line
from diht_jax.data.tfrecord import TFRecordSource
from diht_jax.records.labels.shards import decode_label, open_labels
from diht_jax.records.schema import decode_record
from diht_jax.storage.files import write_bytes

_PICTURE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "images" / "pipeline.svg"
# Outcome in the report -> its text in the picture, and the number of pairs to show.
_SHOWN = {
    "Kept": ("kept", 2),
    "Dropped, caption: file name": ("a file name", 1),
    "Dropped, caption: C: complexity": ("no attribute", 1),
    "Dropped, caption: A: no action": ("no action", 1),
    "Dropped, text: T: shows its caption": ("shows caption", 1),
}
_KEPT, _DROPPED, _INK, _GREY, _LINE = "#1a7f37", "#cf222e", "#1f2328", "#57606a", "#d0d7de"
_WIDTH, _CARD, _GAP, _LEFT = 760, 114, 10, 13
_MOST_WORDS = 9  # of a caption that fits its card
_MATCHES = 4
_TOP, _SECOND = 66, 306  # positions of the two rows of images
_HEIGHT = 440
_HEAD = f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" \
height="{_HEIGHT}" font-family="sans-serif" font-size="13" fill="{_INK}" role="img">
<title>Pairs that the filter keeps and drops, a label of the teacher, and a search</title>
<rect x="0.5" y="0.5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" rx="6" fill="#ffffff" \
stroke="{_LINE}"/>"""


class Card(NamedTuple):
    """A pair with its outcome."""

    image: bytes
    caption: str
    verdict: str
    count: int
    is_kept: bool


class Label(NamedTuple):
    """Image of a kept pair with its most likely concepts: name and probability."""

    image: bytes
    concepts: list[tuple[str, float]]


class Search(NamedTuple):
    """Caption of a held-out scene, and the images found, the correct one first."""

    query: str
    images: list[bytes]


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("demo", "demo_output", "Folder of run_demo.sh.")
    flags.DEFINE_string("output", str(_PICTURE), "The picture (SVG).")


def main() -> None:
    """Draws and writes the picture."""
    folder = pathlib.Path(flags.FLAGS.demo)
    report = read_report(folder / "filtered")
    students = json.loads((RESULTS / "demo.json").read_text())["students"]
    shares = [students[name]["scenes t2i_r10"]["percent"] for name in students]
    parts = [
        *_draw_filter(read_cards(report), report["counts"]),
        *_draw_label(read_label(folder)),
        *_draw_search(search(folder), shares[0], shares[-1]),
    ]
    text = "\n".join([_HEAD, *parts, "</svg>", ""])
    write_bytes(pathlib.Path(flags.FLAGS.output), text.encode())
    print(f"{flags.FLAGS.output}: {len(text):,} bytes")


def read_cards(report: dict[str, Any]) -> list[Card]:
    """Selects pairs with short captions for each outcome shown."""
    counts = _count_outcomes(report)
    cards = []
    for title, pairs in pairs_to_show(report):
        if title in _SHOWN:
            verdict, number = _SHOWN[title]
            short = [p for p in pairs if len(p["caption"].split()) <= _MOST_WORDS]
            for pair in short[:number]:
                image = base64.b64decode(pair["image"])
                cards.append(Card(image, pair["caption"], verdict, counts[title], title == "Kept"))
    return cards


def _count_outcomes(report: dict[str, Any]) -> dict[str, int]:
    dropped = report["counts"]["dropped"]
    return {
        "Kept": report["counts"]["kept"],
        "Dropped, caption: file name": dropped["caption"]["file_name"],
        "Dropped, caption: C: complexity": dropped["caption"]["complexity"],
        "Dropped, caption: A: no action": dropped["caption"]["no_action"],
        "Dropped, text: T: shows its caption": dropped["text"]["shows_caption"],
    }


def read_label(folder: pathlib.Path) -> Label:
    """Selects the kept pair with the most confident first object and first attribute."""
    records = TFRecordSource(str(folder / "filtered"))
    labels = open_labels(str(folder / "labelled"), records, "--demo")
    names = [
        [line.split("\t")[1] for line in path.read_text("utf-8").splitlines()[2:]]
        for path in (
            folder / "labelled" / f"vocabulary_{kind}.tsv" for kind in ("objects", "attributes")
        )
    ]
    best = None
    for data, label in zip(records, labels, strict=True):
        record = decode_record(data)
        found = decode_label(label, record.key)
        concepts = [
            (kind[i], float(p))
            for kind, (ids, probs) in zip(names, found, strict=True)
            for i, p in zip(ids[:3], probs[:3], strict=True)
        ]
        sure = min(concepts[0][1], concepts[3][1])
        if best is None or sure > best[0]:
            best = sure, Label(record.image, concepts)
    return best[1]


def search(folder: pathlib.Path) -> Search:
    """Selects the first held-out caption whose image the last student ranks first."""
    names, images, captions = [], [], []
    with tarfile.open(folder / "web" / "val_retrieval.tar") as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name.endswith(".txt"):
                captions.append(data.decode())
            elif member.name.rpartition(".")[2] in ("jpg", "png"):
                names.append(member.name)
                images.append(data)
    model = diht_jax.load_model(str(folder / "filtered_concepts"))
    image_emb = model.encode_image([Image.open(io.BytesIO(data)) for data in images])
    order = np.argsort(-(model.encode_text(captions) @ image_emb.T), axis=1)[:, :_MATCHES]
    query = next(i for i, found in enumerate(order) if found[0] == i)
    return Search(captions[query], [images[i] for i in order[query]])


def _draw_filter(cards: Sequence[Card], counts: dict[str, Any]) -> Iterator[str]:
    """Draws the first row: a card for each pair."""
    yield _heading(_LEFT, 30, "1", "data_prep.filter", "keeps or drops each pair, for a reason")
    yield _text(
        _WIDTH - _LEFT, 30, f"{counts['read']:,} pairs in, {counts['kept']:,} out", anchor="end"
    )
    for number, card in enumerate(cards):
        x, color = _LEFT + number * (_CARD + _GAP), _KEPT if card.is_kept else _DROPPED
        yield (
            f'<rect x="{x}" y="{_TOP - 20}" width="{_CARD}" height="208" rx="6" fill="#f6f8fa" '
            f'stroke="{color}"/>'
        )
        mark = "\u2713 kept" if card.is_kept else f"\u2717 {card.verdict}"
        yield _text(x + _CARD / 2, _TOP - 4, mark, color=color, anchor="middle", size=11, bold=True)
        yield _image(card.image, x + 9, _TOP + 4, _CARD - 18)
        lines = textwrap.wrap(card.caption, 17)
        for row, line in enumerate(lines):
            yield _text(x + _CARD / 2, _TOP + 118 + 14 * row, line, anchor="middle", size=11)
        count = f"{card.count:,} pairs"
        yield _text(x + _CARD / 2, _TOP + 181, count, anchor="middle", size=10, color=_GREY)


def _draw_label(label: Label) -> Iterator[str]:
    """Draws the left of the second row: the teacher's concepts for an image."""
    yield _heading(_LEFT, _SECOND - 14, "2", "data_prep.label", "what a teacher sees")
    yield _image(label.image, _LEFT, _SECOND, 104)
    for row, (name, probability) in enumerate(label.concepts):
        y = _SECOND + 12 + 18 * row
        yield _text(_LEFT + 114, y, name, size=11)
        width = 110 * probability
        yield (
            f'<rect x="{_LEFT + 170}" y="{y - 9}" width="{width:.1f}" height="10" rx="2" '
            f'fill="#54aeff"/>'
        )
        share = f"{100 * probability:.0f}%"
        yield _text(_LEFT + 176 + width, y, share, size=10, color=_GREY)


def _draw_search(found: Search, before: float, after: float) -> Iterator[str]:
    """Draws the right of the second row: images found by the trained model."""
    x, side = 384, 84
    yield _heading(x, _SECOND - 14, "3", "diht_jax.train, then search", "")
    yield _text(x, _SECOND + 8, f"\u201c{found.query}\u201d", size=11)
    for number, image in enumerate(found.images):
        left = x + number * (side + 9)
        yield _image(image, left, _SECOND + 18, side)
        if number == 0:
            yield (
                f'<rect x="{left}" y="{_SECOND + 18}" width="{side}" height="{side}" fill="none" '
                f'stroke="{_KEPT}" stroke-width="3"/>'
            )
    shares = f"right picture among the first ten of 500: raw pairs {before}%, all parts {after}%"
    yield _text(_WIDTH - _LEFT, _HEIGHT - 12, shares, size=11, color=_GREY, anchor="end")


def _heading(x: float, y: float, number: str, command: str, text: str) -> str:
    return (
        f'<circle cx="{x + 9}" cy="{y - 5}" r="9" fill="{_INK}"/>'
        + _text(x + 9, y - 1, number, color="#ffffff", anchor="middle", size=11, bold=True)
        + f'<text x="{x + 25}" y="{y}"><tspan font-weight="bold">{command}</tspan> {text}</text>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    color: str = _INK,
    anchor: str = "start",
    size: int = 13,
    bold: bool = False,
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{color}"'
        f"{weight}>{html.escape(text)}</text>"
    )


def _image(data: bytes, x: float, y: float, side: float) -> str:
    kind = Image.open(io.BytesIO(data)).format.lower()
    encoded = base64.b64encode(data).decode()
    return (
        f'<image x="{x:g}" y="{y:g}" width="{side}" height="{side}" '
        f'href="data:image/{kind};base64,{encoded}"/>'
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
