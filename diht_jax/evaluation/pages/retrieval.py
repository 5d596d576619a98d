"""The PNG page of retrieval examples.

The queries are drawn at random with a fixed seed, never picked. Ranks come in with the result,
pictures through a function that loads them.
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
    draw_header,
    draw_heading,
    draw_sample_indices,
    shorten,
    text_width,
    wrap,
)

if TYPE_CHECKING:
    from diht_jax.evaluation.protocols.retrieval import RetrievalResult

_SHOWN = 5
_TEXT_QUERIES = 6
_TEXT_ROW = 166
_QUERY_WIDTH = 204
_TILE_PITCH = 130
_IMAGE_QUERIES = 6
_CARD_HEIGHT = 174


def draw_retrieval_page(
    result: RetrievalResult, load_images: ImageLoader, path: pathlib.Path, *, title: str, note: str
) -> None:
    """Writes a page of retrieval examples: queries both ways, each with its first five answers.

    Right answers are framed green, wrong ones red; a right answer that is not among the five
    stands apart, with its rank.

    Args:
        result: of `retrieve`.
        load_images: gives the pictures for positions in the source.
        path: of the PNG.
        title: first line.
        note: second line, such as the source and the prompt.
    """
    image_emb, positions = result.encoded.image_emb, result.encoded.positions
    image_ids = np.arange(len(image_emb))
    texts = draw_sample_indices(len(result.captions), _TEXT_QUERIES)
    images = draw_sample_indices(len(image_emb), _IMAGE_QUERIES, seed=1)
    t2i, t2i_similarities = closest_items(
        result.text_emb[texts], result.image_of_text[texts], image_emb, image_ids, _SHOWN
    )
    i2t, i2t_similarities = closest_items(
        image_emb[images], images, result.text_emb, result.image_of_text, _SHOWN
    )
    needed = {*t2i.ravel().tolist(), *result.image_of_text[texts].tolist(), *images.tolist()}
    loaded = load_images([positions[i] for i in sorted(needed)])
    pictures = {i: loaded[positions[i]] for i in needed}

    text_top = CONTENT_TOP + 28
    image_top = text_top + len(texts) * _TEXT_ROW + 52
    height = image_top + -(-len(images) // 2) * _CARD_HEIGHT + MARGIN - 12
    canvas = Canvas(WIDTH, height)
    cards = [
        (f"{arrow}  R@{k}", f"{100 * result.metrics[f'{direction}_r{k}']:.1f}%")
        for direction, arrow in (("t2i", "text → image"), ("i2t", "image → text"))
        for k in (1, 5, 10)
    ]
    draw_header(canvas, title, note, cards)
    draw_heading(
        canvas,
        text_top - 28,
        "Text → image",
        f"{len(texts)} captions drawn at random, and the closest images; where the right one is "
        "not among them, it stands on the right",
    )
    for row, text in enumerate(texts):
        _draw_text_query(
            canvas,
            text_top + row * _TEXT_ROW,
            result,
            text,
            t2i[row],
            t2i_similarities[row],
            pictures,
        )
    draw_heading(
        canvas,
        image_top - 28,
        "Image → text",
        f"{len(images)} images drawn at random, and the closest captions",
    )
    for number, image in enumerate(images):
        x = MARGIN + (number % 2) * ((WIDTH - 2 * MARGIN) // 2 + 8)
        y = image_top + (number // 2) * _CARD_HEIGHT
        _draw_image_query(
            canvas, x, y, result, image, i2t[number], i2t_similarities[number], pictures[image]
        )
    canvas.save(path)


def closest_items(
    queries: np.ndarray,
    query_ids: np.ndarray,
    gallery: np.ndarray,
    gallery_ids: np.ndarray,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` items of the gallery for a few queries, in the order the ranks use.

    Args:
        queries: float [q, d]; q is small (the whole [q, m] block is made at once).
        query_ids: int [q]; an item whose id equals the query's is right.
        gallery: float [m, d].
        gallery_ids: int [m].
        count: items per query.

    Returns:
        int [q, count] indices into the gallery, and float [q, count] similarities.
    """
    similarities = np.asarray(queries, np.float32) @ np.asarray(gallery, np.float32).T
    right = np.asarray(query_ids)[:, None] == np.asarray(gallery_ids)[None, :]
    # Among equals the right one goes last, as in the ranks.
    order = np.lexsort((right, -similarities), axis=-1)[:, :count]
    return order, np.take_along_axis(similarities, order, axis=-1)


def _draw_text_query(
    canvas: Canvas,
    y: float,
    result: RetrievalResult,
    text: int,
    answers: np.ndarray,
    similarities: np.ndarray,
    pictures: dict[int, Image.Image],
) -> None:
    own, rank = int(result.image_of_text[text]), int(result.t2i_ranks[text])
    found = own in answers
    canvas.box(MARGIN, y, _QUERY_WIDTH, _TEXT_ROW - 14, fill=PANEL, radius=6)
    lines = wrap(result.captions[text], _QUERY_WIDTH - 24, size=13, bold=True, max_lines=6)
    for number, line in enumerate(lines):
        canvas.text(MARGIN + 12, y + 12 + 18 * number, line, size=13, bold=True)
    canvas.text(
        MARGIN + 12,
        y + _TEXT_ROW - 36,
        f"right image at rank {rank + 1:,}",
        size=11,
        color=GREEN if rank == 0 else RED if not found else GREY,
    )
    first = MARGIN + _QUERY_WIDTH + 16
    for index, (answer, similarity) in enumerate(zip(answers, similarities, strict=True)):
        _draw_tile(
            canvas,
            first + index * _TILE_PITCH,
            y,
            pictures[int(answer)],
            right=answer == own,
            label=f"{index + 1}   {similarity:.3f}",
            caption=result.encoded.notes[answer][0],
        )
    if not found:
        x = first + _SHOWN * _TILE_PITCH
        canvas.line(x + 6, y, x + 6, y + _TEXT_ROW - 14)
        _draw_tile(
            canvas,
            x + 28,
            y,
            pictures[own],
            right=True,
            label=f"rank {rank + 1:,}",
            caption=result.encoded.notes[own][0],
        )


def _draw_tile(
    canvas: Canvas, x: float, y: float, image: Image.Image, *, right: bool, label: str, caption: str
) -> None:
    color = GREEN if right else RED
    canvas.picture(x, y, TILE, image, frame=color)
    canvas.text(x + 2, y + TILE + 4, label, size=10, bold=True, color=color)
    for number, line in enumerate(wrap(caption, TILE + 6, size=9, max_lines=2)):
        canvas.text(x + 2, y + TILE + 18 + 12 * number, line, size=9, color=GREY)


def _draw_image_query(
    canvas: Canvas,
    x: float,
    y: float,
    result: RetrievalResult,
    image: int,
    answers: np.ndarray,
    similarities: np.ndarray,
    picture: Image.Image,
) -> None:
    rank = int(result.i2t_ranks[image])
    right = [result.image_of_text[answer] == image for answer in answers]
    width = (WIDTH - 2 * MARGIN) // 2 - 8
    canvas.box(x, y, width, _CARD_HEIGHT - 14, fill=PANEL, radius=6)
    canvas.picture(x + 12, y + 12, TILE, picture, frame=GREY, line=1)
    color = GREEN if rank == 0 else GREY if any(right) else RED
    canvas.text(x + 14, y + TILE + 20, f"right at rank {rank + 1:,}", size=11, color=color)
    lines = [
        (f"{index + 1}", result.captions[answer], f"{similarity:.3f}", is_right)
        for index, (answer, similarity, is_right) in enumerate(
            zip(answers, similarities, right, strict=True)
        )
    ]
    if not any(right):
        own = np.flatnonzero(result.image_of_text == image)
        best = own[np.argmax(result.text_emb[own] @ result.encoded.image_emb[image])]
        lines.append((f"{rank + 1}", result.captions[best], "", True))
    left = x + TILE + 26
    room = width - TILE - 38
    for number, (position, caption, similarity, is_right) in enumerate(lines):
        top = y + 12 + 23 * number + (4 if number == _SHOWN else 0)
        if number == _SHOWN:
            canvas.line(left, top - 4, left + room, top - 4)
        color = GREEN if is_right else RED
        canvas.box(left, top, 4, 18, fill=color, radius=2)
        position_width = max(
            text_width("0", size=11, bold=True), text_width(position, size=11, bold=True)
        )
        canvas.text(left + 10, top + 2, position, size=11, bold=True, color=color)
        start = left + 18 + position_width
        end = left + room - (44 if similarity else 0)
        shown = shorten(caption, end - start, size=11)
        canvas.text(start, top + 2, shown, size=11, color=INK)
        canvas.text(left + room, top + 3, similarity, size=10, color=GREY, anchor="ra")
