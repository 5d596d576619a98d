"""The search for verbs that the small English model has read as nouns or modifiers.

It is a part of the repairs of the parse. What a correct parse means is not decided here.
"""

from data_prep.captions import lexicon
from data_prep.captions.lemmas import CaptionLemmatizer
from data_prep.captions.sentence import MODIFIERS, NOUN_TAGS, Sentence

# The tags that a verb gets when it is misread.
HIDDEN_VERB_TAGS = frozenset(("NN", "NNS", "VBG"))
# The roles of a noun in a sentence, in which a misread verb may be found.
NOMINAL = frozenset(("ROOT", "pobj", "dobj", "nsubj", "conj", "attr", "appos"))
_SINGULAR_DETERMINERS = frozenset(("a", "an", "another", "each", "every", "this"))
_PLURAL_WORDS = frozenset(("few", "many", "dozen", "hundred", "thousand", "million", "couple"))
_PHRASE_TAGS = frozenset(("DT", "JJ", "PRP$", "CD", "NN", "VBN", "POS"))
_AFTER_VERB = frozenset(("IN", "DT", "TO", "RP", "PRP$"))


def correct_hidden_verb(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Finds, in place, a verb that was read as a noun or as a modifier, with its subject before it.

    "businessman counting money", "couple hugging", "a woman dances in a dress", "bride and groom
    holding hands", "man on a chair playing guitar", "a red square rests on a circle". Token `i`
    is not the first one, and has one of HIDDEN_VERB_TAGS.
    """
    noun = i - 1
    low = sentence.low[i]
    if sentence.low[noun] in lexicon.NAMED_PLURALS.get(low, ()):
        return
    if sentence.tag[i] == "NNS" and _has_own_subject(sentence, i, words):
        sentence.tag[i], sentence.lemma[i] = "VBZ", words.lemmatize(low, "VBZ")
        return
    if sentence.tag[noun] not in NOUN_TAGS and not _may_be_shape(sentence, noun, words.nouns):
        return
    if sentence.tag[i] == "NN" and low in words.verbs and sentence.has_kid(i, "nsubj"):
        acts = has_thing(sentence, i) or sentence.has_kid(i, "prt")
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
    elif _takes_subject(sentence, noun, i) and _reads_as_verb(sentence, i, lemma, words):
        if sentence.tag[noun] == "JJ":
            sentence.tag[noun] = "NN"
        sentence.tag[i], sentence.lemma[i] = tag, lemma
        _make_subject(sentence, noun, i)


def _has_own_subject(sentence: Sentence, i: int, words: CaptionLemmatizer) -> bool:
    """Returns whether a form in -s has a singular subject: "the branch moves in the wind"."""
    is_verb = words.lemmatize(sentence.low[i], "VBZ") in words.verbs
    return is_verb and sentence.has_kid(i, "nsubj") and _is_followed(sentence, i)


def _correct_deed(sentence: Sentence, noun: int, i: int, words: CaptionLemmatizer) -> bool:
    """Finds an everyday deed behind a living thing: "dog chases cat", "kids ride bikes"."""
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


def _may_be_shape(sentence: Sentence, i: int, nouns: frozenset[str]) -> bool:
    """Returns whether an adjective may be the noun of a misread verb ("a red square rests on")."""
    return sentence.tag[i] == "JJ" and sentence.head[i] == i + 1 and sentence.low[i] in nouns


def _guess_tag(sentence: Sentence, i: int, words: CaptionLemmatizer) -> str | None:
    """The tag a token has if it is a hidden verb; None when it cannot be one."""
    tag, low = sentence.tag[i], sentence.low[i]
    if tag == "NNS":
        return "VBZ"
    if tag == "VBG":
        return "VBG"
    if tag != "NN":
        return None
    # "orange koi fish in a pond": the name of an animal is the noun.
    may_act = low in words.verbs and low not in lexicon.ANIMATE_NOUNS
    if may_act and _reads_as_plural(sentence, i - 1, i, words.nouns):
        return "VBP"
    return "VBG" if low.endswith("ing") and low not in lexicon.NOMINAL_GERUNDS else None


def _takes_subject(sentence: Sentence, noun: int, i: int) -> bool:
    """Returns whether the noun before a token is its modifier, with no subject there already."""
    return sentence.head[noun] == i and not sentence.has_kid(i, "nsubj", "nsubjpass")


def _reads_as_verb(sentence: Sentence, i: int, lemma: str, words: CaptionLemmatizer) -> bool:
    """Returns whether a token tagged as a noun is rather a verb; one tagged as a verb stays one."""
    noun, tag = i - 1, sentence.tag[i]
    if tag == "NNS":
        return lemma not in words.nouns or _reads_as_finite(sentence, noun, i)
    if tag == "NN" and sentence.low[i].endswith("ing"):
        thing_acts = lemma in lexicon.POSTURE_VERBS and _is_followed(sentence, i)
        acts = thing_acts or _find_actor(sentence, noun) is not None
        return acts and sentence.dep[i] in NOMINAL
    return True


def _reads_as_plural(sentence: Sentence, noun: int, i: int, nouns: frozenset[str]) -> bool:
    """Returns whether a base form follows its plural subject: "firefighters battle a blaze"."""
    if sentence.lemma[noun] not in lexicon.ANIMATE_NOUNS:
        return False
    if sentence.low[i] not in nouns:
        return True  # "artist perform during a festival"
    # "a man and a woman dance in the street"
    follows = sentence.tag[noun] == "NNS" or sentence.dep[i] == "conj"
    return sentence.dep[noun] == "compound" and follows


def _reads_as_finite(sentence: Sentence, noun: int, i: int) -> bool:
    """Returns whether a form in -s is a verb: after a singular determiner or a living thing."""
    if sentence.tag[noun] == "NNS" or sentence.dep[i] not in (*NOMINAL, "ccomp"):
        return False
    if _is_singular(sentence, i):
        return True
    if not _is_followed(sentence, i):
        return False
    if sentence.lemma[i] in lexicon.MOVING_VERBS and sentence.has_kid(i, "det"):
        return True
    return sentence.lemma[noun] in lexicon.ANIMATE_NOUNS


def has_thing(sentence: Sentence, i: int) -> bool:
    """Returns whether a verb has an object, a number not counted ("Size 42")."""
    return any(sentence.tag[kid] != "CD" for kid in sentence.kids_of(i, "dobj"))


def _is_followed(sentence: Sentence, i: int) -> bool:
    if i + 1 >= len(sentence):
        return False
    return sentence.tag[i + 1] in _AFTER_VERB or sentence.low[i + 1] == "next"


def _is_singular(sentence: Sentence, i: int) -> bool:
    """Returns whether the phrase of a token begins as a singular does ("a", not "a few")."""
    words = {sentence.low[kid] for kid in sentence.kids[i]}
    return bool(words & _SINGULAR_DETERMINERS) and not words & _PLURAL_WORDS


def _find_actor(sentence: Sentence, noun: int) -> int | None:
    """The living thing that a following -ing form describes: the noun, or the one it belongs to.

    In "man on a chair playing" the phrases are read off the tags, since the parse is not trusted.
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
    """The noun at the head of the compound that a modifier stands in, if it follows."""
    head = sentence.head[i]
    while sentence.dep[head] in MODIFIERS and sentence.head[head] > head:
        head = sentence.head[head]
    return head if head > i and sentence.tag[head] in NOUN_TAGS else None


def _make_subject(sentence: Sentence, noun: int, verb: int) -> None:
    """Turns the modifier of a verb into its subject; the verb keeps its position or follows it."""
    move_modifiers(sentence, verb, noun)
    if sentence.dep[verb] in ("ROOT", "ccomp", "advcl", "parataxis", "acl", "xcomp"):
        sentence.attach(noun, verb, "nsubj")
        return
    partner = sentence.head[verb]
    dep = "pobj" if sentence.dep[verb] == "pcomp" else sentence.dep[verb]
    sentence.attach(noun, partner, dep)
    sentence.attach(verb, noun, "acl")


def _make_clause(sentence: Sentence, actor: int, verb: int, thing: int) -> None:
    """Makes "actor verb thing" of a compound noun with the thing as its head."""
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
        # "people at the march holding signs": the phrase between is the actor's.
        noun, preposition = verb - 1, actor + 1
        sentence.attach(preposition, actor, "prep")
        sentence.attach(noun, preposition, "pobj")
        for i in range(preposition + 1, noun):
            if sentence.head[i] in (actor, preposition, verb, thing):
                label = "compound" if sentence.tag[i] in NOUN_TAGS else sentence.dep[i]
                sentence.attach(i, noun, label)


def move_modifiers(sentence: Sentence, old: int, new: int) -> None:
    """Gives the modifiers of a token that stand before another one to that one."""
    for kid in list(sentence.kids[old]):
        if kid < new and sentence.dep[kid] in ("det", "amod", "nummod", "compound", "poss"):
            sentence.attach(kid, new, sentence.dep[kid])
