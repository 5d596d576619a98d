"""Corrections to the parse where the small English model goes astray on captions.

Captions are mostly noun phrases, and the model was trained on sentences. Each rule corrects a kind
of error seen in web captions: here wrong tags and words that are no verbs, in `hidden_verbs` verbs
that were not seen. What a correct parse means is not decided here.
"""

from data_prep.captions import lexicon
from data_prep.captions.hidden_verbs import (
    HIDDEN_VERB_TAGS,
    NOMINAL,
    correct_hidden_verb,
    has_thing,
)
from data_prep.captions.lemmas import CaptionLemmatizer
from data_prep.captions.sentence import ADJECTIVE_TAGS, MODIFIERS, NOUN_TAGS, VERB_TAGS, Sentence

_DOUBTFUL_TAGS = NOUN_TAGS | ADJECTIVE_TAGS | {"PRP", "UH"}
_VERB_COMPLEMENTS = ("dobj", "prep", "ccomp", "xcomp", "acomp", "attr", "prt", "aux", "advmod")


def repair_sentence(sentence: Sentence, words: CaptionLemmatizer) -> None:
    """Corrects a parse in place.

    Args:
      sentence: the parsed caption.
      words: the English words.
    """
    for i in range(len(sentence)):
        if sentence.dep[i] == "prt" and sentence.has_kid(i, "pobj"):
            sentence.dep[i] = "prep"
        if sentence.tag[i] in VERB_TAGS:
            if sentence.dep[i] not in MODIFIERS:
                _correct_verb(sentence, i, words)
        elif sentence.tag[i] in _DOUBTFUL_TAGS:
            _correct_tag(sentence, i, words)
    for i in range(1, len(sentence)):
        if sentence.tag[i] in HIDDEN_VERB_TAGS:
            correct_hidden_verb(sentence, i, words)


def _correct_tag(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Corrects nouns, adjectives and interjections by what English has them as.

    "Wooden" at the start is no name, "Boy" no interjection, "politician" no adjective.
    """
    low, tag = sentence.low[i], sentence.tag[i]
    if tag in NOUN_TAGS:
        if sentence.dep[i] in MODIFIERS and low in words.adjectives:
            if low not in words.nouns or (tag == "NNP" and sentence.dep[i] == "amod"):
                sentence.tag[i] = "JJ"
        elif sentence.dep[i] == "pcomp":
            sentence.dep[i] = "pobj"
    elif tag in ADJECTIVE_TAGS:
        if low in words.nouns and (
            low not in words.adjectives
            or (
                sentence.dep[i] in NOMINAL
                and (low in lexicon.ANIMATE_NOUNS or _has_article(sentence, i))
            )
        ):
            sentence.tag[i] = "NN"
    elif tag == "PRP":
        if low not in lexicon.PRONOUNS and low in words.nouns:
            sentence.tag[i] = "NN"
    elif tag == "UH" and low in lexicon.ANIMATE_NOUNS:
        sentence.tag[i] = "NN"
        if sentence.tag[sentence.head[i]] in VERB_TAGS and sentence.head[i] > i:
            sentence.dep[i] = "nsubj"


def _has_article(sentence: Sentence, i: int) -> bool:
    return any(sentence.low[kid] in ("a", "an") for kid in sentence.kids_of(i, "det"))


def _correct_verb(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Takes back the tag of a verb from words that are no verbs in this position.

    Nouns ("goat on the grass", "studio shot of"), places ("person, left, and"), adjectives and
    participles before a bare noun ("wet stones", "stacked pipes", "picture of sleeping cats").
    """
    low, lemma = sentence.low[i], sentence.lemma[i]
    following = sentence.low[i + 1] if i + 1 < len(sentence) else ""
    if low == "left" and i and sentence.low[i - 1] in (",", "(") and not following.isalpha():
        sentence.tag[i] = "RB"
        return
    if (
        (following == "of" and (low in lexicon.PICTURE_NOUNS or low in lexicon.COUNTING_WORDS))
        or low in lexicon.DESCRIBING_NOUNS
        or (lemma not in words.verbs and (low in words.nouns or lemma in words.nouns))
        or (lemma in words.nouns and (_names_part(sentence, i) or _stands_in_list(sentence, i)))
    ):
        sentence.tag[i] = "NN" if low in words.nouns else "NNS"
        if low in words.nouns:
            sentence.lemma[i] = low
        if i and sentence.dep[i - 1] == "nsubj" and sentence.head[i - 1] == i:
            sentence.dep[i - 1] = "compound"
        return
    if sentence.tag[i] == "VBP" and _reads_as_name(sentence, i) and low in words.nouns:
        sentence.tag[i] = "NN"
        sentence.lemma[i] = low
        sentence.dep[i - 1] = "compound"
        return
    if sentence.tag[i] == "VBG" and sentence.dep[i] == "conj" and _joins_pair(sentence, i):
        return
    things = sentence.kids_of(i, "dobj")
    if things and _describes_thing(sentence, i, things[0], words):
        sentence.tag[i] = "JJ"
        sentence.lemma[i] = low
        if sentence.dep[i] == "pcomp":
            sentence.dep[i] = "pobj"
        _replace(sentence, i, things[0])
        sentence.attach(i, things[0], "amod")


def _stands_in_list(sentence: Sentence, i: int) -> bool:
    """Whether a finite form is one of a list of nouns ("temples, ruins and a shower")."""
    if sentence.tag[i] not in ("VB", "VBP", "VBZ") or sentence.has_kid(i, *_VERB_COMPLEMENTS):
        return False
    subjects = sentence.kids_of(i, "nsubj")
    if any(sentence.lemma[kid] in lexicon.ANIMATE_NOUNS for kid in subjects):
        return False
    head = sentence.head[i]
    if sentence.dep[i] == "conj" and sentence.tag[head] in NOUN_TAGS:
        thing = sentence.lemma[head] not in lexicon.ANIMATE_NOUNS
        return sentence.tag[i] != "VBZ" or (thing and sentence.tag[head] == "NNS")
    if subjects and sentence.tag[i] == "VBZ" and sentence.low[i - 1] == ",":
        return True
    # A plural subject does not take a form in -s.
    return bool(subjects) and sentence.tag[i] == "VBZ" and sentence.tag[subjects[0]] == "NNS"


def _names_part(sentence: Sentence, i: int) -> bool:
    """Whether a finite form has an article, or "of" behind it: "the stone ruins of a villa"."""
    if sentence.has_kid(i, "det") and sentence.tag[i] in ("VB", "VBP", "VBZ"):
        return True
    subjects = sentence.kids_of(i, "nsubj")
    return (
        sentence.tag[i] == "VBZ"
        and i + 1 < len(sentence)
        and sentence.low[i + 1] == "of"
        and subjects == [i - 1]
        and sentence.lemma[i - 1] not in lexicon.ANIMATE_NOUNS
    )


def _reads_as_name(sentence: Sentence, i: int) -> bool:
    """Whether a base form behind a singular thing is a noun with it ("logo design for a shop")."""
    return (
        i > 0
        and sentence.dep[i - 1] == "nsubj"
        and sentence.head[i - 1] == i
        and sentence.tag[i - 1] in ("NN", "NNP")
        and sentence.lemma[i - 1] not in lexicon.ANIMATE_NOUNS
        and not sentence.has_kid(i, "aux", "ccomp", "xcomp")
        and not has_thing(sentence, i)
        and len(sentence.kids_of(i, "nsubj")) == 1
    )


def _joins_pair(sentence: Sentence, i: int) -> bool:
    """Gives the verb of "a boy and his dog playing" both subjects, if it is such a pair."""
    subjects = sentence.kids_of(i, "nsubj")
    first = sentence.head[i]
    if len(subjects) != 1 or sentence.tag[first] not in NOUN_TAGS or sentence.has_kid(i, "aux"):
        return False
    if subjects[0] < first or sentence.has_kid(first, "acl", "relcl"):
        return False
    sentence.attach(subjects[0], first, "conj")
    sentence.attach(i, subjects[0], "acl")
    return True


def _describes_thing(sentence: Sentence, i: int, thing: int, words: CaptionLemmatizer) -> bool:
    """Whether a verb without a subject is a description of the bare noun read as its object."""
    if sentence.has_kid(thing, "det", "poss") or thing < i:
        return False
    if sentence.dep[i] != "pcomp" and any(
        sentence.tag[j] not in (*ADJECTIVE_TAGS, "RB") for j in range(i)
    ):
        return False
    tag, low = sentence.tag[i], sentence.low[i]
    if tag in ("VB", "VBP"):
        return i == 0 and low in words.adjectives
    if tag == "VBG":
        living = sentence.lemma[thing] in lexicon.ANIMATE_NOUNS and sentence.tag[thing] != "NNS"
        return living or sentence.lemma[i] in lexicon.INTRANSITIVE_VERBS
    return tag in ("VBN", "VBD") and low.endswith(("ed", "en", "rn", "wn"))


def _replace(sentence: Sentence, old: int, new: int) -> None:
    """Gives the position of a token in the tree, and its dependents, to another."""
    at_root = sentence.head[old] == old
    sentence.attach(new, new if at_root else sentence.head[old], sentence.dep[old])
    for kid in list(sentence.kids[old]):
        if kid != new:
            sentence.attach(kid, new, sentence.dep[kid])
