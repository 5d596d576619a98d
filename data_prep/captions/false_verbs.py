"""Words that the small English model has read as verbs, and that are nouns or descriptions.

It is a part of the repairs of the parse. What a correct parse means is not decided here.
"""

from data_prep.captions import lexicon
from data_prep.captions.hidden_verbs import has_thing
from data_prep.captions.lemmas import CaptionLemmatizer
from data_prep.captions.sentence import ADJECTIVE_TAGS, NOUN_TAGS, Sentence

_VERB_COMPLEMENTS = ("dobj", "prep", "ccomp", "xcomp", "acomp", "attr", "prt", "aux", "advmod")

_BEARS = frozenset(("black", "brown", "grizzly", "koala", "panda", "polar", "teddy"))


def correct_false_verb(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Takes back the tag of a verb from words that are no verbs in this position.

    Nouns ("goat on the grass", "studio shot of"), places ("person, left, and"), adjectives and
    participles before a bare noun ("wet stones", "stacked pipes", "picture of sleeping cats").
    """
    low, lemma = sentence.low[i], sentence.lemma[i]
    if low in lexicon.PREPOSITIONAL_GERUNDS and not sentence.has_kid(i, "nsubj", "aux"):
        sentence.tag[i], sentence.dep[i] = "IN", "prep"
        for kid in sentence.kids_of(i, "dobj"):
            sentence.dep[kid] = "pobj"
        return
    if i and sentence.low[i - 1] in lexicon.NAMED_PLURALS.get(low, ()):
        _name_plural(sentence, i, words)
        return
    if sentence.tag[i] in ("VB", "VBP") and low not in words.lexicon:
        past = words.lemmatize(low, "VBD")
        if past in words.verbs:
            sentence.tag[i], sentence.lemma[i], lemma = "VBD", past, past  # "took this picture"
    _leave_punctuation(sentence, i)
    if sentence.dep[i] == "advcl" and _describes_last(sentence, i):
        sentence.tag[i] = "VBN"
        sentence.attach(i, i - 1, "acl")
        return
    following = sentence.low[i + 1] if i + 1 < len(sentence) else ""
    if low == "left" and i and sentence.low[i - 1] in (",", "(") and not following.isalpha():
        sentence.tag[i] = "RB"
        return
    if (
        (following == "of" and (low in lexicon.PICTURE_NOUNS or low in lexicon.COUNTING_WORDS))
        or (
            following == "of"
            and i == 0
            and low in words.nouns
            and sentence.tag[i][:2] == "VB"
            and sentence.tag[i] != "VB"
        )
        or low in lexicon.DESCRIBING_NOUNS
        or (lemma not in words.verbs and (low in words.nouns or lemma in words.nouns))
        or (lemma in words.nouns and (_names_part(sentence, i) or _stands_in_list(sentence, i)))
        or (low in lexicon.PLURAL_NOUNS and _is_of_thing(sentence, i))
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
    if sentence.tag[i] == "VBG" and sentence.dep[i] == "conj" and _joins_pair(sentence, i):
        return
    things = sentence.kids_of(i, "dobj")
    if things and low == "themed" and i < things[0]:
        _make_theme(sentence, i, things[0])
        return
    if things and _is_inside_compound(sentence, i, things[0]):
        _make_modifier(sentence, i - 1, i, things[0])
        return
    if things and _describes_thing(sentence, i, things[0], words):
        named = low in lexicon.ROOM_GERUNDS or _names_trade(sentence, i, things[0])
        sentence.tag[i] = "NN" if named else "JJ"
        sentence.lemma[i] = low
        if sentence.dep[i] == "pcomp":
            sentence.dep[i] = "pobj"
        sentence.replace(i, things[0])
        sentence.attach(i, things[0], "compound" if named else "amod")


def _describes_last(sentence: Sentence, i: int) -> bool:
    """Whether a participle is of the noun right before it: "in a room pasted to a closet"."""
    return (
        i > 1
        and sentence.tag[i] in ("VBD", "VBN")
        and sentence.tag[i - 1] in NOUN_TAGS
        and sentence.dep[i - 1] == "pobj"
        and sentence.lemma[i] not in lexicon.CONDITION_VERBS
        and not sentence.has_kid(i, "nsubj", "nsubjpass", "mark", "aux", "auxpass", "dobj")
    )


def _names_trade(sentence: Sentence, i: int, thing: int) -> bool:
    return sentence.low[i] in lexicon.TRADES and sentence.lemma[thing] in lexicon.ROLES


def _name_plural(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Makes one thing of a plural read as a verb and the noun before it: "raking autumn leaves"."""
    noun = i - 1
    sentence.tag[i], sentence.lemma[i] = "NNS", words.lemmatize(sentence.low[i], "NNS")
    if sentence.head[noun] != i:
        for subject in sentence.kids_of(i, "nsubj"):
            sentence.replace(i, subject)
        sentence.replace(noun, i)
        if sentence.dep[i] == "npadvmod":
            sentence.dep[i] = "dobj"
    sentence.attach(noun, i, "compound")


def _begins_with_thing(sentence: Sentence, i: int) -> bool:
    """Whether a base form at the beginning is a thing with a phrase: "design for a shop"."""
    if i or sentence.low[i] not in lexicon.FIRST_NOUNS or len(sentence) == 1:
        return False
    begins = sentence.tag[1] in ("IN", "TO") and sentence.low[1] not in ("out", "up", "through")
    return begins and not sentence.has_kid(i, "dobj", "nsubj", "xcomp", "ccomp", "prt")


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
    listed = sentence.dep[i] == "conj" and sentence.tag[sentence.head[i]] in NOUN_TAGS
    if listed and not (
        (sentence.tag[i] == "VBN" or sentence.lemma[sentence.head[i]] not in lexicon.ANIMATE_NOUNS)
        and thing == i + 1
        and sentence.low[i - 1] == "and"
    ):
        return False
    if (
        not listed
        and sentence.dep[i] != "pcomp"
        and any(sentence.tag[j] not in (*ADJECTIVE_TAGS, "RB") for j in range(i))
    ):
        return False
    tag, low = sentence.tag[i], sentence.low[i]
    if tag in ("VB", "VBP"):
        return i == 0 and low in words.adjectives
    if tag == "VBG":
        if i == 0 and low in lexicon.ROOM_GERUNDS and thing == 1 and sentence.tag[1] == "NN":
            return sentence.lemma[thing] not in lexicon.ANIMATE_NOUNS
        if sentence.lemma[i] in lexicon.INTRANSITIVE_VERBS | lexicon.THING_VERBS:
            return True
        kinds = lexicon.ANIMATE_NOUNS | lexicon.PURPOSE_NOUNS
        return sentence.lemma[thing] in kinds and sentence.tag[thing] != "NNS"
    return tag in ("VBN", "VBD") and low.endswith(("ed", "en", "rn", "wn"))


def _is_of_thing(sentence: Sentence, i: int) -> bool:
    """Whether a verb has a thing right before it as its subject, and no object."""
    subjects = sentence.kids_of(i, "nsubj")
    return (
        subjects == [i - 1]
        and not sentence.has_kid(i, "dobj", "aux", "ccomp", "xcomp")
        and sentence.lemma[i - 1] not in lexicon.ANIMATE_NOUNS
    )


def _is_inside_compound(sentence: Sentence, i: int, thing: int) -> bool:
    """Whether a participle describes, with the thing before it, the thing behind it.

    "wall hanging clock", "war torn city", "computer generated image", "aerial view establishing
    shot": the thing before does nothing, and the one behind has no article.
    """
    noun = i - 1
    if noun < 0 or thing < i or sentence.has_kid(i, "aux", "auxpass", "neg"):
        return False
    if sentence.tag[noun] not in NOUN_TAGS or sentence.lemma[noun] in lexicon.ANIMATE_NOUNS:
        return False
    if any(sentence.head[j] != thing for j in range(i + 1, thing)):
        return False
    tag, bare = sentence.tag[i], not sentence.has_kid(thing, "det", "poss")
    if tag == "VBG":
        is_picture = sentence.lemma[thing] in lexicon.PICTURE_NOUNS
        unlikely = sentence.lemma[i] in lexicon.THING_VERBS | lexicon.INTRANSITIVE_VERBS
        return bare and (unlikely or (is_picture and sentence.lemma[noun] in lexicon.PICTURE_NOUNS))
    if tag not in ("VBD", "VBN"):
        return False
    # A participle that is no past form needs an auxiliary to be the deed of a subject.
    if sentence.low[i].endswith(("en", "rn", "wn")):
        return True
    is_alone = sentence.head[noun] == i and not sentence.kids[noun]
    return bare and is_alone and sentence.tag[noun] in ("NN", "NNP")


def _make_modifier(sentence: Sentence, noun: int, i: int, thing: int) -> None:
    """Makes one noun of a thing, a participle and the thing that both describe."""
    subjects = [kid for kid in sentence.kids_of(i, "nsubj", "nsubjpass") if kid != noun]
    if subjects:
        # "street scene in war torn city": the subject of the parse is what is described.
        sentence.replace(i, subjects[0])
    if sentence.head[noun] == i:
        sentence.replace(i, thing)
    else:
        sentence.replace(noun, thing)
        for kid in list(sentence.kids[i]):
            if kid != thing:
                sentence.attach(kid, thing, sentence.dep[kid])
    sentence.tag[i] = "JJ"
    sentence.lemma[i] = sentence.low[i]
    sentence.attach(i, thing, "amod")
    sentence.attach(noun, i, "compound")


def _make_theme(sentence: Sentence, i: int, thing: int) -> None:
    """Makes one noun of "a circus themed birthday cake", whatever stands before it."""
    sentence.replace(i, thing)
    for kid in list(sentence.kids[thing]):
        if kid < i and sentence.dep[kid] == "nsubj":
            for part in (*sentence.kids_of(kid, "conj"), kid):
                sentence.attach(part, i, "compound")
    sentence.tag[i], sentence.lemma[i] = "JJ", sentence.low[i]
    sentence.attach(i, thing, "amod")


def _leave_punctuation(sentence: Sentence, i: int) -> None:
    """Gives a verb that hangs on a mark to the noun above it: "person , playing a guitar"."""
    mark = sentence.head[i]
    if mark != i and not any(map(str.isalnum, sentence.low[mark])):
        noun = sentence.head[mark]
        if noun != mark and sentence.tag[noun] in NOUN_TAGS and noun < i:
            sentence.attach(i, noun, "acl")
