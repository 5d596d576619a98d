"""Noun rules for captions: objects, their names and attributes, and the subjects of verbs.

The subjects of a clause are its own, inherited or shared. This module also finds prepositional
phrases and their objects; `verbs` builds the edges. The rules are written for the labels of
spaCy's English dependency parser. They are ours, specified by
tests/data_prep/captions/caption_examples.toml.
"""

from dataclasses import dataclass, field

from data_prep.captions import lexicon
from data_prep.captions.sentence import (
    ADJECTIVE_TAGS,
    MODIFIERS,
    NOUN_TAGS,
    PARTICIPLE_TAGS,
    VERB_TAGS,
    Sentence,
)

_NO_OBJECT = frozenset(("npadvmod", "poss", "intj", "meta", "aux", "det", "predet", "mark", "case"))
_PARTING = frozenset((",", ":"))


def is_absorbed(sentence: Sentence, i: int) -> bool:
    """Returns whether a noun is part of a longer name or description ("ice" in "ice cream")."""
    head = sentence.head[i]
    return (
        sentence.dep[i] in MODIFIERS
        and (sentence.tag[i] in NOUN_TAGS or sentence.low[i] in lexicon.FRUIT_PARTS)
        and i < head
        and (sentence.tag[head] in NOUN_TAGS or sentence.dep[head] in MODIFIERS)
        and (head == i + 1 or not _PARTING.intersection(sentence.low[i:head]))
    )


def mark_objects(sentence: Sentence) -> None:
    """Sets `is_object` and `is_hidden` of every token. The parse must be final."""
    sentence.is_object = []
    for i, low in enumerate(sentence.low):
        if sentence.tag[i] in NOUN_TAGS:
            names_thing = (
                sentence.dep[i] not in _NO_OBJECT
                and len(low.rstrip(".")) > 1  # "b." at the end of a sentence is a letter
                and low[0].isalpha()
                and low not in lexicon.VAGUE_NOUNS
                and (sentence.lemma[i] not in lexicon.CALENDAR or sentence.dep[i] == "pobj")
                and not is_absorbed(sentence, i)
            )
        else:
            names_thing = low in lexicon.PERSON_PRONOUNS and is_person_pronoun(sentence, i)
        sentence.is_object.append(names_thing)
    sentence.is_hidden = [False] * len(sentence.low)
    for of, low in enumerate(sentence.low):
        if of and low == "of" and sentence.dep[of] == "prep" and sentence.has_kid(of, "pobj"):
            head = sentence.head[of]
            sentence.is_hidden[head] = _leads_on(sentence, head)


def _leads_on(sentence: Sentence, i: int) -> bool:
    """Returns whether a noun before "of" stands for the noun after it.

    Examples are "photo of", "group of" and the middle of a compound preposition ("in front of").
    A picture that somebody holds or makes (a direct object) is an object itself, as is one after
    "with" ("a room with a view of the sea").
    """
    if {sentence.low[i], sentence.lemma[i]} & lexicon.COUNTING_WORDS:
        return True
    if sentence.dep[i] == "pobj" and sentence.low[i] in lexicon.PLACE_NOUNS:
        return sentence.low[i] not in lexicon.BARE_PLACE_NOUNS or not sentence.has_kid(i, "det")
    if sentence.lemma[i] not in lexicon.PICTURE_NOUNS or sentence.dep[i] == "dobj":
        return False
    owner = sentence.head[i]
    return not (
        sentence.dep[i] == "pobj"
        and sentence.low[owner] == "with"
        and sentence.tag[sentence.head[owner]] in NOUN_TAGS
        and sentence.lemma[sentence.head[owner]] not in lexicon.PICTURE_NOUNS
    )


def is_person_pronoun(sentence: Sentence, i: int) -> bool:
    """Returns whether a pronoun stands for a person that the clause does not name otherwise.

    Ours: "they" and "you" are persons; "it", "this", "that", "one" and reflexives are not objects.
    """
    return (
        sentence.low[i] in lexicon.PERSON_PRONOUNS
        and sentence.tag[i] in ("PRP", "NN", "WP")
        and sentence.dep[i] not in _NO_OBJECT
    )


def name_object(sentence: Sentence, i: int) -> str:
    """Returns an object's name: its compound in lower case, with the head noun as a lemma."""
    if sentence.low[i] in lexicon.PERSON_PRONOUNS:
        return "person"
    parts = map(sentence.low.__getitem__, sorted(_compound_parts(sentence, i)))
    return " ".join((*parts, sentence.lemma[i].rstrip(".")))


def _joins_participle(sentence: Sentence, i: int) -> bool:
    """Returns whether a modifier forms one word with the next: "gold plated", "good looking"."""
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
    """Returns whether a modifier is an attribute, and does not count, point or name a kind."""
    low, tag = sentence.low[i], sentence.tag[i]
    if low in lexicon.NO_ATTRIBUTES or low in lexicon.COUNTING_WORDS:
        return False
    if low in lexicon.RELATIONAL_ADJECTIVES and sentence.has_kid(i, "prep"):
        return False
    if sentence.lemma[sentence.head[i]] in lexicon.FRUIT_PARTS.get(low, ()):
        return False
    return tag in ADJECTIVE_TAGS or tag in PARTICIPLE_TAGS or low in lexicon.DESCRIBING_NOUNS


def list_attributes(sentence: Sentence, i: int) -> list[str]:
    """Lists a noun's attributes: adjectives, participles, and those coordinated with them."""
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
    """Returns an adjective and the adjectives that are coordinated with it or modify it."""
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
    """Returns attributes as words, in text order."""
    words = []
    for i in sorted(set(indices)):
        low = sentence.low[i]
        if not low[0].isalpha():
            continue
        if sentence.dep[i] in MODIFIERS and i and _joins_participle(sentence, i - 1):
            words.append(f"{sentence.low[i - 1]}-{low}")
        else:
            words.append(sentence.lemma[i] if sentence.tag[i] in ADJECTIVE_TAGS else low)
    return words


def is_place_noun(sentence: Sentence, i: int) -> bool:
    """Returns whether a noun is inside a compound preposition ("front" in "in front of")."""
    return (
        sentence.is_hidden[i]
        and sentence.dep[i] == "pobj"
        and sentence.low[i] in lexicon.PLACE_NOUNS
    )


def find_referents(sentence: Sentence, i: int) -> list[int]:
    """Returns the objects that a noun phrase with head `i` stands for, coordinations included.

    "photo of" stands for the noun after it, a relative pronoun for its antecedent. "it" has none.
    """
    found = list(find_content(sentence, i))
    for kid in sentence.kids_of(i, "conj"):
        found.extend(find_referents(sentence, kid))
    return found


def find_content(sentence: Sentence, i: int) -> list[int]:
    """Like `find_referents`, but without the coordinations of the head itself."""
    if sentence.low[i] in lexicon.RELATIVE_PRONOUNS and sentence.tag[i] in ("WDT", "WP", "IN"):
        antecedent, clause = i - 1, i
        while sentence.head[clause] != clause:
            if sentence.dep[clause] == "relcl":
                antecedent = sentence.head[clause]
                break
            clause = sentence.head[clause]
        return find_content(sentence, antecedent) if antecedent >= 0 else []
    if sentence.is_hidden[i]:
        found = []
        for of in sentence.kids_of(i, "prep"):
            if sentence.low[of] == "of":
                for kid in sentence.kids_of(of, "pobj"):
                    found.extend(find_referents(sentence, kid))
        return found
    return [i] if sentence.is_object[i] else []


def is_animate(sentence: Sentence, i: int) -> bool:
    """Returns whether an object is a living thing, judged by its head noun."""
    lemma = sentence.lemma[i]
    if lemma in lexicon.ANIMATE_NOUNS or is_person_pronoun(sentence, i):
        return True
    return lemma.endswith(lexicon.ANIMATE_ENDINGS) and lemma not in lexicon.THINGS_LIKE_PERSONS


def find_prep_targets(sentence: Sentence, i: int) -> list[tuple[str, int]]:
    """Returns (preposition, object) for every prepositional phrase of a verb."""
    found = []
    for kid in sentence.kids[i]:
        if sentence.dep[kid] == "prep":
            found += expand_preposition(sentence, kid)
        elif sentence.dep[kid] in ("advmod", "prt"):
            found += expand_adverb(sentence, kid)
    return found


def find_adjective_targets(sentence: Sentence, adjective: int) -> list[tuple[str, int]]:
    """Returns (predicate, object) for each phrase of an adjective: "full of water"."""
    found = find_prep_targets(sentence, adjective)
    if sentence.low[adjective] in lexicon.RELATIONAL_ADJECTIVES:
        return [(f"{sentence.low[adjective]} {name}", target) for name, target in found]
    return found


def expand_adverb(sentence: Sentence, adverb: int) -> list[tuple[str, int]]:
    """Expands an adverb that starts a compound preposition ("next to a wall")."""
    return [
        (f"{sentence.low[adverb]} {name}", target)
        for kid in sentence.kids_of(adverb, "prep")
        for name, target in expand_preposition(sentence, kid)
    ]


def expand_preposition(sentence: Sentence, preposition: int) -> list[tuple[str, int]]:
    """Returns (name, object) for each object of a preposition, simple or compound."""
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


@dataclass
class SubjectFinder:
    """Finds the subjects of the verbs of one sentence, and caches them."""

    sentence: Sentence
    _found: dict[int, tuple[list[int], bool]] = field(default_factory=dict)

    def find(self, i: int) -> tuple[list[int], bool]:
        """Returns a verb's subjects, own or inherited, and whether the grammar gives it any."""
        if i not in self._found:
            self._found[i] = self._infer(i)
        return self._found[i]

    def _infer(self, i: int) -> tuple[list[int], bool]:
        sentence = self.sentence
        own = sentence.kids_of(i, "nsubj", "nsubjpass")
        if own:
            if len(own) > 1 and ":" in sentence.low[own[0] : own[-1]]:
                own = own[-1:]  # "hair today : the model has dyed hers"
            return [j for kid in own for j in find_referents(sentence, kid)], True
        if sentence.has_kid(i, "expl", "csubj", "csubjpass"):
            return [], True
        dep, head = sentence.dep[i], sentence.head[i]
        if dep == "acl":
            return self._find_of_participle(i), True
        if dep == "relcl":
            return find_content(sentence, head), True
        if dep == "pcomp":
            return self._find_of_gerund(i)
        if dep in ("conj", "xcomp", "advcl", "ccomp", "parataxis", "dep"):
            if sentence.tag[head] in VERB_TAGS:
                controllers = sentence.kids_of(head, "dobj") if dep == "xcomp" else []
                pastime = controllers and sentence.lemma[controllers[0]] in lexicon.PASTIMES
                if controllers and sentence.lemma[head] in lexicon.CONTROL_VERBS and not pastime:
                    return find_referents(sentence, controllers[0]), True
                return self.find(head)
            while sentence.dep[head] == "prep" and sentence.head[head] != head:
                head = sentence.head[head]
            if sentence.tag[head] in VERB_TAGS:
                return self.find(head)
            if sentence.dep[head] in ("acomp", "oprd"):
                return self.find(sentence.head[head])
            if sentence.has_kid(head, "nsubj"):
                return self._infer(head)
            shared = self._find_of_participle(i)
            return shared, bool(shared)
        return [], False

    def _find_of_participle(self, i: int) -> list[int]:
        """Returns the subjects of a participle that modifies a noun.

        In "girl with a hat smiling" the parser attaches the participle to the hat; this returns the
        living thing farther up in the tree.
        """
        sentence = self.sentence
        noun = sentence.head[i]
        if sentence.lemma[i] == "isolate":
            return self._find_of_picture(noun, i)
        while sentence.dep[noun] == "prep" and sentence.head[noun] != noun:
            noun = sentence.head[noun]
        content = find_content(sentence, noun)
        if sentence.tag[i] not in ("VBG", "VBZ") or any(is_animate(sentence, j) for j in content):
            return self.share(noun, i)
        base = noun
        while sentence.dep[base] in ("conj", "pobj", "prep", "dobj"):
            if sentence.dep[base] == "dobj" and sentence.dep[i] != "conj":
                break
            base = sentence.head[base]
            acts = sentence.tag[base] in VERB_TAGS
            above = self.find(base)[0] if acts else find_content(sentence, base)
            if any(is_animate(sentence, j) for j in above):
                return above
        return self.share(noun, i)

    def _find_of_picture(self, noun: int, before: int) -> list[int]:
        """Returns what a picture shows: for "a man with a dog isolated on white", the man."""
        sentence, i = self.sentence, noun
        while sentence.dep[i] in ("acl", "conj", "dobj", "pobj", "prep") and sentence.head[i] < i:
            i = sentence.head[i]
        if sentence.tag[i] in VERB_TAGS:
            return self.find(i)[0] or self.share(noun, before)
        return self.share(i, before)

    def _find_of_gerund(self, i: int) -> tuple[list[int], bool]:
        """Returns the subjects of a gerund after a preposition ("after winning a race")."""
        sentence = self.sentence
        host = sentence.head[i]
        while sentence.dep[host] == "prep" and sentence.head[host] != host:
            host = sentence.head[host]
        if sentence.tag[host] in VERB_TAGS:
            return self.find(host)
        if sentence.lemma[host] in lexicon.PICTURE_NOUNS:
            return [], True
        actors = [j for j in find_content(sentence, host) if is_animate(sentence, j)]
        return actors, bool(actors)

    def share(self, noun: int, before: int) -> list[int]:
        """Returns a noun and the nouns coordinated with it that share a modifier after them.

        An earlier noun that already has a modifier does not share ("a man riding a horse and a dog
        barking").
        """
        sentence = self.sentence
        found = find_content(sentence, noun)
        for kid in sentence.kids_of(noun, "conj"):
            if kid < before:
                found = found + find_referents(sentence, kid)
        while sentence.dep[noun] == "conj":
            noun = sentence.head[noun]
            phrases = sentence.kids_of(noun, "acl", "relcl", "prep")
            if any(sentence.low[kid] != "of" for kid in phrases):
                break
            found = find_content(sentence, noun) + found
        return found
