"""Corrections of typical parser errors on captions.

Captions are mostly noun phrases, but the model was trained on sentences. Each rule corrects a kind
of error seen in web captions: wrong tags, other words read as verbs, and verbs read as nouns or
modifiers. The meaning of a correct parse is decided elsewhere. Rules that changed no decision on
held-out captions were removed.
"""

from data_prep.captions import lexicon
from data_prep.captions.sentence import (
    ADJECTIVE_TAGS,
    MODIFIERS,
    NOUN_TAGS,
    VERB_TAGS,
    CaptionLemmatizer,
    Sentence,
)

# Tags that the model gives to misread verbs.
_HIDDEN_VERB_TAGS = frozenset(("NN", "NNS", "VBG"))
# Dependency labels of nouns, at which a misread verb may stand.
_NOMINAL = frozenset(("ROOT", "pobj", "dobj", "nsubj", "conj", "attr", "appos"))
_SINGULAR_DETERMINERS = frozenset(("a", "an", "another", "each", "every", "this"))
_PLURAL_WORDS = frozenset(("few", "many", "dozen", "hundred", "thousand", "million", "couple"))
_PHRASE_TAGS = frozenset(("DT", "JJ", "PRP$", "CD", "NN", "VBN", "POS"))
_AFTER_VERB = frozenset(("IN", "DT", "TO", "RP", "PRP$"))
_BEARS = frozenset(("black", "brown", "grizzly", "koala", "panda", "polar", "teddy"))

_DOUBTFUL_TAGS = NOUN_TAGS | ADJECTIVE_TAGS | {"UH"}


def repair_sentence(sentence: Sentence, words: CaptionLemmatizer) -> None:
    """Corrects a parse in place."""
    tag, dep, low = sentence.tag, sentence.dep, sentence.low
    for i in range(len(sentence.low)):
        if dep[i] == "prt" and sentence.has_kid(i, "pobj"):
            dep[i] = "prep"
        if tag[i] in VERB_TAGS:
            if dep[i] in ("aux", "auxpass"):
                continue
            if dep[i] not in MODIFIERS:
                _correct_false_verb(sentence, i, words)
            elif (
                low[i] in lexicon.PURPOSE_GERUNDS
                and tag[sentence.head[i]] in NOUN_TAGS
                and sentence.lemma[sentence.head[i]] not in lexicon.ANIMATE_NOUNS
            ):  # "living" in "living room"; a swimming child swims
                tag[i], dep[i], sentence.lemma[i] = "NN", "compound", low[i]
        elif tag[i] in _DOUBTFUL_TAGS:
            _correct_tag(sentence, i, words)
    for i in range(1, len(sentence.low)):
        if tag[i] in _HIDDEN_VERB_TAGS or (tag[i] == "VBZ" and dep[i] == "pobj"):
            _correct_hidden_verb(sentence, i, words)


def _correct_tag(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Corrects wrongly tagged nouns, adjectives and interjections with the dictionary.

    "Wooden" at the start is not a name, "Boy" not an interjection, "politician" not an adjective.
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
            is_subject = _give_subject(sentence, i)
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
            or (sentence.dep[i] in _NOMINAL and low in lexicon.ANIMATE_NOUNS)
        ):
            sentence.tag[i] = "NN"
        elif low in words.verbs and low not in words.adjectives and _has_thing(sentence, i):
            sentence.tag[i] = "VBP"
    elif tag == "UH" and low in lexicon.ANIMATE_NOUNS:
        sentence.tag[i] = "NN"
        if sentence.tag[sentence.head[i]] in VERB_TAGS and sentence.head[i] > i:
            sentence.dep[i] = "nsubj"


def _give_subject(sentence: Sentence, i: int) -> bool:
    """Makes noun `i` the subject of its head if that is a later verb without a subject."""
    verb = sentence.head[i]
    if verb < i or sentence.tag[verb] not in VERB_TAGS or sentence.dep[verb] in MODIFIERS:
        return False
    if sentence.has_kid(verb, "nsubj", "nsubjpass"):
        return False
    sentence.dep[i] = "nsubj"
    _move_modifiers(sentence, verb, i)
    return True


def _correct_false_verb(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Retags words that were read as verbs but are not.

    These are nouns ("goat on the grass", "studio shot of"), places ("person, left, and"), and
    adjectives or participles before a bare noun ("wet stones", "stacked pipes", "sleeping cats").
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
    following = sentence.low[i + 1] if i + 1 < len(sentence.low) else ""
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
    if things and _describes_thing(sentence, i, things[0]):
        named = low in lexicon.ROOM_GERUNDS
        sentence.tag[i] = "NN" if named else "JJ"
        sentence.lemma[i] = low
        sentence.replace(i, things[0])
        sentence.attach(i, things[0], "compound" if named else "amod")


def _begins_with_thing(sentence: Sentence, i: int) -> bool:
    """Returns whether a base form that starts the caption is a noun: "design for a shop"."""
    if i or sentence.low[i] not in lexicon.FIRST_NOUNS or len(sentence.low) == 1:
        return False
    begins = sentence.tag[1] in ("IN", "TO") and sentence.low[1] not in ("out", "up", "through")
    return begins and not sentence.has_kid(i, "dobj", "nsubj", "xcomp", "ccomp", "prt")


def _names_part(sentence: Sentence, i: int) -> bool:
    """Returns whether a finite form is a noun, by its article or a following "of" ("ruins of")."""
    if sentence.has_kid(i, "det") and sentence.tag[i] in ("VB", "VBP", "VBZ"):
        return True
    subjects = sentence.kids_of(i, "nsubj")
    return (
        sentence.tag[i] == "VBZ"
        and i + 1 < len(sentence.low)
        and sentence.low[i + 1] == "of"
        and subjects == [i - 1]
        and sentence.lemma[i - 1] not in lexicon.ANIMATE_NOUNS
    )


def _reads_as_name(sentence: Sentence, i: int) -> bool:
    """Returns whether a base form and the noun before it form one noun ("logo design for")."""
    return (
        i > 0
        and sentence.dep[i - 1] == "nsubj"
        and sentence.head[i - 1] == i
        and sentence.tag[i - 1] in ("NN", "NNP")
        and sentence.lemma[i - 1] not in lexicon.ANIMATE_NOUNS
        and not sentence.has_kid(i, "aux", "ccomp", "xcomp")
        and not _has_thing(sentence, i)
        and len(sentence.kids_of(i, "nsubj")) == 1
    )


def _describes_thing(sentence: Sentence, i: int, thing: int) -> bool:
    """Returns whether a verb without a subject is an attribute of the noun read as its object."""
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


def _correct_hidden_verb(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Retags, in place, a verb that was read as a noun or modifier, and attaches its subject.

    "businessman counting money", "couple hugging", "a woman dances in a dress", "bride and groom
    holding hands", "man on a chair playing guitar", "a red square rests on a circle". Token `i`
    must not be the first one, and has one of _HIDDEN_VERB_TAGS.
    """
    noun = i - 1
    low = sentence.low[i]
    if sentence.low[noun] in lexicon.NAMED_PLURALS.get(low, ()):
        return
    if sentence.tag[i] == "NNS" and sentence.has_kid(i, "nsubj") and _is_followed(sentence, i):
        lemma = words.lemmatize(low, "VBZ")
        if lemma in words.verbs:  # "the branch moves in the wind"
            sentence.tag[i], sentence.lemma[i] = "VBZ", lemma
            return
    is_shape = sentence.tag[noun] == "JJ" and sentence.head[noun] == i
    if sentence.tag[noun] not in NOUN_TAGS and not (
        is_shape and sentence.low[noun] in words.nouns  # "a red square rests on"
    ):
        return
    if sentence.tag[i] == "NN" and low in words.verbs and sentence.has_kid(i, "nsubj"):
        acts = _has_thing(sentence, i) or sentence.has_kid(i, "prt")
        if acts and low not in lexicon.DESCRIBING_NOUNS:
            sentence.tag[i] = "VBP"
        return
    if _correct_deed(sentence, noun, i, words):
        return
    tag = _guess_tag(sentence, i, words)
    lemma = words.lemmatize(low, tag) if tag else ""
    if not tag or lemma not in words.verbs:
        return
    if tag == "VBG" and sentence.dep[i] in MODIFIERS:
        actor, thing = _find_actor(sentence, noun), _find_head_noun(sentence, i)
        if actor is None or thing is None:
            return
        if actor != noun or sentence.lemma[thing] not in lexicon.PURPOSE_NOUNS:
            sentence.tag[i], sentence.lemma[i] = tag, lemma
            _make_clause(sentence, actor, i, thing)
    elif (
        sentence.head[noun] == i
        and not sentence.has_kid(i, "nsubj", "nsubjpass")
        and _reads_as_verb(sentence, i, lemma, words)
    ):
        if sentence.tag[noun] == "JJ":
            sentence.tag[noun] = "NN"
        sentence.tag[i], sentence.lemma[i] = tag, lemma
        _make_subject(sentence, noun, i)


def _correct_deed(sentence: Sentence, noun: int, i: int, words: CaptionLemmatizer) -> bool:
    """Retags an everyday action after a living thing: "dog chases cat", "kids ride bikes"."""
    is_singular = sentence.tag[i] == "NNS"
    tag = "VBZ" if is_singular else "VBP"
    lemma = words.lemmatize(sentence.low[i], tag)
    agrees = is_singular != (sentence.tag[noun] == "NNS")
    if sentence.tag[i] == "VBG" or lemma not in lexicon.DEEDS or not agrees:
        return False
    if sentence.lemma[noun] not in lexicon.ANIMATE_NOUNS:
        return False
    thing = _find_head_noun(sentence, i) if sentence.dep[i] in MODIFIERS else None
    if thing is None and (sentence.head[noun] != i or not _is_followed(sentence, i)):
        return False
    sentence.tag[i], sentence.lemma[i] = tag, lemma
    if thing is None:
        _make_subject(sentence, noun, i)
    else:
        _make_clause(sentence, noun, i, thing)
    return True


def _guess_tag(sentence: Sentence, i: int, words: CaptionLemmatizer) -> str | None:
    """Returns the tag that a token has if it is a hidden verb, or None if it cannot be one."""
    tag, low = sentence.tag[i], sentence.low[i]
    if tag == "NNS":
        return "VBZ"
    if tag == "VBG":
        return "VBG"
    if tag != "NN":
        return None
    # "orange koi fish in a pond": a word for an animal is the noun.
    may_act = low in words.verbs and low not in lexicon.ANIMATE_NOUNS
    if may_act and sentence.lemma[i - 1] in lexicon.ANIMATE_NOUNS:
        # "firefighters battle a blaze", "a man and a woman dance in the street"
        follows = sentence.tag[i - 1] == "NNS" or sentence.dep[i] == "conj"
        if low not in words.nouns or (sentence.dep[i - 1] == "compound" and follows):
            return "VBP"  # the former: "artist perform during a festival"
    return "VBG" if low.endswith("ing") and low not in lexicon.NOMINAL_GERUNDS else None


def _reads_as_verb(sentence: Sentence, i: int, lemma: str, words: CaptionLemmatizer) -> bool:
    """Returns whether a token is a verb: either tagged so, or a noun that reads as one."""
    noun, tag = i - 1, sentence.tag[i]
    if tag == "NNS":
        return lemma not in words.nouns or _reads_as_finite(sentence, noun, i)
    if tag == "NN" and sentence.low[i].endswith("ing"):
        thing_acts = lemma in lexicon.POSTURE_VERBS and _is_followed(sentence, i)
        acts = thing_acts or _find_actor(sentence, noun) is not None
        return acts and sentence.dep[i] in _NOMINAL
    return True


def _reads_as_finite(sentence: Sentence, noun: int, i: int) -> bool:
    """Returns whether an -s form is a verb: after a singular determiner or a living thing."""
    if sentence.tag[noun] == "NNS" or sentence.dep[i] not in (*_NOMINAL, "ccomp"):
        return False
    modifiers = {sentence.low[kid] for kid in sentence.kids[i]}
    if modifiers & _SINGULAR_DETERMINERS and not modifiers & _PLURAL_WORDS:
        return True
    if not _is_followed(sentence, i):
        return False
    if sentence.lemma[i] in lexicon.MOVING_VERBS and sentence.has_kid(i, "det"):
        return True
    return sentence.lemma[noun] in lexicon.ANIMATE_NOUNS


def _has_thing(sentence: Sentence, i: int) -> bool:
    """Returns whether a verb has a direct object that is not a number ("Size 42")."""
    return any(sentence.tag[kid] != "CD" for kid in sentence.kids_of(i, "dobj"))


def _is_followed(sentence: Sentence, i: int) -> bool:
    if i + 1 >= len(sentence.low):
        return False
    return sentence.tag[i + 1] in _AFTER_VERB or sentence.low[i + 1] == "next"


def _find_actor(sentence: Sentence, noun: int) -> int | None:
    """Returns the living thing that acts in a following -ing form: `noun`, or the noun it modifies.

    For "man on a chair playing" the phrases are found by tags, since the parse is unreliable there.
    """
    if sentence.lemma[noun] in lexicon.ANIMATE_NOUNS:
        return noun
    i = noun
    while i > 0 and sentence.tag[i] in _PHRASE_TAGS | NOUN_TAGS:
        i -= 1
    if sentence.tag[i] == "IN" and i > 0 and sentence.lemma[i - 1] in lexicon.ANIMATE_NOUNS:
        return i - 1
    return None


def _find_head_noun(sentence: Sentence, i: int) -> int | None:
    """Returns the head noun of the compound that token `i` modifies, if it comes after `i`."""
    head = sentence.head[i]
    while sentence.dep[head] in MODIFIERS and sentence.head[head] > head:
        head = sentence.head[head]
    return head if head > i and sentence.tag[head] in NOUN_TAGS else None


def _make_subject(sentence: Sentence, noun: int, verb: int) -> None:
    """Makes a verb's modifier its subject; the verb keeps its position or modifies the noun."""
    _move_modifiers(sentence, verb, noun)
    if sentence.dep[verb] in ("ROOT", "ccomp", "advcl", "parataxis", "acl", "xcomp"):
        sentence.attach(noun, verb, "nsubj")
        return
    partner = sentence.head[verb]
    dep = "pobj" if sentence.dep[verb] == "pcomp" else sentence.dep[verb]
    sentence.attach(noun, partner, dep)
    sentence.attach(verb, noun, "acl")


def _make_clause(sentence: Sentence, actor: int, verb: int, thing: int) -> None:
    """Turns a compound noun with head `thing` into the clause "actor verb thing"."""
    first = actor
    while sentence.dep[first] == "conj" and sentence.head[first] not in (verb, thing):
        first = sentence.head[first]
    above = first
    while above not in (verb, thing) and sentence.head[above] != above:
        above = sentence.head[above]
    if above in (verb, thing):
        at_root = sentence.head[thing] == thing
        sentence.attach(first, first if at_root else sentence.head[thing], sentence.dep[thing])
    sentence.attach(verb, actor, "acl")
    sentence.attach(thing, verb, "dobj")
    if actor < verb - 1:
        # "people at the march holding signs": the phrase between belongs to the actor.
        noun, preposition = verb - 1, actor + 1
        sentence.attach(preposition, actor, "prep")
        sentence.attach(noun, preposition, "pobj")
        for i in range(preposition + 1, noun):
            if sentence.head[i] in (actor, preposition, verb, thing):
                label = "compound" if sentence.tag[i] in NOUN_TAGS else sentence.dep[i]
                sentence.attach(i, noun, label)


def _move_modifiers(sentence: Sentence, old: int, new: int) -> None:
    """Moves the modifiers of token `old` that come before token `new` to `new`."""
    for kid in list(sentence.kids[old]):
        if kid < new and sentence.dep[kid] in ("det", "amod", "nummod", "compound", "poss"):
            sentence.attach(kid, new, sentence.dep[kid])
