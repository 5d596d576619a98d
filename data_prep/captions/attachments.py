"""Corrections of what a phrase or a coordinated noun belongs to, once the tags are right.

It is a part of the repairs of the parse. What a correct parse means is not decided here.
"""

from data_prep.captions import lexicon
from data_prep.captions.hidden_verbs import NOMINAL
from data_prep.captions.sentence import MODIFIERS, NOUN_TAGS, VERB_TAGS, Sentence

# Behind an object these say where the deed is done, hardly ever which object is meant.
_SCENE_PREPOSITIONS = frozenset(("across", "after", "along", "at", "before", "into", "onto"))
_PICTURES = lexicon.PICTURE_NOUNS | lexicon.COUNTING_WORDS
_LIVING_OR_PICTURES = lexicon.ANIMATE_NOUNS | _PICTURES
_STATES = lexicon.CLOTHES | lexicon.CONDITIONS


def correct_attachments(sentence: Sentence) -> None:
    """Corrects in place what phrases belong to.

    Args:
      sentence: the parsed caption, its tags corrected.
    """
    for i, dep in enumerate(sentence.dep):
        if dep == "prep":
            if not i or sentence.low[i] == "of":
                continue
            if sentence.low[i] == "as" and _begins_clause(sentence, i):
                continue
            _attach_complement(sentence, i)
            if sentence.tag[sentence.head[i]] in NOUN_TAGS:
                _attach_setting(sentence, i)
        elif dep == "cc":
            _part_pair(sentence, i)
        elif dep == "conj" and not _leave_verb(sentence, i):
            _attach_partner(sentence, i)


def _part_pair(sentence: Sentence, joint: int) -> None:
    """Makes two of a pair read as one: "a striped shirt and white jeans", "actor and tv producer".

    Other pairs name one thing with the noun behind them ("a lace and chiffon dress").
    """
    first = sentence.head[joint]
    last = sentence.head[first]
    if sentence.dep[first] not in MODIFIERS or sentence.dep[last] not in NOMINAL:
        return
    if not first < joint < last or not {sentence.tag[first], sentence.tag[last]} <= NOUN_TAGS:
        return
    living = {sentence.lemma[first], sentence.lemma[last]} <= lexicon.ANIMATE_NOUNS
    described = any(
        joint < kid < last and sentence.dep[kid] in ("amod", "det", "poss")
        for kid in sentence.kids[last]
    )
    if not living and not (described and sentence.low[first] not in lexicon.DESCRIBING_NOUNS):
        return
    at_root = sentence.head[last] == last
    sentence.attach(first, first if at_root else sentence.head[last], sentence.dep[last])
    for kid in list(sentence.kids[last]):
        if kid < first:
            sentence.attach(kid, first, sentence.dep[kid])
    for kid in sentence.kids_of(first, "conj"):
        if kid < last:
            sentence.attach(kid, last, "compound")
    sentence.attach(last, first, "conj")


def _begins_clause(sentence: Sentence, i: int) -> bool:
    """Makes a clause of "as a storm approaches", if it is one read as a phrase."""
    things = sentence.kids_of(i, "pobj")
    verb = things[0] + 1 if things else len(sentence)
    if verb >= len(sentence) or sentence.tag[verb] not in ("VBZ", "VBP", "VBD", "VBG"):
        return False
    if sentence.has_kid(verb, "nsubj", "nsubjpass", "aux", "auxpass", "agent"):
        return False
    owner = sentence.head[i]
    if owner == i or sentence.dep[verb] not in ("acl", "advcl", "ccomp", "conj", "relcl"):
        return False
    sentence.attach(verb, owner, "advcl")
    sentence.attach(things[0], verb, "nsubj")
    sentence.attach(i, verb, "mark")
    return True


def _leave_verb(sentence: Sentence, i: int) -> bool:
    """Gives a noun joined to a verb to the noun before the joint: "spread to cars and a home"."""
    verb = sentence.head[i]
    if sentence.tag[verb] not in VERB_TAGS or verb > i or sentence.tag[i] not in NOUN_TAGS:
        return False
    joints = [kid for kid in sentence.kids_of(verb, "cc") if verb < kid < i]
    noun = joints[-1] - 1 if joints else verb
    if noun <= verb or sentence.tag[noun] not in NOUN_TAGS or sentence.has_kid(i, "nsubj", "dobj"):
        return False
    if any(sentence.tag[j] in (*VERB_TAGS, "IN") for j in range(joints[-1] + 1, i)):
        return False
    sentence.attach(i, noun, "conj")
    return True


def _attach_partner(sentence: Sentence, i: int) -> None:
    """Gives the second of a pair to the first: "portrait of a girl and a dog", "life with rings and
    a daisy" show both.
    """
    noun = sentence.head[i]
    if sentence.tag[noun] not in NOUN_TAGS or sentence.tag[i] not in NOUN_TAGS or i < noun:
        return
    if sentence.lemma[i] in lexicon.PICTURE_NOUNS and not sentence.has_kid(noun, "cc"):
        sentence.dep[i] = "appos"  # "woman wearing a hat , historical photo"
        return
    for kid in reversed(sentence.kids_of(noun, "prep")):
        if not noun < kid < i:
            continue
        partners = sentence.kids_of(kid, "pobj")
        pictures = lexicon.PICTURE_NOUNS | lexicon.COUNTING_WORDS
        if sentence.low[kid] == "of":
            joins = sentence.lemma[noun] in pictures and sentence.lemma[i] not in pictures
            living = {sentence.lemma[j] for j in (*partners, i)} <= lexicon.ANIMATE_NOUNS
            joins = joins or (living and sentence.lemma[noun] not in lexicon.ANIMATE_NOUNS)
        else:
            living = lexicon.ANIMATE_NOUNS
            joins = sentence.low[kid] == "with" and not {
                sentence.lemma[noun],
                sentence.lemma[i],
            } & (living | pictures)
        if joins and partners:
            sentence.attach(i, partners[0], "conj")
        return


def _attach_complement(sentence: Sentence, i: int) -> None:
    """Gives a phrase to the noun before it that asks for it, or past a word that takes none.

    "The casual approach to style", "a portrait by an artist"; but "a family of four in a park".
    """
    noun, head, low = i - 1, sentence.head[i], sentence.low[i]
    if _is_way(sentence, head):
        sentence.attach(i, sentence.head[head], "prep")
    elif sentence.tag[head] in ("CD", "PRP") and sentence.dep[head] in ("pobj", "dobj"):
        owner = sentence.head[head]
        if sentence.dep[owner] == "prep":
            owner = sentence.head[owner]
        if owner < i:
            sentence.attach(i, owner, "prep")
    elif low == "with" and _is_part(sentence, noun, i):
        sentence.attach(i, noun, "prep")
    elif low == "with" and head > 0 and _is_ordered(sentence, head):
        sentence.attach(i, 0, "prep")
    elif low == "in" and _is_behind(sentence, noun, i):
        sentence.attach(i, noun, "prep")
    elif low == "to" and _is_given(sentence, head):
        first = head
        while sentence.dep[first] == "conj":
            first = sentence.head[first]
        sentence.attach(i, sentence.head[first], "prep")
    elif low in lexicon.PLACE_PREPOSITIONS and _is_held(sentence, noun, i):
        sentence.attach(i, noun, "prep")
    elif sentence.tag[noun] in NOUN_TAGS and sentence.dep[noun] in ("dobj", "pobj", "nsubj"):
        lemma = sentence.lemma[noun]
        if (low == "to" and lemma in lexicon.DIRECTED_NOUNS) or (
            low == "by"
            and lemma in lexicon.WORKS_OF_ART
            and not any(
                sentence.lemma[kid] in lexicon.CALENDAR or sentence.has_kid(kid, "poss")
                for kid in sentence.kids_of(i, "pobj")
            )
        ):
            sentence.attach(i, noun, "prep")


def _is_part(sentence: Sentence, noun: int, i: int) -> bool:
    """Whether a "with" behind a verb's phrase says what belongs to the noun there.

    "Sitting in a field with overgrown grass", "wears a hat with feathers".
    """
    verb, targets = sentence.head[i], sentence.kids_of(i, "pobj")
    if sentence.tag[verb] not in VERB_TAGS or sentence.tag[noun] not in NOUN_TAGS or not targets:
        return False
    owner = sentence.head[noun]
    if sentence.dep[noun] == "conj":
        owner = sentence.head[owner]
    if owner == verb:
        return sentence.lemma[verb] == "wear"
    return (
        sentence.dep[noun] == "pobj"
        and sentence.head[owner] == verb
        and sentence.lemma[targets[0]] in lexicon.SCENERY
    )


def _is_way(sentence: Sentence, noun: int) -> bool:
    """Whether a noun is the way that somebody makes, whose phrase says where he goes."""
    return (
        sentence.lemma[noun] == "way"
        and sentence.dep[noun] == "dobj"
        and sentence.has_kid(noun, "poss")
        and sentence.lemma[sentence.head[noun]] in lexicon.WAY_VERBS
    )


def _is_ordered(sentence: Sentence, noun: int) -> bool:
    """Whether a noun is in a command to bring it somewhere: "add color to a room with art"."""
    if sentence.lemma[0] not in lexicon.GIVING_VERBS or sentence.tag[0] not in ("VB", "VBP"):
        return False
    if sentence.head[0] != 0 or sentence.has_kid(0, "nsubj") or sentence.has_kid(noun, "relcl"):
        return False
    owner = sentence.head[noun]
    return owner == 0 or (sentence.dep[owner] == "prep" and sentence.head[owner] == 0)


def _is_behind(sentence: Sentence, noun: int, i: int) -> bool:
    """Whether a phrase is where a thing of a scene is: "a man on a wall with hills in the back"."""
    targets, owner = sentence.kids_of(i, "pobj"), sentence.head[noun]
    if not targets or sentence.lemma[targets[0]] not in lexicon.DISTANCES:
        return False
    if sentence.dep[noun] == "conj":
        owner = sentence.head[owner]
    return sentence.low[owner] == "with" and sentence.tag[noun] in NOUN_TAGS


def _is_given(sentence: Sentence, noun: int) -> bool:
    """Whether a noun is what a verb brings somewhere, and does not lead there itself."""
    if sentence.tag[noun] not in NOUN_TAGS or sentence.lemma[noun] in lexicon.DIRECTED_NOUNS:
        return False
    first = noun
    while sentence.dep[first] == "conj":
        first = sentence.head[first]
    return (
        sentence.dep[first] == "dobj"
        and sentence.lemma[sentence.head[first]] in lexicon.GIVING_VERBS
    )


def _is_held(sentence: Sentence, noun: int, i: int) -> bool:
    """Whether a phrase behind "with a thing" is where that is: "a puppy in her arms"."""
    preposition, targets = sentence.head[noun], sentence.kids_of(i, "pobj")
    if sentence.dep[noun] != "pobj" or sentence.low[preposition] != "with" or not targets:
        return False
    if sentence.head[preposition] != sentence.head[i]:
        return False
    if sentence.low[targets[0]] in lexicon.PLACE_NOUNS:
        inner = [kid for of in sentence.kids_of(targets[0], "prep") for kid in sentence.kids[of]]
        targets = inner or targets
    target = targets[0]
    return sentence.has_kid(target, "poss") and sentence.lemma[target] not in lexicon.CLOTHES


def _attach_setting(sentence: Sentence, i: int) -> None:
    """Gives a phrase of place or time to what it is the setting of, not to the last noun.

    "A woman feeding pigeons in the park" feeds there, "a man in a shirt at the airport" is there,
    and "a leopard in a tree at sunset" is no tree at sunset.
    """
    targets = sentence.kids_of(i, "pobj")
    low, target = sentence.low[i], sentence.lemma[targets[0]] if targets else ""
    if target in lexicon.PICTURE_NOUNS:
        # "on a white background vector"
        parts = [sentence.low[kid] for kid in sentence.kids_of(targets[0], "compound")]
        target = "background" if "background" in parts else target
    is_setting = (
        low in ("during", "since", "until")
        or (
            low == "against"
            and target not in lexicon.ANIMATE_NOUNS
            and sentence.lemma[sentence.head[i]] not in lexicon.CONTESTS
        )
        or (target in lexicon.SETTINGS and low in lexicon.PLACE_PREPOSITIONS)
    )
    is_time = target in lexicon.CALENDAR or target == "day"
    is_scene = (
        low in _SCENE_PREPOSITIONS
        or (is_time and low in ("for", "in", "on"))
        or (target in lexicon.SCENES and low in lexicon.PLACE_PREPOSITIONS)
    )
    while True:
        noun = sentence.head[i]
        first = noun
        while sentence.dep[first] == "conj":
            first = sentence.head[first]
        owner = sentence.head[first]
        if sentence.dep[first] == "pobj" and sentence.dep[owner] == "prep":
            preposition, owner = owner, sentence.head[owner]
            is_direct = sentence.tag[owner] in VERB_TAGS and (
                sentence.low[preposition] == "with"
                or (
                    sentence.low[preposition] in ("at", "for", "into", "to")
                    and sentence.lemma[owner] in lexicon.DIRECTED_VERBS
                )
            )
            is_direct = is_direct or (
                # "a man with a surfboard on the beach"
                sentence.low[preposition] == "with"
                and low == "on"
                and sentence.lemma[owner] in lexicon.ANIMATE_NOUNS
            )
            # "a bunch of daffodils in the vase"
            is_amount = sentence.low[preposition] == "of" and (
                sentence.lemma[owner] in lexicon.AMOUNTS and low in lexicon.PLACE_PREPOSITIONS
            )
        elif sentence.dep[first] == "dobj" and sentence.tag[owner] in VERB_TAGS:
            is_direct, is_amount = True, False
        else:
            return
        if (
            low == "in"
            and target in lexicon.DISTANCES
            and sentence.low[sentence.head[first]] == "with"
        ):
            return  # "a lake with mountains in the background"
        is_state = sentence.lemma[noun] in _STATES and (
            low in lexicon.PLACE_PREPOSITIONS or low in ("against", "during", "for")
        )
        is_moved = is_state or is_setting or is_amount or (is_scene and is_direct)
        if not is_moved or owner > i:
            return
        sentence.attach(i, owner, "prep")
        if sentence.tag[owner] not in NOUN_TAGS:
            return
