"""Corrections to the parse where the small English model goes astray on captions.

Captions are mostly noun phrases, and the model was trained on sentences. Each rule corrects a kind
of error seen in web captions: here wrong tags and words that are no verbs, in `hidden_verbs` verbs
that were not seen. What a correct parse means is not decided here. Rules that
changed no decision on captions that nobody had looked at are not kept.
"""

from data_prep.captions import lexicon
from data_prep.captions.hidden_verbs import (
    HIDDEN_VERB_TAGS,
    NOMINAL,
    correct_hidden_verb,
    has_thing,
    move_modifiers,
)
from data_prep.captions.lemmas import CaptionLemmatizer
from data_prep.captions.sentence import (
    ADJECTIVE_TAGS,
    MODIFIERS,
    NOUN_TAGS,
    VERB_TAGS,
    Sentence,
)

_BEARS = frozenset(("black", "brown", "grizzly", "koala", "panda", "polar", "teddy"))

_DOUBTFUL_TAGS = NOUN_TAGS | ADJECTIVE_TAGS | {"UH"}


def repair_sentence(sentence: Sentence, words: CaptionLemmatizer) -> None:
    """Corrects a parse in place."""
    tag, dep, low = sentence.tag, sentence.dep, sentence.low
    for i in range(len(sentence)):
        if dep[i] == "prt" and sentence.has_kid(i, "pobj"):
            dep[i] = "prep"
        if tag[i] in VERB_TAGS:
            if dep[i] in ("aux", "auxpass"):
                continue
            if dep[i] not in MODIFIERS:
                _correct_false_verb(sentence, i, words)
            elif low[i] in lexicon.PURPOSE_GERUNDS:
                _name_purpose(sentence, i)
        elif tag[i] in _DOUBTFUL_TAGS:
            _correct_tag(sentence, i, words)
    for i in range(1, len(sentence)):
        if tag[i] in HIDDEN_VERB_TAGS or (tag[i] == "VBZ" and dep[i] == "pobj"):
            correct_hidden_verb(sentence, i, words)


def _correct_tag(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Corrects nouns, adjectives and interjections by what English has them as.

    "Wooden" at the start is no name, "Boy" no interjection, "politician" no adjective.
    """
    low, tag = sentence.low[i], sentence.tag[i]
    if tag in NOUN_TAGS:
        if sentence.dep[i] in MODIFIERS and low in words.adjectives:
            is_name = tag == "NNP" and sentence.dep[i] == "amod"
            if low not in words.nouns or low in lexicon.ADJECTIVES or is_name:
                sentence.tag[i] = "JJ"
        elif sentence.dep[i] == "poss" and sentence.lemma[i] in lexicon.SETTINGS:
            for kid in sentence.kids_of(i, "amod"):  # "a cold winter 's day"
                sentence.attach(kid, sentence.head[i], "amod")
        elif sentence.dep[i] == "npadvmod" and (
            low in lexicon.ANIMATE_NOUNS and low != "hand"  # "hand painted"
        ):
            is_subject = _make_subject(sentence, i)
            sentence.dep[i] = "nsubj" if is_subject else "dep"
    elif tag in ADJECTIVE_TAGS:
        if sentence.dep[i] in MODIFIERS and low in lexicon.KIND_NOUNS:
            sentence.tag[i], sentence.dep[i] = "NN", "compound"
            return
        if low in lexicon.COLORS and sentence.dep[i] == "pobj" and not sentence.has_kid(i, "conj"):
            sentence.tag[i] = "NN"  # "isolated on white"
        elif low not in words.lexicon and words.lemmatize(low, "NNS") in lexicon.ANIMATE_NOUNS:
            # "geese"
            sentence.tag[i], sentence.lemma[i] = "NNS", words.lemmatize(low, "NNS")
        elif low in words.nouns and (
            low not in words.adjectives
            or (sentence.dep[i] in NOMINAL and low in lexicon.ANIMATE_NOUNS)
        ):
            sentence.tag[i] = "NN"
        elif low in words.verbs and low not in words.adjectives and has_thing(sentence, i):
            sentence.tag[i] = "VBP"
    elif tag == "UH" and low in lexicon.ANIMATE_NOUNS:
        sentence.tag[i] = "NN"
        if sentence.tag[sentence.head[i]] in VERB_TAGS and sentence.head[i] > i:
            sentence.dep[i] = "nsubj"


def _make_subject(sentence: Sentence, i: int) -> bool:
    """Makes a noun the subject of the verb behind it that it hangs on, if that has none."""
    verb = sentence.head[i]
    if verb < i or sentence.tag[verb] not in VERB_TAGS or sentence.dep[verb] in MODIFIERS:
        return False
    if sentence.has_kid(verb, "nsubj", "nsubjpass"):
        return False
    sentence.dep[i] = "nsubj"
    move_modifiers(sentence, verb, i)
    return True


def _name_purpose(sentence: Sentence, i: int) -> None:
    """Makes "living" a part of the name in "living room"; a swimming child swims."""
    thing = sentence.head[i]
    if sentence.tag[thing] in NOUN_TAGS and sentence.lemma[thing] not in lexicon.ANIMATE_NOUNS:
        sentence.tag[i], sentence.dep[i], sentence.lemma[i] = "NN", "compound", sentence.low[i]


def _correct_false_verb(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Takes back the tag of a verb from words that are no verbs in this position.

    Nouns ("goat on the grass", "studio shot of"), places ("person, left, and"), adjectives and
    participles before a bare noun ("wet stones", "stacked pipes", "picture of sleeping cats").
    """
    low, lemma = sentence.low[i], sentence.lemma[i]
    if i and sentence.low[i - 1] in lexicon.NAMED_PLURALS.get(low, ()):
        sentence.tag[i], sentence.lemma[i] = "NNS", words.lemmatize(low, "NNS")
        sentence.attach(i - 1, i, "compound")
        return
    if sentence.tag[i] in ("VB", "VBP") and low not in words.lexicon:
        past = words.lemmatize(low, "VBD")
        if past in words.verbs:
            sentence.tag[i], sentence.lemma[i], lemma = "VBD", past, past  # "took this picture"
    following = sentence.low[i + 1] if i + 1 < len(sentence) else ""
    if low == "left" and i and sentence.low[i - 1] in (",", "(") and not following.isalpha():
        sentence.tag[i] = "RB"
        return
    if (
        (following == "of" and (low in lexicon.PICTURE_NOUNS or low in lexicon.COUNTING_WORDS))
        or low in lexicon.DESCRIBING_NOUNS
        or (lemma not in words.verbs and (low in words.nouns or lemma in words.nouns))
        or (lemma in words.nouns and _names_part(sentence, i))
        or (sentence.tag[i] == "VBZ" and sentence.dep[i] == "pobj" and lemma in words.nouns)
        or _begins_with_thing(sentence, i)
        or (low == "bear" and i > 0 and sentence.low[i - 1] in _BEARS)
    ):
        sentence.tag[i] = "NN" if low in words.nouns else "NNS"
        sentence.lemma[i] = words.lemmatize(low, sentence.tag[i])
        if i and sentence.dep[i - 1] == "nsubj" and sentence.head[i - 1] == i:
            sentence.dep[i - 1] = "compound"
        return
    if sentence.tag[i] == "VBP" and _reads_as_name(sentence, i) and low in words.nouns:
        sentence.tag[i] = "NN"
        sentence.lemma[i] = low
        sentence.dep[i - 1] = "compound"
        return
    things = sentence.kids_of(i, "dobj")
    if things and _describes_thing(sentence, i, things[0], words):
        named = low in lexicon.ROOM_GERUNDS
        sentence.tag[i] = "NN" if named else "JJ"
        sentence.lemma[i] = low
        sentence.replace(i, things[0])
        sentence.attach(i, things[0], "compound" if named else "amod")


def _begins_with_thing(sentence: Sentence, i: int) -> bool:
    """Returns whether a base form at the beginning is a thing: "design for a shop"."""
    if i or sentence.low[i] not in lexicon.FIRST_NOUNS or len(sentence) == 1:
        return False
    begins = sentence.tag[1] in ("IN", "TO") and sentence.low[1] not in ("out", "up", "through")
    return begins and not sentence.has_kid(i, "dobj", "nsubj", "xcomp", "ccomp", "prt")


def _names_part(sentence: Sentence, i: int) -> bool:
    """Returns whether a finite form has an article, or "of" behind it: "stone ruins of"."""
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
    """Returns whether a base form makes one noun with the thing before it ("logo design for")."""
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


def _describes_thing(sentence: Sentence, i: int, thing: int, words: CaptionLemmatizer) -> bool:
    """Returns whether a verb without a subject describes the bare noun read as its object."""
    if sentence.has_kid(thing, "det", "poss") or thing < i:
        return False
    listed = sentence.dep[i] == "conj" and sentence.tag[sentence.head[i]] in NOUN_TAGS
    if (
        not listed
        and sentence.dep[i] != "pcomp"
        and any(sentence.tag[j] not in (*ADJECTIVE_TAGS, "RB") for j in range(i))
    ):
        return False
    tag, low = sentence.tag[i], sentence.low[i]
    if tag == "VBG":
        if i == 0 and low in lexicon.ROOM_GERUNDS and thing == 1 and sentence.tag[1] == "NN":
            return sentence.lemma[thing] not in lexicon.ANIMATE_NOUNS
        if sentence.lemma[i] in lexicon.INTRANSITIVE_VERBS | lexicon.THING_VERBS:
            return True
        kinds = lexicon.ANIMATE_NOUNS | lexicon.PURPOSE_NOUNS
        return sentence.lemma[thing] in kinds and sentence.tag[thing] != "NNS"
    return tag in ("VBN", "VBD") and low.endswith(("ed", "en", "rn", "wn"))
