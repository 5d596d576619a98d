"""Accuracy of spaCy's small parser on captions, and the effect of a perfect parser.

    python -m benchmarks.caption_parser
    python -m benchmarks.caption_parser --retrain

`caption_trees.tsv` contains manually corrected trees of web captions. Prints the shares of words
with the correct tag, head, and head and label (without punctuation), and of captions without any
error. Also prints how often the rules agree with judgements of the same captions
(`tests/data_prep/captions/judged_captions.tsv`), on parses and on the corrected trees. With
`--retrain`, tagger and parser are trained on four fifths of the trees and compared with the
installed ones on the last fifth. Writes `benchmarks/results/caption_parser.json`.
"""

from __future__ import annotations

import collections
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import spacy
from absl import flags
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from thinc.api import Adam

from benchmarks.record import write_result
from data_prep.captions.gates import gate_caption
from data_prep.captions.graph import cat_reason
from data_prep.captions.parse import load_parser
from data_prep.captions.sentence import CaptionLemmatizer
from data_prep.captions.verbs import build_graph
from diht_jax import command_line

_TREES = pathlib.Path(__file__).with_name("caption_trees.tsv")
_JUDGED = _TREES.parents[1] / "tests/data_prep/captions/judged_captions.tsv"
_EPOCHS, _BATCH, _LEARNING_RATE, _DROPOUT = 10, 32, 2e-4, 0.25


class Tree(NamedTuple):
    """A tokenised caption and its tree: tag, label and head of each token."""

    line: int
    text: str
    tokens: list[tuple[str, str, int]]


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string(
        "captions", "runs/data/captions_web.txt", "The captions of the trees, one a line."
    )
    flags.DEFINE_bool("retrain", False, "Train tagger and parser on four fifths, compare on one.")


def main() -> None:
    """Measures, prints and writes the results."""
    path = pathlib.Path(flags.FLAGS.captions)
    if not path.is_file():
        raise ValueError(f"--captions='{path}': no such file; expected one caption a line")
    nlp = load_parser()
    words = nlp.get_pipe("caption_lemmatizer")
    trees = read_trees(path.read_text("utf-8").split("\n"), words)
    result: dict[str, Any] = {"trees": len(trees), "installed": score(nlp, trees)}
    result["judged"] = score_judged(nlp, trees, words)
    if flags.FLAGS.retrain:
        held_out = trees[::5]
        learnt = [tree for number, tree in enumerate(trees) if number % 5]
        result["trained"] = {
            "trees": len(learnt),
            "on": len(held_out),
            "installed": score(nlp, held_out),
            "after": score(train(learnt), held_out),
        }
    print(result)
    print(write_result("caption_parser", result))


def read_trees(captions: Sequence[str], words: CaptionLemmatizer) -> list[Tree]:
    """Reads the trees with their captions, in random order.

    Args:
        captions: the lines of captions_web.txt.
        words: the English words, for the gates.

    Raises:
        ValueError: a caption differs from the one that its tree was made for.
    """
    rows = _TREES.read_text("utf-8").splitlines()
    tokenizer = spacy.blank("en")
    trees = []
    for row in rows[[row.startswith("line\t") for row in rows].index(True) + 1 :]:
        line, tokens = row.split("\t")
        text, reason = gate_caption(captions[int(line) - 1], words.lexicon)
        parts = [token.split("/") for token in tokens.split(" ")]
        if reason is not None or len(tokenizer(text)) != len(parts):
            raise ValueError(
                f"{_TREES.name}, line {line}: another caption, or tokens; the trees are those of "
                "the 5,000 captions of the measurement, and of this tokenizer and these gates"
            )
        trees.append(Tree(int(line), text, [(tag, label, int(head)) for tag, label, head in parts]))
    random.Random(0).shuffle(trees)
    return trees


def score(nlp: Language, trees: Sequence[Tree]) -> dict[str, float]:
    """Returns the shares of words and captions for which a pipeline agrees with the trees."""
    right = dict.fromkeys(("tags", "heads", "labelled_heads"), 0)
    num_words = whole = 0
    for doc, tree in zip(nlp.pipe(tree.text for tree in trees), trees, strict=True):
        is_whole = True
        for token, (tag, label, head) in zip(doc, tree.tokens, strict=True):
            if token.is_punct:
                continue
            num_words += 1
            same = token.tag_ == tag, token.head.i == head, token.dep_ == label
            right["tags"] += same[0]
            right["heads"] += same[1]
            right["labelled_heads"] += same[1] and same[2]
            is_whole = is_whole and all(same)
        whole += is_whole
    shares = {name: count / num_words for name, count in right.items()}
    return shares | {"captions": whole / len(trees)}


def score_judged(
    nlp: Language, trees: Sequence[Tree], words: CaptionLemmatizer
) -> dict[str, dict[str, int]]:
    """Counts how often the rules agree with judgements, for draws whose captions all have trees.

    Returns:
        Draw -> number of captions ("count"), and the numbers of decisions and complexities that
        agree with the judgements, on parses ("decisions_parsed", "complexities_parsed") and on the
        corrected trees ("decisions_on_trees", "complexities_on_trees").
    """
    by_line = {tree.line: tree for tree in trees}
    draws: dict[str, list[list[str]]] = {}
    for row in _JUDGED.read_text("utf-8").splitlines():
        if row[0].isdigit():
            draw, *judgement = row.split("\t")
            draws.setdefault(draw, []).append(judgement)
    found = {}
    for draw, rows in draws.items():
        if not all(int(line) in by_line for line, *_ in rows):
            continue
        counts = collections.Counter(count=len(rows))
        drawn = [by_line[int(line)] for line, *_ in rows]
        parsed = nlp.pipe(tree.text for tree in drawn)
        for tree, doc, row in zip(drawn, parsed, rows, strict=True):
            _, decision, _, complexity = row
            docs = {"parsed": doc, "on_trees": words(_make_doc(nlp, tree))}
            for name, read in docs.items():
                graph = build_graph(read, words)
                counts[f"decisions_{name}"] += (cat_reason(graph) is None) == (decision == "keep")
                counts[f"complexities_{name}"] += graph.complexity == int(complexity)
        found[draw] = dict(counts)
    return found


def train(trees: Sequence[Tree]) -> Language:
    """Trains the installed model for some epochs on trees; returns it with averaged parameters."""
    nlp = load_parser()
    examples = list(_make_examples(nlp, trees))
    optimizer = Adam(_LEARNING_RATE, L2=0.0, grad_clip=1.0, use_averages=True)
    spacy.util.fix_random_seed(0)
    for _ in range(_EPOCHS):
        random.shuffle(examples)
        for start in range(0, len(examples), _BATCH):
            batch = [
                Example(nlp.make_doc(example.text), example.reference)
                for example in examples[start : start + _BATCH]
            ]
            nlp.update(batch, drop=_DROPOUT, sgd=optimizer)
    for _, component in nlp.pipeline:
        model = getattr(component, "model", None)
        for node in model.walk() if model is not None else ():
            for name in node.param_names:
                if (node.id, name) in optimizer.averages:
                    node.set_param(name, optimizer.averages[node.id, name])
    return nlp


def _make_examples(nlp: Language, trees: Sequence[Tree]) -> Iterator[Example]:
    for tree in trees:
        yield Example(nlp.make_doc(tree.text), _make_doc(nlp, tree))


def _make_doc(nlp: Language, tree: Tree) -> Doc:
    """Returns a tree as a spaCy parse, without lemmas."""
    tokens = nlp.make_doc(tree.text)
    tags, labels, heads = (list(column) for column in zip(*tree.tokens, strict=True))
    return Doc(
        nlp.vocab,
        words=[token.text for token in tokens],
        spaces=[bool(token.whitespace_) for token in tokens],
        tags=tags,
        deps=labels,
        heads=heads,
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
