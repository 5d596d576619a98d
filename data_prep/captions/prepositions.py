"""Prepositional phrases: the names of prepositions and the objects behind them.

A part of `data_prep.captions.verbs`, which makes them into edges.
"""

from data_prep.captions import lexicon, nouns
from data_prep.captions.sentence import Sentence


def find_prep_targets(sentence: Sentence, i: int) -> list[tuple[str, int]]:
    """(preposition, object) of every prepositional phrase of a verb."""
    found = []
    for kid in sentence.kids[i]:
        if sentence.dep[kid] == "prep":
            found += expand_preposition(sentence, kid)
        elif sentence.dep[kid] in ("advmod", "prt"):
            found += expand_adverb(sentence, kid)
    return found


def find_adjective_targets(sentence: Sentence, adjective: int) -> list[tuple[str, int]]:
    found = find_prep_targets(sentence, adjective)
    if sentence.low[adjective] in lexicon.RELATIONAL_ADJECTIVES:
        return [(f"{sentence.low[adjective]} {name}", target) for name, target in found]
    return found


def expand_adverb(sentence: Sentence, adverb: int) -> list[tuple[str, int]]:
    """The phrases of an adverb that begins a compound preposition ("next to a wall")."""
    return [
        (f"{sentence.low[adverb]} {name}", target)
        for kid in sentence.kids_of(adverb, "prep")
        for name, target in expand_preposition(sentence, kid)
    ]


def expand_preposition(sentence: Sentence, preposition: int) -> list[tuple[str, int]]:
    """(name, object) for each object of a preposition, compound prepositions in one name."""
    low = sentence.low[preposition]
    if low in lexicon.NO_RELATION:
        return []
    found = []
    for kid in sentence.kids[preposition]:
        dep = sentence.dep[kid]
        if dep == "pobj" and nouns.is_place_noun(sentence, kid):
            for inner in sentence.kids_of(kid, "prep"):
                if sentence.low[inner] == "of":
                    found += [
                        (f"{low} {sentence.low[kid]} {name}", target)
                        for name, target in expand_preposition(sentence, inner)
                    ]
        elif dep == "pobj":
            found += [(low, target) for target in nouns.find_referents(sentence, kid)]
        elif dep == "prep":
            compound = not sentence.has_kid(preposition, "pobj")
            found += [
                (f"{low} {name}" if compound else name, target)
                for name, target in expand_preposition(sentence, kid)
            ]
        elif dep == "conj" and sentence.tag[kid] in ("IN", "TO"):
            found += expand_preposition(sentence, kid)
    return found
