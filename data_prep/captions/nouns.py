"""The noun side of the caption rules: which words are objects, and their names and attributes.

Prepositional phrases and the objects behind them are found here too. The rules are written against
the labels of spaCy's English dependency parser. Ours throughout: the specification is
tests/data_prep/captions/caption_examples.toml.
"""

from data_prep.captions import lexicon
from data_prep.captions.sentence import (
    ADJECTIVE_TAGS,
    MODIFIERS,
    NOUN_TAGS,
    PARTICIPLE_TAGS,
    Sentence,
)

_NO_OBJECT = frozenset(("npadvmod", "poss", "intj", "meta", "aux", "det", "predet", "mark", "case"))

_PARTING = frozenset((",", ":"))


def is_absorbed(sentence: Sentence, i: int) -> bool:
    """Returns whether a noun is a part of a longer name or description ("ice" in "ice cream")."""
    head = sentence.head[i]
    return (
        sentence.dep[i] in MODIFIERS
        and (sentence.tag[i] in NOUN_TAGS or sentence.low[i] in lexicon.FRUIT_PARTS)
        and i < head
        and (sentence.tag[head] in NOUN_TAGS or sentence.dep[head] in MODIFIERS)
        and (head == i + 1 or not _PARTING.intersection(sentence.low[i:head]))
    )


def mark_objects(sentence: Sentence) -> None:
    """Fills in `is_object` and `is_hidden`; to be called once the parse is final."""
    count = len(sentence)
    sentence.is_object = [
        _is_thing(sentence, i)
        if sentence.tag[i] in NOUN_TAGS
        else sentence.low[i] in lexicon.PERSON_PRONOUNS and is_person_pronoun(sentence, i)
        for i in range(count)
    ]
    sentence.is_hidden = [False] * count
    for of in range(1, count):
        if sentence.low[of] == "of" and sentence.dep[of] == "prep" and sentence.has_kid(of, "pobj"):
            head = sentence.head[of]
            sentence.is_hidden[head] = _leads_on(sentence, head)


def _is_thing(sentence: Sentence, i: int) -> bool:
    low = sentence.low[i]
    return (
        sentence.dep[i] not in _NO_OBJECT
        and len(low.rstrip(".")) > 1  # "b." at the end of a sentence is a letter
        and low[0].isalpha()
        and low not in lexicon.VAGUE_NOUNS
        and (sentence.lemma[i] not in lexicon.CALENDAR or sentence.dep[i] == "pobj")
        and not is_absorbed(sentence, i)
    )


def _leads_on(sentence: Sentence, i: int) -> bool:
    """Returns whether a word before "of" stands for what follows.

    "photo of" and "group of" do; a picture that somebody holds or makes (a direct object), or that
    a thing is with ("a room with a view of the sea"), is a thing of its own. So does the middle of
    a compound preposition ("in front of").
    """
    if {sentence.low[i], sentence.lemma[i]} & lexicon.COUNTING_WORDS:
        return True
    if sentence.dep[i] == "pobj" and sentence.low[i] in lexicon.PLACE_NOUNS:
        return sentence.low[i] not in lexicon.BARE_PLACE_NOUNS or not sentence.has_kid(i, "det")
    if not is_picture(sentence, i) or sentence.dep[i] == "dobj":
        return False
    owner = sentence.head[i]
    return not (
        sentence.dep[i] == "pobj"
        and sentence.low[owner] == "with"
        and sentence.tag[sentence.head[owner]] in NOUN_TAGS
        and not is_picture(sentence, sentence.head[owner])
    )


def is_person_pronoun(sentence: Sentence, i: int) -> bool:
    """Returns whether a pronoun stands for a person who is not named elsewhere in the clause.

    Ours: "they" and "you" are persons; "it", "this", "that", "one" and reflexives are no objects.
    """
    return (
        sentence.low[i] in lexicon.PERSON_PRONOUNS
        and sentence.tag[i] in ("PRP", "NN", "WP")
        and sentence.dep[i] not in _NO_OBJECT
    )


def name_object(sentence: Sentence, i: int) -> str:
    """The name of an object: its compound in lower case with the head as a lemma."""
    if sentence.low[i] in lexicon.PERSON_PRONOUNS:
        return "person"
    parts = sorted(_compound_parts(sentence, i))
    return " ".join((*(sentence.low[part] for part in parts), sentence.lemma[i].rstrip(".")))


def _joins_participle(sentence: Sentence, i: int) -> bool:
    """Returns whether a modifier makes one word with the next: "gold plated", "good looking"."""
    after, head = i + 1, sentence.head[i]
    if after > head:
        return False
    low = sentence.low[after]
    if low not in lexicon.JOINED_PARTICIPLES:
        return False
    if head != after and (sentence.head[after] != head or sentence.dep[after] not in MODIFIERS):
        return False
    tag = sentence.tag[after]
    if sentence.dep[i] not in MODIFIERS or not (tag in ADJECTIVE_TAGS or tag in PARTICIPLE_TAGS):
        return False
    return sentence.tag[i] in ADJECTIVE_TAGS or sentence.low[i] in lexicon.DESCRIBING_NOUNS


def _compound_parts(sentence: Sentence, i: int) -> list[int]:
    parts = []
    for kid in sentence.kids[i]:
        if is_absorbed(sentence, kid) and not describes(sentence, kid):
            if len(sentence.low[kid].rstrip(".")) > 1 and sentence.low[kid][0].isalpha():
                parts.append(kid)
            parts.extend(_compound_parts(sentence, kid))
    return parts


def describes(sentence: Sentence, i: int) -> bool:
    """Returns whether a modifier is an attribute (else it counts, points or names a kind)."""
    low, tag = sentence.low[i], sentence.tag[i]
    if low in lexicon.NO_ATTRIBUTES or low in lexicon.COUNTING_WORDS:
        return False
    if low in lexicon.RELATIONAL_ADJECTIVES and sentence.has_kid(i, "prep"):
        return False
    if sentence.lemma[sentence.head[i]] in lexicon.FRUIT_PARTS.get(low, ()):
        return False
    return tag in ADJECTIVE_TAGS or tag in PARTICIPLE_TAGS or low in lexicon.DESCRIBING_NOUNS


def list_attributes(sentence: Sentence, i: int) -> list[str]:
    """Attributes of a noun: adjectives and participles next to it and their coordinations."""
    found: list[int] = []
    for kid in sentence.kids[i]:
        dep = sentence.dep[kid]
        if dep in MODIFIERS:
            if describes(sentence, kid):
                if not _joins_participle(sentence, kid):
                    found.extend(expand_adjective(sentence, kid))
                for part in _compound_parts(sentence, kid):
                    found.extend(
                        j for j in sentence.kids_of(part, "amod") if describes(sentence, j)
                    )
            elif is_absorbed(sentence, kid):
                for part in (kid, *_compound_parts(sentence, kid)):
                    for inner in sentence.kids_of(part, "amod", "compound", "nmod"):
                        if describes(sentence, inner):
                            found.extend(expand_adjective(sentence, inner))
        elif dep in ("acl", "relcl") and sentence.tag[kid] in ADJECTIVE_TAGS:
            found.extend(expand_adjective(sentence, kid))
    return name_attributes(sentence, found)


def expand_adjective(sentence: Sentence, i: int) -> list[int]:
    """An adjective with the adjectives that are coordinated with it or modify it."""
    found = [i]
    for kid in sentence.kids[i]:
        if (
            sentence.dep[kid] in ("conj", *MODIFIERS)
            and describes(sentence, kid)
            and not _joins_participle(sentence, kid)
        ):
            found.extend(expand_adjective(sentence, kid))
    return found


def name_attributes(sentence: Sentence, indices: list[int]) -> list[str]:
    """Attributes as words, in the order of the text."""
    return [
        _name_attribute(sentence, i) for i in sorted(set(indices)) if sentence.low[i][0].isalpha()
    ]


def _name_attribute(sentence: Sentence, i: int) -> str:
    if sentence.dep[i] in MODIFIERS and i and _joins_participle(sentence, i - 1):
        return f"{sentence.low[i - 1]}-{sentence.low[i]}"
    return sentence.lemma[i] if sentence.tag[i] in ADJECTIVE_TAGS else sentence.low[i]


def is_picture(sentence: Sentence, i: int) -> bool:
    """Returns whether a noun names the picture itself ("photo", "close-up")."""
    return sentence.lemma[i] in lexicon.PICTURE_NOUNS


def is_place_noun(sentence: Sentence, i: int) -> bool:
    """Returns whether a noun is the middle of a compound preposition ("front" in "in front of")."""
    return (
        sentence.is_hidden[i]
        and sentence.dep[i] == "pobj"
        and sentence.low[i] in lexicon.PLACE_NOUNS
    )


def find_referents(sentence: Sentence, i: int) -> list[int]:
    """The objects that a noun phrase stands for, by its head: with coordinations, none for "it".

    Transparent nouns ("photo of") give way to what follows, relative pronouns to their antecedent.
    """
    found = list(find_content(sentence, i))
    for kid in sentence.kids_of(i, "conj"):
        found.extend(find_referents(sentence, kid))
    return found


def find_content(sentence: Sentence, i: int) -> list[int]:
    """Like `find_referents`, without the coordinations of the head itself."""
    if sentence.low[i] in lexicon.RELATIVE_PRONOUNS and sentence.tag[i] in ("WDT", "WP", "IN"):
        clause = find_clause(sentence, i)
        antecedent = i - 1 if clause is None else sentence.head[clause]
        return find_content(sentence, antecedent) if antecedent >= 0 else []
    if sentence.is_hidden[i]:
        found = []
        for of in sentence.kids_of(i, "prep"):
            if sentence.low[of] == "of":
                for kid in sentence.kids_of(of, "pobj"):
                    found.extend(find_referents(sentence, kid))
        return found
    return [i] if sentence.is_object[i] else []


def find_clause(sentence: Sentence, i: int) -> int | None:
    """The head of the relative clause that a relative pronoun belongs to."""
    while sentence.head[i] != i:
        if sentence.dep[i] == "relcl":
            return i
        i = sentence.head[i]
    return None


def is_animate(sentence: Sentence, i: int) -> bool:
    """Returns whether an object is a living thing, by its head noun."""
    lemma = sentence.lemma[i]
    if lemma in lexicon.ANIMATE_NOUNS or is_person_pronoun(sentence, i):
        return True
    return lemma.endswith(lexicon.ANIMATE_ENDINGS) and lemma not in lexicon.THINGS_LIKE_PERSONS


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
    """(predicate, object) for each phrase of an adjective: "full of water", "close to a wall"."""
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
        if dep == "pobj" and is_place_noun(sentence, kid):
            for inner in sentence.kids_of(kid, "prep"):
                if sentence.low[inner] == "of":
                    found += [
                        (f"{low} {sentence.low[kid]} {name}", target)
                        for name, target in expand_preposition(sentence, inner)
                    ]
        elif dep == "pobj":
            found += [(low, target) for target in find_referents(sentence, kid)]
        elif dep == "pcomp" and low == "with":
            # "with their backs turned toward the camera"
            for subject in sentence.kids_of(kid, "nsubj", "nsubjpass"):
                found += [(low, target) for target in find_referents(sentence, subject)]
        elif dep == "prep":
            compound = not sentence.has_kid(preposition, "pobj")
            found += [
                (f"{low} {name}" if compound else name, target)
                for name, target in expand_preposition(sentence, kid)
            ]
        elif dep == "conj" and sentence.tag[kid] in ("IN", "TO"):
            found += expand_preposition(sentence, kid)
    return found
