"""The PNG page of a classification: samples, confusions, and the accuracy of the classes.

The samples are drawn at random with a fixed seed, never picked. Predictions come in with the
result, pictures through a function that loads them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diht_jax.evaluation.pages.canvas import (
    CONTENT_TOP,
    GREEN,
    GREY,
    INK,
    MARGIN,
    PANEL,
    RED,
    TILE,
    WHITE,
    WIDTH,
    Canvas,
    ImageLoader,
    blend,
    draw_header,
    draw_heading,
    draw_sample_indices,
    shorten,
    text_width,
)

if TYPE_CHECKING:
    from diht_jax.evaluation.protocols.classification import ClassificationResult

_SAMPLES = 24
_SAMPLE_COLUMNS = 8
_SAMPLE_ROW = 164
_MOST_CONFUSION_CLASSES = 20
_CONFUSION_WIDTH, _CONFUSION_HEIGHT = 580, 480
_MOST_BARS = 20
_BAR_ROW = 22
_GAP = 40


def draw_classification_page(
    result: ClassificationResult,
    load_images: ImageLoader,
    path: pathlib.Path,
    *,
    logit_scale: float,
    title: str,
    note: str,
) -> None:
    """Writes a page with classified samples, the confusions, and the accuracy of the classes.

    Args:
        result: of `classify`.
        load_images: gives the pictures for positions in the source.
        path: of the PNG.
        logit_scale: turns cosine similarities into the probabilities under the samples.
        title: first line.
        note: second line, such as the source and the prompts.
    """
    names = result.classes.names
    samples = draw_sample_indices(len(result.predictions), _SAMPLES)
    per_class = [entry for entry in result.per_class() if entry["images"]]
    per_class.sort(key=lambda entry: -entry["accuracy"])
    with_confusion = len(names) <= _MOST_CONFUSION_CLASSES
    samples_top = CONTENT_TOP + 28
    charts_top = samples_top + -(-len(samples) // _SAMPLE_COLUMNS) * _SAMPLE_ROW + 44
    num_bars = min(len(per_class) if with_confusion else len(per_class) // 2, _MOST_BARS)
    charts_height = num_bars * _BAR_ROW
    if with_confusion:
        charts_height = max(charts_height, _confusion_size(names)[2])
    canvas = Canvas(WIDTH, round(charts_top + charts_height + MARGIN))
    cards = [
        (label, f"{100 * result.metrics[name]:.1f}%")
        for name, label in (("top1", "top-1"), ("top5", "top-5"), ("mean_per_class", "class mean"))
        if name in result.metrics
    ]
    cards += [("images", f"{len(result.predictions):,}"), ("classes", f"{len(names):,}")]
    draw_header(canvas, title, note, cards)
    _draw_samples(canvas, samples_top, result, samples, load_images, logit_scale)
    if with_confusion:
        draw_heading(canvas, charts_top - 28, "Confusions", "% of the class of the row")
        _draw_confusion(canvas, MARGIN, charts_top, names, result.confusion())
        x = MARGIN + _CONFUSION_WIDTH + _GAP
        draw_heading(canvas, charts_top - 28, "Accuracy by class", "", x=x)
        _draw_bars(canvas, x, charts_top, WIDTH - MARGIN - x, per_class)
    else:
        half = (WIDTH - 2 * MARGIN - _GAP) // 2
        for x, heading, entries in (
            (MARGIN, "Best classes", per_class[:num_bars]),
            (MARGIN + half + _GAP, "Worst classes", per_class[-num_bars:][::-1]),
        ):
            draw_heading(canvas, charts_top - 28, heading, f"{num_bars} of {len(per_class):,}", x=x)
            _draw_bars(canvas, x, charts_top, half, entries)
    canvas.save(path)


def _draw_samples(
    canvas: Canvas,
    y: float,
    result: ClassificationResult,
    samples: np.ndarray,
    load_images: ImageLoader,
    logit_scale: float,
) -> None:
    positions = [result.encoded.positions[i] for i in samples]
    pictures = load_images(positions)
    logits = logit_scale * (result.encoded.image_emb[samples] @ result.classifier.T)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    draw_heading(canvas, y - 28, "Samples", f"{len(samples)} images drawn at random")
    for number, (sample, position) in enumerate(zip(samples, positions, strict=True)):
        prediction, label = result.predictions[sample], result.classes.labels[sample]
        _draw_sample(
            canvas,
            MARGIN + (number % _SAMPLE_COLUMNS) * (WIDTH - 2 * MARGIN - TILE) / 7,
            y + (number // _SAMPLE_COLUMNS) * _SAMPLE_ROW,
            pictures[position],
            predicted=result.classes.names[prediction],
            prob=probs[number, prediction],
            right_name=None if prediction == label else result.classes.names[label],
        )


def _draw_sample(
    canvas: Canvas,
    x: float,
    y: float,
    image: Image.Image,
    *,
    predicted: str,
    prob: float,
    right_name: str | None,
) -> None:
    color = GREEN if right_name is None else RED
    canvas.picture(x, y, TILE, image, frame=color)
    name = shorten(predicted, TILE, size=11, bold=True)
    canvas.text(x + 2, y + TILE + 4, name, size=11, bold=True, color=color)
    detail = f"{100 * prob:.0f}%" + ("" if right_name is None else f", is {right_name}")
    detail = shorten(detail, TILE + 6, size=10)
    canvas.text(x + 2, y + TILE + 20, detail, size=10, color=GREY)


def _confusion_size(names: Sequence[str]) -> tuple[list[str], float, float]:
    """The names as shown, the side of a cell, and the height of the whole table."""
    shown = [shorten(name, 110, size=11) for name in names]
    label_room = max(text_width(name, size=11) for name in shown) + 10
    room = min(_CONFUSION_WIDTH, _CONFUSION_HEIGHT) - label_room
    cell = min(room / len(names), 52)
    return shown, cell, label_room + cell * len(names)


def _draw_confusion(
    canvas: Canvas, x: float, y: float, names: Sequence[str], counts: np.ndarray
) -> None:
    shown, cell, height = _confusion_size(names)
    label_room = height - cell * len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row, name in enumerate(shown):
        middle = y + label_room + (row + 0.5) * cell
        canvas.text(x + label_room - 8, middle, name, size=11, anchor="rm")
        canvas.vertical_text(x + label_room + (row + 0.5) * cell, y + label_room - 6, name, size=11)
        for column, share in enumerate(shares[row]):
            left = x + label_room + column * cell
            color = GREEN if row == column else RED
            canvas.box(
                left + 1,
                middle - cell / 2 + 1,
                cell - 2,
                cell - 2,
                fill=blend(color, 0.15 + 0.85 * share) if share else PANEL,
                radius=2,
            )
            if share >= 0.005 and cell >= 20:
                canvas.text(
                    left + cell / 2,
                    middle,
                    f"{100 * share:.0f}",
                    size=10,
                    anchor="mm",
                    color=WHITE if share > 0.55 else INK,
                )


def _draw_bars(canvas: Canvas, x: float, y: float, width: float, entries: Sequence[dict]) -> None:
    names = [shorten(entry["class"], 150, size=11) for entry in entries]
    label_room = max(text_width(name, size=11) for name in names) + 10
    bar_room = width - label_room - 84
    for row, (name, entry) in enumerate(zip(names, entries, strict=True)):
        middle = y + (row + 0.5) * _BAR_ROW
        canvas.text(x + label_room - 8, middle, name, size=11, anchor="rm")
        canvas.box(x + label_room, middle - 7, bar_room, 14, fill=PANEL, radius=3)
        length = bar_room * entry["accuracy"]
        if length >= 1:
            canvas.box(
                x + label_room, middle - 7, length, 14, fill=GREEN, radius=min(3, length / 2)
            )
        canvas.text(
            x + width,
            middle,
            f"{100 * entry['accuracy']:.1f}%  of {entry['images']:,}",
            size=10,
            color=GREY,
            anchor="rm",
        )
