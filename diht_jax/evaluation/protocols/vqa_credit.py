"""VQA v2's accuracy of an answer, with the normalisation of the official evaluation code.

The rules are those of `PythonEvaluationTools/vqaEvaluation/vqaEval.py` of GT-Vision-Lab/VQA in its
last state, oddities included: what people said is normalised only where they do not all agree to
the letter, a punctuation mark becomes a space unless it stands next to one (or the answer has a
number such as 1,000), and "somebody'd" loses its apostrophe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32

# Each is restored where exactly one of its apostrophes is missing. Of the others that English has
# ("it's", "we're"), what is left without the apostrophe is a word of its own, and stays.
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
    """VQA v2's accuracy of one answer: mean over people of min(1, other people who agree / 3).

    Args:
        answer: of the model.
        said: what people answered; a single answer (ours) is right or wrong as a whole.
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
    """Lower-case words: no punctuation or articles, number words as digits, contractions whole."""
    text, has_number = answer, _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        is_removed = has_number or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if is_removed else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
