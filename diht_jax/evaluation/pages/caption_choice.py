"""The PNG page of choices between captions.

The questions are drawn at random with a fixed seed, never picked.
"""

from __future__ import annotations

import pathlib
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
    WIDTH,
    Canvas,
    ImageLoader,
    blend,
    draw_header,
    draw_heading,
    draw_sample_indices,
    shorten,
    wrap,
)

if TYPE_CHECKING:
    from diht_jax.evaluation.protocols.caption_choice import CaptionChoiceResult

_SHOWN = 10
_CARD_HEIGHT = 188
_CARD_WIDTH = (WIDTH - 2 * MARGIN - 16) // 2
_MOST_CAPTIONS = 5
_GROUPS = 20
_GROUP_ROW = 22
_BAR_WIDTH = 160


def draw_caption_choice_page(
    result: CaptionChoiceResult,
    load_images: ImageLoader,
    path: pathlib.Path,
    *,
    title: str,
    note: str,
) -> None:
    """Writes a page: questions with the similarity of each caption, and the hardest groups.

    Args:
        result: of `choose_captions`.
        load_images: gives the pictures for positions in the source.
        path: of the PNG.
        title: first line.
        note: second line, such as the source.
    """
    shown = draw_sample_indices(len(result.questions), _SHOWN)
    positions = [result.encoded.positions[result.image_of_question[i]] for i in shown]
    pictures = load_images(sorted(set(positions)))
    groups = sorted(result.describe_groups(), key=lambda group: group["accuracy"])[:_GROUPS]
    rows = -(-len(shown) // 2)
    group_top = CONTENT_TOP + 28 + rows * _CARD_HEIGHT + 16
    group_height = 28 + -(-len(groups) // 2) * _GROUP_ROW if groups else -16
    canvas = Canvas(WIDTH, group_top + group_height + MARGIN - 12)
    labels = {"accuracy": "accuracy", "macro_accuracy": "macro accuracy"}
    cards = [(labels[name], f"{100 * value:.1f}%") for name, value in result.metrics.items()]
    draw_header(canvas, title, note, cards)
    about = f"{len(shown)} drawn at random; in bold the caption that the model takes"
    draw_heading(canvas, CONTENT_TOP, "Questions", about)
    for number, (question, position) in enumerate(zip(shown, positions, strict=True)):
        x = MARGIN + (number % 2) * (_CARD_WIDTH + 16)
        y = CONTENT_TOP + 28 + (number // 2) * _CARD_HEIGHT
        _draw_question(canvas, x, y, result, int(question), pictures[position])
    if groups:
        hardest = f"the {len(groups)} of {len(result.groups)} with the lowest accuracy"
        draw_heading(canvas, group_top, "Groups", hardest)
    for number, group in enumerate(groups):
        x = MARGIN + (number % 2) * (_CARD_WIDTH + 16)
        y = group_top + 28 + (number // 2) * _GROUP_ROW
        canvas.text(x, y, shorten(group["group"], 220, size=12), size=12)
        canvas.box(x + 230, y + 2, _BAR_WIDTH, 12, fill=PANEL)
        if group["accuracy"] > 0:
            filled = max(1, _BAR_WIDTH * group["accuracy"])
            canvas.box(x + 230, y + 2, filled, 12, fill=blend(GREEN, 0.6))
        shares = f"{100 * group['accuracy']:.1f}%  of {group['questions']:,}"
        canvas.text(x + 240 + _BAR_WIDTH, y, shares, size=12, color=GREY)
    canvas.save(path)


def _draw_question(
    canvas: Canvas,
    x: float,
    y: float,
    result: CaptionChoiceResult,
    number: int,
    picture: Image.Image,
) -> None:
    question, similarities = result.questions[number], result.similarities[number]
    is_right = bool(result.is_right[number])
    taken = 0 if is_right else 1 + int(np.argmax(similarities[1:]))
    canvas.box(x, y, _CARD_WIDTH, _CARD_HEIGHT - 14, fill=PANEL, radius=6)
    canvas.picture(x + 12, y + 12, TILE, picture, frame=GREEN if is_right else RED)
    if question.group is not None:
        label = shorten(question.group, TILE, size=11)
        canvas.text(x + 12, y + TILE + 20, label, size=11, color=GREY)
    left = x + TILE + 26
    room = _CARD_WIDTH - TILE - 38
    order = range(len(question.captions))
    if len(question.captions) > _MOST_CAPTIONS:  # the right one, and the most similar others
        order = [0, *(1 + np.argsort(-similarities[1:], kind="stable")[: _MOST_CAPTIONS - 1])]
    max_lines = 4 if len(order) == 2 else 2
    top = y + 12
    for index in order:
        lines = wrap(
            question.captions[index],
            room - 60,
            size=11,
            bold=index == taken,
            max_lines=max_lines,
        )
        height = 14 * max(1, len(lines))
        canvas.box(left, top, 4, height, fill=RED if index else GREEN, radius=2)
        for line_number, line in enumerate(lines):
            line_top = top + 14 * line_number
            canvas.text(left + 10, line_top, line, size=11, bold=index == taken, color=INK)
        similarity = f"{similarities[index]:.3f}"
        canvas.text(left + room, top, similarity, size=10, color=GREY, anchor="ra")
        top += height + 4
