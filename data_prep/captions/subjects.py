"""Who does what a verb says: the subjects of a clause, its own, inherited or shared.

Names and attributes come from `nouns`, the edges from `verbs`. Ours throughout: the specification
is tests/data_prep/captions/caption_examples.toml.
"""

from data_prep.captions import lexicon, nouns
from data_prep.captions.sentence import VERB_TAGS, Sentence


class SubjectFinder:
    """Finds the subjects of the verbs of one sentence, each once."""

    def __init__(self, sentence: Sentence):
        self.sentence = sentence
        self._found: dict[int, tuple[list[int], bool]] = {}

    def find(self, i: int) -> tuple[list[int], bool]:
        """The subjects of a verb, its own or inherited, and whether the grammar gives it one."""
        if i not in self._found:
            self._found[i] = self._infer(i)
        return self._found[i]

    def _infer(self, i: int) -> tuple[list[int], bool]:
        sentence = self.sentence
        own = sentence.kids_of(i, "nsubj", "nsubjpass")
        if own:
            if len(own) > 1 and ":" in sentence.low[own[0] : own[-1]]:
                own = own[-1:]  # "hair today : the model has dyed hers"
            return [j for kid in own for j in nouns.find_referents(sentence, kid)], True
        if sentence.has_kid(i, "expl", "csubj", "csubjpass"):
            return [], True
        dep, head = sentence.dep[i], sentence.head[i]
        if dep == "acl":
            return self._find_of_participle(i), True
        if dep == "relcl":
            return nouns.find_content(sentence, head), True
        if dep == "pcomp":
            return self._find_of_gerund(i)
        if dep in ("conj", "xcomp", "advcl", "ccomp", "parataxis", "dep"):
            if sentence.tag[head] in VERB_TAGS:
                controllers = sentence.kids_of(head, "dobj") if dep == "xcomp" else []
                pastime = controllers and sentence.lemma[controllers[0]] in lexicon.PASTIMES
                if controllers and sentence.lemma[head] in lexicon.CONTROL_VERBS and not pastime:
                    return nouns.find_referents(sentence, controllers[0]), True
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
        """The subjects of a participle behind a noun.

        In "girl with a hat smiling" the parser gives the participle to the hat; a living thing
        farther up is taken instead.
        """
        sentence = self.sentence
        noun = sentence.head[i]
        if sentence.lemma[i] == "isolate":
            return self._find_of_picture(noun, i)
        while sentence.dep[noun] == "prep" and sentence.head[noun] != noun:
            noun = sentence.head[noun]
        content = nouns.find_content(sentence, noun)
        if sentence.tag[i] not in ("VBG", "VBZ") or any(
            nouns.is_animate(sentence, j) for j in content
        ):
            return self.share(noun, i)
        base = noun
        while sentence.dep[base] in ("conj", "pobj", "prep", "dobj"):
            if sentence.dep[base] == "dobj" and sentence.dep[i] != "conj":
                break
            base = sentence.head[base]
            acts = sentence.tag[base] in VERB_TAGS
            above = self.find(base)[0] if acts else nouns.find_content(sentence, base)
            if any(nouns.is_animate(sentence, j) for j in above):
                return above
        return self.share(noun, i)

    def _find_of_picture(self, noun: int, before: int) -> list[int]:
        """All that a picture is of: "a man with a dog isolated on white" is the man."""
        sentence, i = self.sentence, noun
        while sentence.dep[i] in ("acl", "conj", "dobj", "pobj", "prep") and sentence.head[i] < i:
            i = sentence.head[i]
        if sentence.tag[i] in VERB_TAGS:
            return self.find(i)[0] or self.share(noun, before)
        return self.share(i, before)

    def _find_of_gerund(self, i: int) -> tuple[list[int], bool]:
        """The subjects of a gerund behind a preposition ("after winning a race")."""
        sentence = self.sentence
        host = sentence.head[i]
        while sentence.dep[host] == "prep" and sentence.head[host] != host:
            host = sentence.head[host]
        if sentence.tag[host] in VERB_TAGS:
            return self.find(host)
        if nouns.is_picture(sentence, host):
            return [], True
        actors = [j for j in nouns.find_content(sentence, host) if nouns.is_animate(sentence, j)]
        return actors, bool(actors)

    def share(self, noun: int, before: int) -> list[int]:
        """A noun with the nouns coordinated with it that stand before a common modifier.

        An earlier noun with a modifier of its own behind it does not share ("a man riding a horse
        and a dog barking").
        """
        sentence = self.sentence
        found = nouns.find_content(sentence, noun)
        for kid in sentence.kids_of(noun, "conj"):
            if kid < before:
                found = found + nouns.find_referents(sentence, kid)
        while sentence.dep[noun] == "conj":
            noun = sentence.head[noun]
            phrases = sentence.kids_of(noun, "acl", "relcl", "prep")
            if any(sentence.low[kid] != "of" for kid in phrases):
                break
            found = nouns.find_content(sentence, noun) + found
        return found

    def find_agents(self, i: int) -> list[int]:
        """The agents of a passive verb: "played by a woman"."""
        sentence = self.sentence
        return [
            j
            for by in sentence.kids_of(i, "agent")
            for kid in sentence.kids_of(by, "pobj")
            for j in nouns.find_referents(sentence, kid)
        ]
