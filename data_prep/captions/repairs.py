"""Corrections to the parse where the small English model goes astray on captions.

Captions are mostly noun phrases, and the model was trained on sentences. Each rule corrects a kind
of error seen in web captions: here wrong tags, in `false_verbs` words that are no verbs, in
`hidden_verbs` verbs that were not seen, in `attachments` phrases that belong elsewhere. What a
correct parse means is not decided here.
"""

from data_prep.captions import lexicon
from data_prep.captions.attachments import correct_attachments
from data_prep.captions.false_verbs import correct_false_verb
from data_prep.captions.hidden_verbs import (
    HIDDEN_VERB_TAGS,
    NOMINAL,
    correct_hidden_verb,
    has_thing,
)
from data_prep.captions.lemmas import CaptionLemmatizer
from data_prep.captions.sentence import (
    ADJECTIVE_TAGS,
    FINITE_TAGS,
    MODIFIERS,
    NOUN_TAGS,
    VERB_TAGS,
    Sentence,
)

_DOUBTFUL_TAGS = NOUN_TAGS | ADJECTIVE_TAGS | {"PRP", "RB", "UH"}


def repair_sentence(sentence: Sentence, words: CaptionLemmatizer) -> None:
    """Corrects a parse in place.

    Args:
      sentence: the parsed caption.
      words: the English words.
    """
    tag, dep, low = sentence.tag, sentence.dep, sentence.low
    for i in range(len(sentence)):
        if dep[i] == "prt" and sentence.has_kid(i, "pobj"):
            dep[i] = "prep"
        if tag[i] in VERB_TAGS:
            if dep[i] in ("aux", "auxpass"):
                _correct_auxiliary(sentence, i)
            elif dep[i] not in MODIFIERS:
                correct_false_verb(sentence, i, words)
            elif i == 0 and sentence.lemma[0] in lexicon.DONE_DEEDS:
                _begin_deed(sentence)
            elif low[i] in lexicon.PURPOSE_GERUNDS or low[i] in lexicon.TRADES:
                _name_purpose(sentence, i)
            elif (
                sentence.lemma[i] not in words.verbs
                and low[i] in words.nouns
                and tag[sentence.head[i]] in NOUN_TAGS
                and sentence.head[i] > i
            ):
                tag[i], dep[i], sentence.lemma[i] = "NN", "compound", low[i]  # "thanksgiving meal"
        elif tag[i] in _DOUBTFUL_TAGS:
            _correct_tag(sentence, i, words)
    for i in range(1, len(sentence)):
        if tag[i] in HIDDEN_VERB_TAGS or (tag[i] == "VBZ" and dep[i] == "pobj"):
            correct_hidden_verb(sentence, i, words)
        named = dep[i - 1] == "compound" and tag[i] in FINITE_TAGS and sentence.head[i - 1] == i
        if named and sentence.lemma[i - 1] in lexicon.ANIMATE_NOUNS:
            _make_subject(sentence, i - 1)  # "olympic athlete competes"
    correct_attachments(sentence)


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
        elif sentence.dep[i] == "pcomp":
            sentence.dep[i] = "pobj"
        elif sentence.dep[i] == "poss" and sentence.lemma[i] in lexicon.SETTINGS:
            for kid in sentence.kids_of(i, "amod"):  # "a cold winter 's day"
                sentence.attach(kid, sentence.head[i], "amod")
        elif sentence.dep[i] in ("acl", "advcl", "xcomp") and i and sentence.tag[i - 1] == "TO":
            _make_phrase(sentence, i - 1, i)
        elif sentence.dep[i] == "npadvmod" and (
            low in lexicon.ANIMATE_NOUNS and low != "hand"  # "hand painted"
        ):
            if not _make_subject(sentence, i):
                sentence.dep[i] = "dep"
        elif sentence.dep[i] == "npadvmod" and _is_antecedent(sentence, i):
            _make_relative(sentence, i)
        elif sentence.dep[i] == "npadvmod" and _is_brought_about(sentence, i):
            sentence.dep[i] = "dobj"
        if tag == "NNP" and low.endswith("men") and low[:-2] + "an" in words.nouns:
            sentence.tag[i], sentence.lemma[i] = "NNS", low[:-2] + "an"
        if low in lexicon.PLACE_ADVERBS and i and sentence.dep[i - 1] == "compound":
            sentence.tag[i] = "RB"
            sentence.replace(i, i - 1)
            sentence.attach(i, i - 1, "advmod")
    elif low in ("left", "right") and tag in ADJECTIVE_TAGS and _is_side(sentence, i):
        sentence.tag[i] = "RB"
    elif tag in ADJECTIVE_TAGS:
        if sentence.head[i] == i and _is_listed_color(sentence, i):
            return
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
            or (
                sentence.dep[i] in NOMINAL
                and (low in lexicon.ANIMATE_NOUNS or _has_article(sentence, i))
            )
        ):
            sentence.tag[i] = "NN"
        elif low in words.verbs and low not in words.adjectives and has_thing(sentence, i):
            sentence.tag[i] = "VBP"
    elif tag == "RB":
        _correct_adverb(sentence, i, words)
    elif tag == "PRP":
        if low not in lexicon.PRONOUNS and low in words.nouns:
            sentence.tag[i] = "NN"
    elif tag == "UH" and low in lexicon.ANIMATE_NOUNS:
        sentence.tag[i] = "NN"
        if sentence.tag[sentence.head[i]] in VERB_TAGS and sentence.head[i] > i:
            sentence.dep[i] = "nsubj"


def _is_side(sentence: Sentence, i: int) -> bool:
    """Whether a word says on which side of the picture somebody is: "a cat in a chair - left"."""
    after = sentence.low[i + 1] if i + 1 < len(sentence) else ""
    return i > 0 and sentence.low[i - 1] in (",", "(", "-", "--") and not after.isalpha()


def _make_phrase(sentence: Sentence, to: int, noun: int) -> None:
    """Makes a phrase of "the memorial to politician", read as an infinitive."""
    if sentence.head[to] == noun and not sentence.has_kid(noun, "dobj"):
        sentence.attach(to, sentence.head[noun], "prep")
        sentence.attach(noun, to, "pobj")


def _correct_adverb(sentence: Sentence, i: int, words: CaptionLemmatizer) -> None:
    """Makes nouns of adverbs that are none: "windmill on a hill", "wrist tattoo", "fold napkin"."""
    low, head = sentence.low[i], sentence.head[i]
    if low not in words.nouns or low in words.adjectives:
        return
    if head == i:
        sentence.tag[i] = "NN"
        return
    if low in words.adverbs or len(low) < 4 or not low.isalpha():
        return
    sentence.tag[i] = "NN"
    if head == i - 1 and sentence.tag[head] in VERB_TAGS:
        sentence.dep[i] = "dobj"
    elif head == i - 1 and sentence.tag[head] in NOUN_TAGS:
        sentence.replace(head, i)
        sentence.attach(head, i, "compound")
    elif head > i and sentence.tag[head] in NOUN_TAGS:
        sentence.dep[i] = "compound"


def _make_subject(sentence: Sentence, i: int) -> bool:
    """Makes a noun the subject of the verb behind it that it hangs on, if that has none."""
    verb = sentence.head[i]
    if verb < i or sentence.tag[i] not in NOUN_TAGS or sentence.tag[verb] not in VERB_TAGS:
        return False
    if sentence.dep[verb] in MODIFIERS:
        return False
    if sentence.has_kid(verb, "nsubj", "nsubjpass"):
        return False
    sentence.dep[i] = "nsubj"
    for kid in list(sentence.kids[verb]):
        if kid < i and sentence.dep[kid] in ("det", "amod", "nummod", "poss", "compound"):
            sentence.attach(kid, i, sentence.dep[kid])
    return True


def _is_antecedent(sentence: Sentence, i: int) -> bool:
    """Whether a noun at the beginning is what somebody did: "the necklace I made for a party"."""
    verb = sentence.head[i]
    return (
        sentence.head[verb] == verb > i + 1
        and sentence.low[i + 1] in lexicon.SUBJECT_PRONOUNS
        and sentence.head[i + 1] == verb
        and sentence.lemma[i] not in lexicon.CALENDAR | lexicon.SETTINGS | lexicon.MANNERS
        and not sentence.has_kid(verb, "dobj", "ccomp", "xcomp", "aux")
    )


def _make_relative(sentence: Sentence, i: int) -> None:
    """Makes the verb that a noun hangs on a relative clause of that noun."""
    verb = sentence.head[i]
    sentence.attach(i, i, "ROOT")
    sentence.attach(verb, i, "relcl")


def _is_brought_about(sentence: Sentence, i: int) -> bool:
    """Whether a noun is no time but an object: "a torch lighting up the night"."""
    verb = sentence.head[i]
    return (
        verb < i
        and sentence.has_kid(verb, "prt")
        and not sentence.has_kid(verb, "dobj")
        and any(sentence.low[kid] == "the" for kid in sentence.kids_of(i, "det"))
    )


def _is_listed_color(sentence: Sentence, i: int) -> bool:
    """Makes a description of the first of several at the root: "red, yellow and green peppers"."""
    things = [kid for kid in sentence.kids_of(i, "appos") if sentence.tag[kid] in NOUN_TAGS]
    if not things or i + 1 >= len(sentence) or sentence.low[i + 1] != ",":
        return False
    sentence.replace(i, things[0])
    sentence.attach(i, things[0], "amod")
    return True


def _name_purpose(sentence: Sentence, i: int) -> None:
    """Makes "living" a part of the name in "living room"; a swimming child swims."""
    thing = sentence.head[i]
    if sentence.low[i] in lexicon.TRADES and sentence.lemma[thing] in lexicon.ROLES:
        fits = True  # "painting artist"
    else:
        fits = sentence.low[i] in lexicon.PURPOSE_GERUNDS and (
            sentence.lemma[thing] not in lexicon.ANIMATE_NOUNS
        )
    if sentence.tag[thing] in NOUN_TAGS and fits:
        sentence.tag[i], sentence.dep[i], sentence.lemma[i] = "NN", "compound", sentence.low[i]


def _begin_deed(sentence: Sentence) -> None:
    """Makes a deed of "riding bikes on a pier", read as bikes that ride."""
    thing = sentence.head[0]
    plural = sentence.tag[thing] == "NNS" and sentence.lemma[thing] not in lexicon.ANIMATE_NOUNS
    if thing == 1 and plural and sentence.tag[0] == "VBG":
        sentence.replace(thing, 0)
        sentence.attach(thing, 0, "dobj")


def _has_article(sentence: Sentence, i: int) -> bool:
    return any(sentence.low[kid] in ("a", "an") for kid in sentence.kids_of(i, "det"))


def _correct_auxiliary(sentence: Sentence, i: int) -> None:
    """Makes a verb of posture the head of its clause: "machines sitting broken in the hall"."""
    described = sentence.head[i]
    if sentence.lemma[i] not in lexicon.RESTING_VERBS or sentence.tag[i] not in VERB_TAGS:
        return
    sentence.replace(described, i)
    sentence.tag[described], sentence.lemma[described] = "JJ", sentence.low[described]
    sentence.attach(described, i, "acomp")
