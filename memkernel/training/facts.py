"""Generated English: facts in many phrasings, questions with their exact answers, corrections, and side texts.

A question reads "Where does Anna live? Answer:", its answer "Oslo" and the end of the sequence. All that is generated
is a function of the random generator that is passed in.
"""

import random
import re
from dataclasses import dataclass

from memkernel.training import words

ANSWER = " Answer:"


@dataclass(frozen=True)
class Relation:
    """What a subject of one kind may have: {s} is the subject and {v} the value in its sentences and questions."""

    subject: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


# fmt: off
RELATIONS = {
    "home": Relation("person", "place",
        ("{s} lives in {v}.", "The home of {s} is {v}.", "{s} has a house in {v}."),
        ("Where does {s} live?", "What is the home of {s}?", "In what town is the house of {s}?")),
    "birth": Relation("person", "place",
        ("{s} was born in {v}.", "The birthplace of {s} is {v}.", "{s} comes from {v}."),
        ("Where was {s} born?", "What is the birthplace of {s}?", "Where does {s} come from?")),
    "job": Relation("person", "job",
        ("{s} works as a {v}.", "The job of {s} is {v}.", "{s} earns money as a {v}."),
        ("What does {s} work as?", "What is the job of {s}?", "How does {s} earn money?")),
    "taste": Relation("person", "thing",
        ("{s} likes {v}.", "{s} is fond of {v}.", "{s} enjoys {v}."),
        ("What does {s} like?", "What is {s} fond of?", "What does {s} enjoy?")),
    "pet": Relation("person", "pet",
        ("{s} owns a {v}.", "The pet of {s} is a {v}.", "{s} keeps a {v}."),
        ("What does {s} own?", "What is the pet of {s}?", "Which animal does {s} keep?")),
    "friend": Relation("person", "person",
        ("{s} is a friend of {v}.", "The best friend of {s} is {v}.", "{s} often meets {v}."),
        ("Who is a friend of {s}?", "Who is the best friend of {s}?", "Whom does {s} often meet?")),
    "mayor": Relation("place", "person",
        ("The mayor of {s} is {v}.", "{s} is governed by {v}."),
        ("Who is the mayor of {s}?", "Who governs {s}?")),
    "fame": Relation("place", "thing",
        ("{s} is famous for {v}.", "{s} sells {v}."),
        ("What is {s} famous for?", "What does {s} sell?")),
    "colour": Relation("thing", "colour",
        ("The {s} are {v}.", "The colour of the {s} is {v}."),
        ("What colour are the {s}?", "What is the colour of the {s}?")),
    "material": Relation("thing", "material",
        ("The {s} are made of {v}.", "Someone made the {s} from {v}."),
        ("What are the {s} made of?", "What did someone make the {s} from?")),
}
# fmt: on
ALL = tuple(RELATIONS)
CORRECTIONS = ("Now {}", "In fact, {}")
SIDE = (
    "It was a {a} day and nobody in town spoke about it.",
    "The {a} road goes along the river and up to the old mill.",
    "After the rain the {a} garden was quiet again.",
    "They waited for the {a} train, which was late as always.",
    "On the table there was nothing but a {a} letter.",
)
ADJECTIVES = ("cold", "long", "warm", "dark", "new", "small", "green", "slow", "short", "plain")


@dataclass(frozen=True)
class Fact:
    relation: str
    subject: str
    value: str

    def statement(self, rng: random.Random) -> str:
        return rng.choice(RELATIONS[self.relation].statements).format(s=self.subject, v=self.value)

    def correction(self, rng: random.Random) -> str:
        """A statement that says of itself that it replaces an earlier one."""
        statement = self.statement(rng)
        statement = "the" + statement[3:] if statement.startswith("The ") else statement
        return rng.choice(CORRECTIONS).format(statement)

    def question(self, rng: random.Random) -> str:
        return rng.choice(RELATIONS[self.relation].questions).format(s=self.subject) + ANSWER

    @property
    def key(self) -> tuple[str, str]:
        """What a later fact with the same key corrects."""
        return self.relation, self.subject


def read(sentence: str) -> Fact | None:
    """The fact that a sentence states in one of the shapes above, a correction or not; None for any other sentence."""
    for prefix in ("", *(correction.removesuffix("{}") for correction in CORRECTIONS)):
        if not sentence.startswith(prefix):
            continue
        rest = sentence.removeprefix(prefix)
        for name, relation in RELATIONS.items():
            for statement in relation.statements:
                pattern = re.escape(statement).replace(r"\{s\}", r"(?P<s>\w+)").replace(r"\{v\}", r"(?P<v>\w+)")
                pattern = pattern.replace("The", "[Tt]he") if prefix else pattern
                if found := re.fullmatch(pattern, rest):
                    return Fact(name, found["s"], found["v"])
    return None


def draw_fact(
    rng: random.Random, held_out: bool, subject_of: Fact | None = None, relations: tuple[str, ...] = ALL
) -> Fact:
    """A new fact of one of the relations; with `subject_of`, any other one about that fact's subject."""
    if subject_of is None:
        relation = rng.choice(relations)
        subject = words.draw(RELATIONS[relation].subject, held_out, rng)
    else:
        kind, subject = RELATIONS[subject_of.relation].subject, subject_of.subject
        others = [n for n, r in RELATIONS.items() if r.subject == kind and n != subject_of.relation]
        relation = rng.choice(others)
    return Fact(relation, subject, words.draw(RELATIONS[relation].value, held_out, rng))


def draw_facts(
    rng: random.Random, count: int, held_out: bool, same_subject: float = 0.2, relations: tuple[str, ...] = ALL
) -> list[Fact]:
    """`count` facts of different keys; each is with probability `same_subject` about the subject of one before, and of
    any relation, otherwise of one of `relations`."""
    facts: dict[tuple[str, str], Fact] = {}
    while len(facts) < count:
        about = rng.choice(tuple(facts.values())) if facts and rng.random() < same_subject else None
        fact = draw_fact(rng, held_out, about, relations)
        facts.setdefault(fact.key, fact)
    return list(facts.values())


def corrected(fact: Fact, rng: random.Random, held_out: bool) -> Fact:
    """The same subject and relation with another value."""
    while True:
        value = words.draw(RELATIONS[fact.relation].value, held_out, rng)
        if value != fact.value:
            return Fact(fact.relation, fact.subject, value)


def side_text(rng: random.Random, sentences: int = 1) -> str:
    """Text that states no fact."""
    return " ".join(rng.choice(SIDE).format(a=rng.choice(ADJECTIVES)) for _ in range(sentences))
