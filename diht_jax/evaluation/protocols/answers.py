"""Zero-shot question answering by the most similar filled prompt: SNLI-VE and VQA v2.

DiHT (arXiv 2301.02280) reports both, but its prompts are not public. The protocols here are our
own:
- **Entailment**: the hypothesis is put into one prompt per relation, and the prompt most similar to
  the image wins (`ENTAILMENT_PROMPTS`). Accuracy.
- **VQA**: every candidate answer is put into the prompt with the question. Accuracy as VQA
  v2 defines it (`vqa_credit`), with the normalisation of the official evaluation code.

Each image is embedded once. A question and its answers are embedded once for all its images.

The accuracy rules follow `PythonEvaluationTools/vqaEvaluation/vqaEval.py` of GT-Vision-Lab/VQA in
its latest version, including its oddities: people's answers are only normalised if they are not all
identical; a punctuation mark becomes a space unless it is next to one (or the answer has a number
such as 1,000); and "somebody'd" loses its apostrophe.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.encoding import Encoder, UnusablePair
from diht_jax.evaluation.protocols.base import (
    Measured,
    Metric,
    Protocol,
    Task,
    check_has_class_names,
    parse_templates,
    parse_text,
    read_class_names,
)
from diht_jax.records.schema import Pair
from diht_jax.terminal import ProgressBar

ENTAILMENT_PROMPTS = {
    "entailment": "{}",
    "neutral": "maybe {}",
    "contradiction": "it is not true that {}",
}
ANSWER_TEMPLATE = "question: {question} answer: {answer}"


def run_entailment(task: Task, encoder: Encoder) -> Measured:
    """Predicts the relation for every row that has `sentence` and `label`."""
    prompts = dict(zip(ENTAILMENT_PROMPTS, task.templates, strict=True))

    def check(row: dict[str, Any]) -> bool:
        if row["label"] not in prompts:
            raise ValueError(f"label '{row['label']}': expected one of {', '.join(prompts)}")
        return True

    return _answer(
        encoder,
        ("sentence", "label"),
        check,
        list(prompts),
        lambda sentence, relation: prompts[relation].replace("{}", sentence),
        lambda row, answer: float(row["label"] == answer),
        {"prompts": prompts, "decision": "the prompt most similar to the image"},
    )


def run_vqa(task: Task, encoder: Encoder) -> Measured:
    """Selects among candidate answers, the task's class names, for every row with `question`.

    `answer` of a row lists people's answers; a row without it (a test split) is left out.
    """
    template = task.options.get("answer_template", ANSWER_TEMPLATE)

    def has_answer(row: dict[str, Any]) -> bool:
        said = row.get("answer")
        texts = said if isinstance(said, list) else [said]
        if said and not all(isinstance(text, str) for text in texts):
            raise ValueError(f"expected a text, or a list of texts, as 'answer', got {said!r:.80}")
        return bool(said)

    return _answer(
        encoder,
        ("question",),
        has_answer,
        list(task.names),
        lambda text, answer: template.replace("{question}", text).replace("{answer}", answer),
        lambda row, answer: vqa_credit(answer, row["answer"]),
        {
            "answer_template": template,
            "candidates": len(task.names),
            "decision": "the answer whose prompt is most similar to the image",
            "accuracy": "VQA v2's, answers normalised as in its official evaluation code",
        },
    )


def _answer(
    encoder: Encoder,
    needed: tuple[str, ...],
    is_usable: Callable[[dict[str, Any]], bool],
    choices: list[str],
    fill: Callable[[str, str], str],
    credit: Callable[[dict[str, Any], str], float],
    protocol: dict[str, Any],
) -> Measured:
    """Answers the rows of `annotations.annotation_units`; resampled items are the images."""

    def describe(pair: Pair) -> list[dict[str, Any]]:
        rows = pair.metadata["rows"]
        for row in rows:
            for field in needed:
                if not isinstance(row.get(field), str):
                    raise ValueError(f"record '{pair.key}': expected a text as '{field}' in {row}")
        try:
            usable = [row for row in rows if is_usable(row)]
        except ValueError as error:
            raise ValueError(f"record '{pair.key}': {error}") from error
        if not usable:
            raise UnusablePair("no_answer")
        return usable

    encoded = encoder.images(describe)
    rows = [(image, row) for image, note in enumerate(encoded.notes) for row in note]
    texts = [row[needed[0]] for _, row in rows]
    images = np.array([image for image, _ in rows], np.int32)
    answers = _choose(encoder, encoded.image_emb[images], texts, choices, fill)
    credits = np.array(
        [credit(row, answer) for (_, row), answer in zip(rows, answers, strict=True)]
    )

    return Measured(
        encoded=encoded,
        num_items=len(encoded.notes),
        measure=lambda counts: {"accuracy": float(np.average(credits, weights=counts[images]))},
        protocol=protocol,
        counts={
            "images": len(encoded.notes),
            "questions": len(answers),
            "texts": len(set(texts)) * len(choices),
        },
        result=answers,
    )


def _choose(
    encoder: Encoder,
    image_emb: np.ndarray,
    texts: Sequence[str],
    choices: Sequence[str],
    fill: Callable[[str, str], str],
) -> list[str]:
    """Returns the choice whose prompt is most similar to the image, for each (image, text)."""
    by_text: dict[str, list[int]] = collections.defaultdict(list)
    for number, text in enumerate(texts):
        by_text[text].append(number)
    distinct = list(by_text)
    batching = encoder.batching
    at_once = max(1, batching.batch_size // len(choices))
    starts = range(0, len(distinct), at_once)
    hidden = not batching.progress or len(starts) < 2
    answers = [""] * len(texts)
    for start in ProgressBar(starts, "questions", unit=" batches", disable=hidden):
        part = distinct[start : start + at_once]
        prompts = [fill(text, choice) for text in part for choice in choices]
        prompts += [""] * (at_once * len(choices) - len(prompts))  # one shape, compiled once
        text_emb = encoder.texts(prompts)
        for index, text in enumerate(part):
            own = text_emb[index * len(choices) : (index + 1) * len(choices)]
            best = (image_emb[by_text[text]] @ own.T).argmax(axis=1)
            for number, choice in zip(by_text[text], best, strict=True):
                answers[number] = choices[choice]
    return answers


def _parse_answer_template(value: Any) -> str:
    """Returns the template; raises ValueError if it lacks "{question}" or "{answer}"."""
    template = parse_text(value)
    if template.count("{question}") != 1 or template.count("{answer}") != 1:
        raise ValueError(
            f"answer template {template!r}: expected '{{question}}' and '{{answer}}' once each, "
            f"such as '{ANSWER_TEMPLATE}'"
        )
    return template


def _check_three_prompts(task: Task) -> None:
    if len(task.templates) != len(ENTAILMENT_PROMPTS):
        raise ValueError(
            f"expected {len(ENTAILMENT_PROMPTS)} templates, for {', '.join(ENTAILMENT_PROMPTS)}; "
            f"got {list(task.templates)}"
        )


_ARTICLES = {"a", "an", "the"}
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32

# Restored if exactly one of their apostrophes is missing. Other English contractions ("it's",
# "we're") are not in the list: without the apostrophe they are words of their own.
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
"""
_RESTORED = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _CONTRACTIONS.split()
    for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def vqa_credit(answer: str, said: str | Sequence[str]) -> float:
    """Returns VQA v2's accuracy of an answer: mean over people of min(1, others who agree / 3).

    If `said` is a single answer, the result is 0 or 1 (our extension).
    """
    said = [said] if isinstance(said, str) else said
    answer, *said = (" ".join(re.split("[\n\t]", text)).strip() for text in (answer, *said))
    if len(said) == 1 or len(set(said)) > 1:
        answer, *said = (normalise_answer(text) for text in (answer, *said))
    agree = np.array([text == answer for text in said])
    if len(said) == 1:
        return float(agree[0])
    return float(np.minimum(1.0, (agree.sum() - agree) / 3).mean())


def normalise_answer(answer: str) -> str:
    """Normalises an answer: lower case, no punctuation or articles, number words as digits."""
    text, has_number = answer, _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        is_removed = has_number or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if is_removed else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


_METRICS = {"accuracy": Metric("share", "accuracy")}
ENTAILMENT = Protocol(
    run=run_entailment,
    metrics=_METRICS,
    options={"templates": parse_templates},
    defaults={"templates": tuple(ENTAILMENT_PROMPTS.values())},
    check=_check_three_prompts,
    reader="annotations",
)
VQA = Protocol(
    run=run_vqa,
    metrics=_METRICS,
    options={
        "class_names": read_class_names,
        "answer_template": _parse_answer_template,
    },
    check=lambda task: check_has_class_names(task, "candidate answers"),
    reader="annotations",
)
