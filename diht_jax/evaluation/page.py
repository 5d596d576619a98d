"""The HTML page of a results file: all numbers, and examples of each task.

Examples are drawn at random with a fixed seed, never picked by hand. Protocols return plain data;
the functions in `EXAMPLES` build example sections, `pages/templates/evaluation.html` renders them.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from diht_jax.evaluation.embedding.encoding import EncodedImages
from diht_jax.evaluation.embedding.entries import Unit, decode_picture, read_again
from diht_jax.evaluation.protocols.base import CAPTION_SLOT, Measured, Task
from diht_jax.evaluation.protocols.caption_choice import CaptionChoiceResult
from diht_jax.evaluation.protocols.classification import ClassificationResult
from diht_jax.evaluation.protocols.retrieval import RetrievalResult, have_common_id
from diht_jax.evaluation.results import describe_model, format_value, metric_of, result_rows
from diht_jax.pages.render import render, thumbnail

if TYPE_CHECKING:
    from PIL import Image

# Maps rows of `EncodedImages` to their pictures, as data URIs for the page.
PictureLoader = Callable[[Sequence[int]], dict[int, Any]]

_QUERIES, _ANSWERS = 6, 5
_SAMPLES = 24
_MOST_CONFUSION_CLASSES = 20
_MOST_BARS = 20
_QUESTIONS, _MOST_CAPTIONS = 10, 5


@dataclasses.dataclass
class ResultsPage:
    """The page of a results file, rewritten after each task."""

    path: pathlib.Path  # the HTML file
    sections: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # one per task so far

    def add(
        self,
        task: Task,
        units: Sequence[Unit],
        measured: Measured,
        result: dict[str, Any],
        logit_scale: float,
    ) -> str | None:
        """Adds the examples of a task; returns the page's path, or None for kinds without examples.

        The source units that hold the chosen pictures are read again. If that fails, the page lacks
        the examples of this task; its numbers are kept.
        """
        if task.kind not in EXAMPLES:
            return None
        load = functools.partial(read_pictures, units, measured.encoded)
        try:
            section = EXAMPLES[task.kind](task, measured, load, logit_scale)
        except (ValueError, OSError) as error:
            logging.warning("%s: no examples of task '%s': %s", self.path, task.name, error)
            return None
        cards = []
        for name, value in result["metrics"].items():
            metric = metric_of(result, name)
            cards.append((metric.label, format_value(metric.unit, value)))
        self.sections.append({"name": task.name, "kind": task.kind, "cards": cards, **section})
        return str(self.path)

    def write(self, results: dict[str, Any]) -> None:
        """Writes the page for the contents of a results file."""
        render(
            "evaluation.html",
            self.path,
            title=f"Evaluation of {describe_model(results)}",
            rows=result_rows(results),
            sections=self.sections,
        )


def retrieval_examples(
    task: Task, measured: Measured, load: PictureLoader, logit_scale: float
) -> dict[str, Any]:
    """Returns queries both ways, with the top answers and the best right answer of each."""
    result: RetrievalResult = measured.result
    image_emb, notes = measured.encoded.image_emb, measured.encoded.notes
    texts = draw_rows(len(result.captions), _QUERIES).tolist()
    images = draw_rows(len(image_emb), _QUERIES, seed=1).tolist()
    right_images = have_common_id(result.text_ids[texts], result.image_ids)
    right_texts = have_common_id(result.image_ids[images], result.text_ids)
    found = [
        closest_items(query, image_emb, right)
        for query, right in zip(result.text_emb[texts], right_images, strict=True)
    ]
    pictures = load([item for answers, best in found for item in (*answers, best)] + images)

    def tile(image: int, label: str, right: bool) -> dict[str, Any]:
        caption = notes[image][0]
        return {"picture": pictures[image], "label": label, "caption": caption, "right": right}

    text_queries = []
    for text, is_right, (answers, best) in zip(texts, right_images, found, strict=True):
        rank = int(result.t2i_ranks[text]) + 1
        tiles = [
            tile(image, f"{number}  {cosine:.3f}", bool(is_right[image]))
            for number, (image, cosine) in enumerate(answers.items(), 1)
        ]
        right = None if best in answers else tile(best, f"rank {rank:,}", True)
        text_queries.append(
            {"text": result.captions[text], "rank": rank, "tiles": tiles, "right": right}
        )
    image_queries = []
    for image, is_right in zip(images, right_texts, strict=True):
        answers, best = closest_items(image_emb[image], result.text_emb, is_right)
        rank = int(result.i2t_ranks[image]) + 1
        lines = [
            (number, result.captions[text], f"{cosine:.3f}", bool(is_right[text]))
            for number, (text, cosine) in enumerate(answers.items(), 1)
        ]
        right = None if best in answers else (rank, result.captions[best], "", True)
        query = {"picture": pictures[image], "rank": rank, "lines": lines, "right": right}
        image_queries.append(query)
    template = task.caption_template
    prompt = "no prompt" if template == CAPTION_SLOT else f"prompt “{template}”"
    return {
        "title": f"Retrieval: {task.name}",
        "note": f"{len(image_emb):,} images and {len(result.captions):,} captions of "
        f"{_short_source(task)}, {prompt}. Green is right, red is wrong.",
        "text_queries": text_queries,
        "image_queries": image_queries,
    }


def classification_examples(
    task: Task, measured: Measured, load: PictureLoader, logit_scale: float
) -> dict[str, Any]:
    """Returns classified samples, the confusion matrix of few classes, and per-class accuracy."""
    result: ClassificationResult = measured.result
    names, labels = result.classes.names, result.classes.labels
    chosen = draw_rows(len(result.predictions), _SAMPLES).tolist()
    pictures = load(chosen)
    logits = logit_scale * (measured.encoded.image_emb[chosen] @ result.classifier.T)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    samples = []
    for row, prob in zip(chosen, probs, strict=True):
        predicted = int(result.predictions[row])
        right = predicted == labels[row]
        detail = f"{100 * prob[predicted]:.0f}%" + ("" if right else f", is {names[labels[row]]}")
        sample = {"picture": pictures[row], "label": names[predicted], "right": right}
        samples.append(sample | {"caption": detail})
    bars = [
        (entry["class"], entry["accuracy"], entry["images"])
        for entry in sorted(result.per_class(), key=lambda entry: -(entry["accuracy"] or 0))
        if entry["images"]
    ]
    confusion = None
    if len(names) <= _MOST_CONFUSION_CLASSES:
        counts = result.confusion()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        confusion = list(zip(names, shares.tolist(), strict=True))
        columns = [("Accuracy by class", "", bars)]
    else:
        count = min(len(bars) // 2, _MOST_BARS)
        note = f"{count} of {len(bars):,}"
        worst = bars[len(bars) - count :][::-1]
        columns = [("Best classes", note, bars[:count]), ("Worst classes", note, worst)]
    number = len(result.templates)
    prompt = f"{number} prompts" if number > 1 else f"prompt “{result.templates[0]}”"
    return {
        "title": f"Classification: {task.name}",
        "note": f"{len(labels):,} images of {_short_source(task)}, {len(names):,} classes, "
        f"{prompt}. Green is right, red is wrong.",
        "samples": samples,
        "confusion": confusion,
        "columns": columns,
    }


def caption_choice_examples(
    task: Task, measured: Measured, load: PictureLoader, logit_scale: float
) -> dict[str, Any]:
    """Returns questions with the similarity of each caption, and the least accurate groups."""
    result: CaptionChoiceResult = measured.result
    chosen = draw_rows(len(result.questions), _QUESTIONS).tolist()
    rows = result.image_of_question[chosen].tolist()
    pictures = load(rows)
    questions = []
    for number, row in zip(chosen, rows, strict=True):
        question, cosines = result.questions[number], result.similarities[number]
        right = bool(result.is_right[number])
        by_cosine = 1 + np.argsort(-cosines[1:], kind="stable")
        taken = 0 if right else int(by_cosine[0])
        order: Sequence[int] = range(len(cosines))
        if len(cosines) > _MOST_CAPTIONS:  # the right one, and the most similar wrong ones
            order = [0, *by_cosine[: _MOST_CAPTIONS - 1].tolist()]
        lines = [(question.captions[i], f"{cosines[i]:.3f}", i == 0, i == taken) for i in order]
        asked = {"picture": pictures[row], "right": right, "lines": lines}
        questions.append(asked | {"group": question.group or ""})
    groups = sorted(result.per_group(), key=lambda group: group["accuracy"])[:_MOST_BARS]
    return {
        "title": f"Choice of a caption: {task.name}",
        "note": f"{len(result.questions):,} questions on "
        f"{len(measured.encoded.notes):,} images of {_short_source(task)}. Green is the right "
        "caption, red are wrong ones.",
        "questions": questions,
        "num_groups": len(result.groups),
        "bars": [(group["group"], group["accuracy"], group["questions"]) for group in groups],
    }


# Maps a task kind to the builder of its example section: (task, measured, pictures, logit scale).
EXAMPLES: dict[str, Callable[[Task, Measured, PictureLoader, float], dict[str, Any]]] = {
    "classification": classification_examples,
    "retrieval": retrieval_examples,
    "caption_choice": caption_choice_examples,
}


def draw_rows(population: int, count: int, *, seed: int = 0) -> np.ndarray:
    """Draws up to `count` distinct rows, in increasing order; deterministic for a seed."""
    return np.sort(np.random.default_rng(seed).permutation(population)[:count])


def closest_items(
    query: np.ndarray, gallery: np.ndarray, right: np.ndarray
) -> tuple[dict[int, float], int]:
    """Returns the top items of a gallery with their similarities, and the best right item's index.

    Items are in the order that the ranks use.
    """
    similarities = np.asarray(gallery, np.float32) @ np.asarray(query, np.float32)
    # Among ties the right item comes last, as in the ranks.
    order = np.lexsort((right, -similarities))
    best = order[np.argmax(right[order])]
    first = order[:_ANSWERS]
    return dict(zip(first.tolist(), similarities[first].tolist(), strict=True)), int(best)


def read_pictures(
    units: Sequence[Unit],
    encoded: EncodedImages,
    rows: Sequence[int],
    convert: Callable[[Image.Image], Any] = thumbnail,
) -> dict[int, Any]:
    """Applies `convert` to the pictures of some rows; returns the results by row.

    Reads the source units that hold them again, which avoids keeping all pictures in memory.
    """
    order_of = {row: encoded.orders[row] for row in rows}
    found = read_again(units, order_of.values())
    return {row: convert(decode_picture(found[order])) for row, order in order_of.items()}


def _short_source(task: Task) -> str:
    is_tfds = task.source.startswith("tfds:")
    return task.source if is_tfds else pathlib.PurePath(task.source).name
