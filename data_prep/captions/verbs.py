"""Verb rules for captions: turns a parsed caption into the edges of its graph.

`nouns` provides objects, names, attributes and subjects. The rules are ours, specified by
tests/data_prep/captions/caption_examples.toml.
"""

from dataclasses import dataclass, field

from spacy.tokens import Doc

from data_prep.captions import lexicon, nouns
from data_prep.captions.graph import CaptionGraph, Edge, ObjectNode
from data_prep.captions.repairs import repair_sentence
from data_prep.captions.sentence import (
    ADJECTIVE_TAGS,
    FINITE_TAGS,
    NOUN_TAGS,
    VERB_TAGS,
    CaptionLemmatizer,
    Sentence,
)

_GERUND_CLAUSES = frozenset(
    ("ROOT", "csubj", "conj", "xcomp", "advcl", "ccomp", "parataxis", "dep")
)
_CLAUSES = _GERUND_CLAUSES | {"acl", "relcl", "pcomp"}
_WITHOUT_OBJECT = lexicon.INTRANSITIVE_VERBS | lexicon.POSTURE_VERBS | lexicon.MOVING_VERBS
_GOVERNING = lexicon.CONTROL_VERBS | lexicon.PHASE_VERBS
_BRINGING_ABOUT = lexicon.CONTROL_VERBS - {"let"}  # "let your home shine" is a request
_ACTION, _RELATION, _PLACE = "action", "relation", "place"


def build_graph(doc: Doc, words: CaptionLemmatizer) -> CaptionGraph:
    """Extracts the graph of one caption."""
    sentence = Sentence(doc)
    repair_sentence(sentence, words)
    nouns.mark_objects(sentence)
    return _GraphBuilder(sentence, words.verbs, nouns.SubjectFinder(sentence)).build()


@dataclass
class _GraphBuilder:
    """Collects the edges of one sentence, between token indices until `build` names them."""

    sentence: Sentence
    verbs: frozenset[str]
    subjects: nouns.SubjectFinder
    actions: list[tuple[int | None, str, int | None]] = field(default_factory=list)
    relations: list[tuple[int | None, str, int | None]] = field(default_factory=list)
    predicated: dict[int, list[int]] = field(default_factory=dict)

    def build(self) -> CaptionGraph:
        sentence = self.sentence
        objects = []
        for i in range(len(sentence.low)):
            if sentence.tag[i] in VERB_TAGS:
                if self.is_clause(i):
                    self.add_verb(i)
            elif sentence.kids[i] and (sentence.is_object[i] or sentence.is_hidden[i]):
                self.add_noun_relations(i)
            if sentence.is_object[i] and not sentence.is_hidden[i]:
                objects.append(i)
        names = {}
        attributes: dict[str, list[str]] = {}
        for i in objects:
            name = names[i] = nouns.name_object(sentence, i)
            words = attributes.setdefault(name, [])
            if sentence.kids[i]:
                words += nouns.list_attributes(sentence, i)
            if i in self.predicated:
                words += nouns.name_attributes(sentence, self.predicated[i])
        # Every end of an edge is an object. Duplicate edges and attributes are dropped.
        degree = dict.fromkeys(attributes, 0)
        graph = CaptionGraph()
        for found, edges in (self.actions, graph.actions), (self.relations, graph.relations):
            named: dict[Edge, None] = {}
            for subject, predicate, target in found:
                named[Edge(names.get(subject), predicate, names.get(target))] = None
            edges.extend(named)
            for edge in named:
                for end in {edge.subject, edge.object}:
                    if end is not None:
                        degree[end] += 1
        for name, words in attributes.items():
            unique = tuple(dict.fromkeys(words))
            graph.objects[name] = ObjectNode(unique, len(unique) + degree[name])
        return graph

    # Verbs

    def is_clause(self, i: int) -> bool:
        """Returns whether a verb heads a clause, as no auxiliary or participle of a noun does."""
        sentence = self.sentence
        if sentence.lemma[i].rpartition("-")[2] not in self.verbs:
            return False
        while sentence.dep[i] == "conj":
            i = sentence.head[i]
            if sentence.tag[i] in NOUN_TAGS or sentence.tag[i] == "IN":
                return True
        return sentence.dep[i] in _CLAUSES

    def add_verb(self, i: int) -> None:
        sentence = self.sentence
        lemma = sentence.lemma[i]
        subjects, grounded = self.subjects.find(i)
        passive = self.is_passive(i)
        by = sentence.kids_of(i, "agent") if passive else []  # "played by a woman"
        agents = self.expand([kid for word in by for kid in sentence.kids_of(word, "pobj")])
        if self.is_unreal(i, grounded or bool(agents), passive):
            return
        if lemma == "be":
            self.add_copula(i, subjects)
            return
        linking = lemma in lexicon.LINKING_VERBS
        adjectives = [
            kid
            for kid in sentence.kids[i]
            if sentence.dep[kid] in ("acomp", "oprd")
            or (linking and kid == i + 1 and sentence.tag[kid] in ADJECTIVE_TAGS)
        ]
        if adjectives and (linking or passive or lemma in lexicon.RESTING_VERBS):
            self.predicate(adjectives, subjects)
            if linking:
                self.relate(subjects, nouns.find_prep_targets(sentence, i))
                return
        kind = self.classify(i, passive, agents, subjects)
        if kind is None:
            return
        light = lexicon.LIGHT_OBJECTS.get(lemma, ())
        particles = [
            sentence.low[kid]
            for kid in sentence.kids_of(i, "prt", "dobj")
            if sentence.dep[kid] == "prt" or sentence.low[kid] in light
        ]
        predicate = " ".join((lemma, *particles))
        targets = nouns.find_prep_targets(sentence, i)
        if kind == _PLACE:
            self.relate(subjects, targets)
            return
        # "jumps off a board into the sea": the particle belongs to the board.
        bare = sentence.has_kid(i, "dobj") and not any(word in light for word in particles)
        targets = [
            (f"{lemma if bare or name.split()[0] in particles else predicate} {name}", target)
            for name, target in targets
        ]
        if passive and agents:
            targets = [(predicate, patient) for patient in subjects] + targets
            subjects = agents
        elif not passive:
            targets = self.find_objects(i, predicate) + targets
        if kind == _RELATION:
            self.relate(subjects, targets)
            return
        for subject in subjects or [None]:
            for name, target in targets or [(predicate, None)]:
                if (subject is not None or target is not None) and subject != target:
                    self.actions.append((subject, name, target))

    def classify(self, i: int, passive: bool, agents: list[int], subjects: list[int]) -> str | None:
        """Returns the kind of edge that a verb makes, or None if it adds nothing to the graph."""
        sentence = self.sentence
        lemma = sentence.lemma[i]
        animate = any(nouns.is_animate(sentence, j) for j in (agents if passive else subjects))
        if passive:
            if lemma in lexicon.NAMING_VERBS and not agents:
                return None
            making = lexicon.PICTURE_MAKING_VERBS | lexicon.NAMING_VERBS
            if lemma in making and self.has_picture_subject(i):
                return None
            if lemma in lexicon.SHOWING_VERBS or lemma in lexicon.PLACING_VERBS:
                return _PLACE
            if lemma in lexicon.CONDITION_VERBS or lemma in lexicon.STATE_VERBS:
                return _ACTION if animate else _RELATION
            return _ACTION
        if lemma in lexicon.SHOWING_VERBS and lemma not in lexicon.STATE_VERBS:
            if self.has_picture_subject(i):
                return None
            return _ACTION if animate else _RELATION
        if lemma in lexicon.PHASE_VERBS and any(
            # "stop to wash" is two actions, "stop washing" one, and "get to see" one.
            sentence.tag[kid] in VERB_TAGS
            and (lemma != "stop" or sentence.tag[kid] == "VBG")
            and (lemma != "get" or sentence.tag[kid] == "VB")
            for kid in sentence.kids_of(i, "xcomp")
        ):
            return None
        if lemma == "have" and sentence.tag[i] == "VBG" and (animate or not subjects):
            return _ACTION
        if lemma in lexicon.LINKING_VERBS and any(
            sentence.low[kid] == "like" for kid in sentence.kids_of(i, "prep")
        ):
            return _RELATION
        return _RELATION if lemma in lexicon.STATE_VERBS else _ACTION

    def has_picture_subject(self, i: int) -> bool:
        """Returns whether the grammatical subject is a word for the picture."""
        sentence = self.sentence
        heads = sentence.kids_of(i, "nsubj", "nsubjpass")
        if not heads and sentence.dep[i] in ("acl", "relcl", "advcl", "conj"):
            heads = [sentence.head[i]]
        return any(sentence.lemma[head] in lexicon.PICTURE_NOUNS for head in heads)

    def is_passive(self, i: int) -> bool:
        sentence = self.sentence
        if sentence.has_kid(i, "auxpass", "nsubjpass", "agent"):
            return True
        if sentence.lemma[i] in lexicon.SHOWING_VERBS and sentence.tag[i] in ("VBD", "VBN"):
            return not sentence.has_kid(i, "dobj", "ccomp", "aux", "prt")
        if sentence.tag[i] not in ("VBN", "VBD") or sentence.has_kid(i, "aux", "dobj"):
            return False
        subjects = sentence.kids_of(i, "nsubj")
        if subjects:
            if sentence.low[subjects[0]] in lexicon.SUBJECT_PRONOUNS:
                return False  # "the necklace I made"
            # "house nestled in the hills", "boy named Max": no auxiliary and no agent.
            lemma = sentence.lemma[i]
            unacted = lexicon.PLACING_VERBS | lexicon.CONDITION_VERBS | lexicon.NAMING_VERBS
            return sentence.tag[i] == "VBN" or lemma in unacted
        if sentence.dep[i] == "conj" and sentence.tag[sentence.head[i]] in VERB_TAGS:
            return self.is_passive(sentence.head[i])
        return sentence.tag[i] == "VBN" or sentence.dep[i] == "acl"

    def is_unreal(self, i: int, grounded: bool, passive: bool) -> bool:
        """Returns whether a verb is not done: a negation, command, heading or infinitive.

        `grounded` tells whether the clause has a grammatical subject or agent.
        """
        sentence = self.sentence
        if sentence.has_kid(i, "neg") or self.hangs_on_unreal(i):
            return True
        head = sentence.head[i]
        lets = sentence.low[head] == "let" and sentence.dep[head] == "ROOT"
        if lets and sentence.dep[i] == "ccomp" and not sentence.has_kid(head, "nsubj", "aux"):
            return True  # "let 's talk", "let me see"
        if any(sentence.tag[kid] == "TO" for kid in sentence.kids_of(i, "aux")):
            allowed = sentence.dep[i] == "ccomp" and sentence.has_kid(i, "nsubj")
            if sentence.dep[i] not in ("xcomp", "advcl", "conj") and not (
                allowed and sentence.lemma[head] in lexicon.CONTROL_VERBS
            ):
                return True
            if not grounded:
                return True
            if sentence.tag[head] not in VERB_TAGS and (
                sentence.low[head] not in lexicon.IMMINENT_ADJECTIVES
            ):
                return True
        # "being carried to a car" is going on, whoever is carried.
        if grounded or any(sentence.low[kid] == "being" for kid in sentence.kids_of(i, "auxpass")):
            return False
        first = i
        while sentence.dep[first] == "conj" and sentence.tag[sentence.head[first]] in VERB_TAGS:
            first = sentence.head[first]
        if passive or sentence.dep[first] not in _GERUND_CLAUSES:
            return True
        if any(sentence.tag[kid] == "MD" for kid in sentence.kids_of(i, "aux")):
            return False
        # A gerund is real if its main verb is: "visit the shop using this map".
        while sentence.dep[i] != "ROOT" and sentence.tag[i] not in ("VB", "VBP"):
            i = sentence.head[i]
        return sentence.tag[i] in ("VB", "VBP")

    def hangs_on_unreal(self, i: int) -> bool:
        """Returns whether a verb is unreal because the verb that governs it is.

        "Ideas to help you decorate", "does not want to go", "mix until all is incorporated".
        """
        sentence = self.sentence
        while sentence.dep[i] == "conj" and sentence.tag[sentence.head[i]] in VERB_TAGS:
            i = sentence.head[i]
        head = sentence.head[i]
        if sentence.dep[i] == "advcl" and sentence.tag[head] == "VB":
            awaited = any(sentence.low[kid] == "until" for kid in sentence.kids_of(i, "mark"))
            return awaited and not sentence.has_kid(head, "nsubj", "aux")
        if sentence.dep[i] not in ("ccomp", "xcomp") or sentence.lemma[head] not in _GOVERNING:
            return False
        return sentence.has_kid(head, "neg") or (
            sentence.dep[head] in ("acl", "relcl")
            and any(sentence.tag[kid] == "TO" for kid in sentence.kids_of(head, "aux"))
        )

    def find_objects(self, i: int, predicate: str) -> list[tuple[str, int]]:
        """Returns (predicate, object) for direct and indirect objects and relative antecedents."""
        sentence = self.sentence
        light = lexicon.LIGHT_OBJECTS.get(sentence.lemma[i], ())
        direct = [
            kid for kid in sentence.kids_of(i, "dobj", "attr") if sentence.low[kid] not in light
        ]
        found = [(predicate, j) for j in self.expand(direct)]
        if not direct and sentence.lemma[i] in _BRINGING_ABOUT:
            for clause in sentence.kids_of(i, "ccomp"):  # "watch a man ride"
                if sentence.tag[clause] in FINITE_TAGS or sentence.has_kid(clause, "mark"):
                    continue
                things = sentence.kids_of(clause, "nsubj", "nsubjpass")
                found += [(predicate, j) for j in self.expand(things)]
        for kid in sentence.kids_of(i, "dative"):
            if sentence.kids_of(kid, "pobj"):
                found += [
                    (f"{predicate} {name}", j)
                    for name, j in nouns.expand_preposition(sentence, kid)
                ]
            else:
                found += [(f"{predicate} to", j) for j in nouns.find_referents(sentence, kid)]
        if sentence.dep[i] == "relcl" and not direct and not self.is_setting(i):
            own = sentence.kids_of(i, "nsubj", "nsubjpass")
            if any(sentence.low[kid] not in lexicon.RELATIVE_PRONOUNS for kid in own):
                stranded = [kid for kid in sentence.kids_of(i, "prep") if not sentence.kids[kid]]
                name = f"{predicate} {sentence.low[stranded[0]]}" if stranded else predicate
                if stranded or self.takes_object(i):
                    head = sentence.head[i]
                    found += [(name, j) for j in nouns.find_content(sentence, head)]
        return found

    def expand(self, phrases: list[int]) -> list[int]:
        """Returns the objects that noun phrases stand for."""
        return [j for kid in phrases for j in nouns.find_referents(self.sentence, kid)]

    def is_setting(self, i: int) -> bool:
        """Returns whether a relative clause tells what happens there: "a space where they meet"."""
        sentence = self.sentence
        return any(
            sentence.low[kid] in ("how", "when", "where", "why")
            for kid in sentence.kids_of(i, "advmod")
        ) or any(
            sentence.low[inner] in lexicon.RELATIVE_PRONOUNS
            for kid in sentence.kids_of(i, "prep")
            for inner in sentence.kids_of(kid, "pobj")
        )

    def takes_object(self, i: int) -> bool:
        """Returns whether the antecedent is the object of the verb in its relative clause."""
        sentence = self.sentence
        if not sentence.kids_of(i, "prep"):
            return True
        if sentence.lemma[i] in _WITHOUT_OBJECT:
            return False
        antecedent = sentence.lemma[sentence.head[i]]
        return antecedent not in lexicon.SETTINGS and antecedent not in lexicon.MANNERS

    def add_copula(self, i: int, subjects: list[int]) -> None:
        """Adds what "be" states: attributes, "is" between nouns, and places."""
        sentence = self.sentence
        complements = sentence.kids_of(i, "attr")
        found = self.expand(complements)
        if sentence.has_kid(i, "expl"):
            subjects = found
        else:
            self.relate(subjects, [("is", j) for j in found])
            subjects = subjects or found
        adjectives = sentence.kids_of(i, "acomp")
        adjectives += [kid for kid in complements if sentence.tag[kid] in ADJECTIVE_TAGS]
        self.predicate(adjectives, subjects)
        self.relate(subjects, nouns.find_prep_targets(sentence, i))

    def predicate(self, adjectives: list[int], subjects: list[int]) -> None:
        """Adds adjectives to the subjects as attributes, and their phrases as relations."""
        sentence = self.sentence
        for adjective in adjectives:
            for j in subjects:
                words = [
                    k
                    for k in nouns.expand_adjective(sentence, adjective)
                    if nouns.describes(sentence, k)
                ]
                self.predicated.setdefault(j, []).extend(words)
            self.relate(subjects, nouns.find_adjective_targets(sentence, adjective))

    # Relations

    def is_bare_pair(self, i: int) -> bool:
        """Returns whether a noun and the noun it is joined to are bare: "leaves and fruit of"."""
        sentence = self.sentence
        partner = sentence.head[i]
        return (
            sentence.dep[i] == "conj"
            and sentence.tag[partner] in NOUN_TAGS
            and not sentence.has_kid(i, "det", "amod", "poss", "compound")
            and not sentence.has_kid(partner, "amod", "poss", "compound", "prep", "acl")
        )

    def relate(self, subjects: list[int], targets: list[tuple[str, int]]) -> None:
        for subject in subjects:
            for name, target in targets:
                if subject != target:
                    self.relations.append((subject, name, target))

    def add_noun_relations(self, i: int) -> None:
        """Adds the prepositional phrases of a noun."""
        sentence = self.sentence
        if nouns.is_place_noun(sentence, i):
            return
        for kid in sentence.kids[i]:
            dep = sentence.dep[kid]
            if dep == "prep" and not (sentence.is_hidden[i] and sentence.low[kid] == "of"):
                targets = nouns.expand_preposition(sentence, kid)
            elif dep == "advmod":
                targets = nouns.expand_adverb(sentence, kid)
            elif dep in ("amod", "acl", "relcl") and sentence.tag[kid] in ADJECTIVE_TAGS:
                targets = nouns.find_adjective_targets(sentence, kid)
            else:
                continue
            if targets:
                shared = sentence.low[kid] in lexicon.PLACE_PREPOSITIONS or (
                    sentence.low[kid] == "of" and self.is_bare_pair(i)
                )
                owners = self.subjects.share(i, kid) if shared else nouns.find_content(sentence, i)
                self.relate(owners, targets)
