"""What evaluations tell and ask: generated facts of held-out words, those of a page, and files in the layouts of public
data sets."""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from memkernel.cli import read_texts
from memkernel.engine import MIN_TOKENS
from memkernel.training import facts
from memkernel.training.facts import Fact


@dataclass(frozen=True)
class Question:
    """A prompt and the answers of which each is right; `older` is what was true before it was corrected."""

    prompt: str
    answers: tuple[str, ...]
    older: str | None = None


@dataclass(frozen=True)
class Case:
    """Texts that are told in turn, an update each, and the questions that they answer. `kind` groups results."""

    texts: tuple[str, ...]
    questions: tuple[Question, ...]
    kind: str = "facts"


NO_ROOM = "longest: expected room for two facts, got {} tokens, which this tokenizer fills sooner"


def counter(engine) -> Callable[[str], int]:
    """How many tokens a text has."""
    return lambda text: len(engine.tokenizer(text, add_special_tokens=False).input_ids) if text else 0


# -- generated --------------------------------------------------------------------------------------------------------


def fitting(drawn: list[Fact], longest: int, count: Callable[[str], int], rng: random.Random) -> tuple[str, list[Fact]]:
    """Sentences for as many of the facts, from the first on, as `longest` tokens hold, and those facts."""
    text, told = "", []
    for fact in drawn:
        longer = f"{text} {fact.statement(rng)}".strip()
        if count(longer) > longest:
            break
        text, told = longer, [*told, fact]
    return text, told


def about_others(fact: Fact, number: int, rng: random.Random) -> list[Fact]:
    """So many facts, less those of the fact's subject."""
    return [other for other in facts.draw_facts(rng, number, True) if other.subject != fact.subject]


def several_facts(longest: int, count: Callable[[str], int], rng: random.Random) -> Case:
    """One update of different facts, as many as it holds."""
    text, told = fitting(facts.draw_facts(rng, 64, True, same_subject=0), longest, count, rng)
    if not told:
        raise ValueError(f"longest: expected room for a fact, got {longest} tokens, which this tokenizer fills sooner")
    return Case((text,), tuple(Question(fact.question(rng), (fact.value,)) for fact in told))


def same_relation(longest: int, count: Callable[[str], int], rng: random.Random) -> Case:
    """One update of facts of one relation, as many as it holds, which only their subjects tell apart."""
    relation = rng.choice(facts.ALL)
    drawn = facts.draw_facts(rng, 64, True, same_subject=0, relations=(relation,))
    text, told = fitting(drawn, longest, count, rng)
    if len(told) < 2:
        raise ValueError(NO_ROOM.format(longest))
    return Case((text,), tuple(Question(fact.question(rng), (fact.value,)) for fact in told), "same relation")


def same_subject(longest: int, count: Callable[[str], int], rng: random.Random) -> Case:
    """One update with two facts about one subject, which must not be mixed up, among others."""
    for _ in range(1000):
        first = facts.draw_fact(rng, True)
        text, told = fitting([first, facts.draw_fact(rng, True, first)], longest, count, rng)
        if len(told) == 2:
            others, _ = fitting(about_others(first, 16, rng), longest - count(text), count, rng)
            texts = rng.sample([text, others], 2)
            questions = tuple(Question(fact.question(rng), (fact.value,)) for fact in told)
            return Case((" ".join(texts).strip(),), questions, "same subject")
    raise ValueError(NO_ROOM.format(longest))


def corrected(longest: int, count: Callable[[str], int], rng: random.Random) -> Case:
    """A fact, an update about other things, and a correction of the fact: the newer value is right."""
    old = facts.draw_fact(rng, True)
    new = facts.corrected(old, rng, True)
    others = about_others(old, 64, rng)
    texts = [old.statement(rng), fitting(others[:32], longest, count, rng)[0], new.correction(rng)]
    # What is told with the fact and its correction fills their updates as usual.
    for i, part in ((0, others[32:48]), (2, others[48:])):
        rest, _ = fitting(part, longest - count(texts[i]), count, rng)
        texts[i] = f"{rest} {texts[i]}".strip()
    return Case(tuple(texts), (Question(new.question(rng), (new.value,), old.value),), "corrected")


def generated(each: int, longest: int, count: Callable[[str], int], seed: int = 0) -> list[Case]:
    """`each` cases of every kind, of words that training never used. `count` gives a text's tokens."""
    rng = random.Random(f"cases {seed}")
    return [
        make(longest, count, rng)
        for make in (several_facts, same_subject, same_relation, corrected)
        for _ in range(each)
    ]


def unrelated(
    longest: int, count: Callable[[str], int], seed: int = 0, begin: int = 0, known: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Texts without end, from number `begin` on; each depends on its number.

    They are about people, places and things of training, never about those of generated cases, which are held out; and
    not about those that are `known`.
    """
    while True:
        rng = random.Random(f"unrelated {seed} {begin}")
        drawn = [fact for fact in facts.draw_facts(rng, 16, False) if fact.subject not in known]
        yield fitting(drawn, longest, count, rng)[0]
        begin += 1


# -- a page of text ---------------------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line."""
    return re.split(r"(?<=[.?!]) ", " ".join(text.split()))


def updates_of(text: str, longest: int, count: Callable[[str], int], rng: random.Random) -> list[str]:
    """The sentences of a text, for each update as many as `longest` tokens hold, and at least one.

    Side texts go before what has less than MIN_TOKENS.
    """
    updates = [""]
    for sentence in sentences(text):
        longer = f"{updates[-1]} {sentence}".strip()
        if updates[-1] and count(longer) > longest:
            updates.append(sentence)
        else:
            updates[-1] = longer
    for i in range(len(updates)):
        while count(updates[i]) < MIN_TOKENS:
            updates[i] = f"{facts.side_text(rng)} {updates[i]}"
    return updates


def stated(text: str) -> list[Fact]:
    """The facts that a text states in the shapes of `training.facts`, corrected ones once."""
    return list({fact.key: fact for fact in map(facts.read, sentences(text)) if fact is not None}.values())


def page(path: str | Path, longest: int, count: Callable[[str], int], seed: int = 0) -> list[Case]:
    """The updates of a text file that state facts, with questions about these.

    Raises ValueError naming the file if it cannot be read or states none.
    """
    rng, made = random.Random(f"page {seed}"), []
    (text,) = read_texts([str(path)])
    for update in updates_of(text, longest, count, rng):
        questions = tuple(Question(fact.question(rng), (fact.value,)) for fact in stated(update))
        made += [Case((update,), questions, "page")] if questions else []
    if not made:
        raise ValueError(f"{path}: expected a fact, such as 'Mila lives in Dresden.', got none")
    return made


# -- files ------------------------------------------------------------------------------------------------------------


def read_json(path: str | Path):
    """A JSON file, or the objects of its lines. Raises ValueError naming the file."""
    try:
        text = Path(path).read_text()
        return [json.loads(line) for line in text.splitlines()] if str(path).endswith(".jsonl") else json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a file of JSON: {error}") from None


def named(path: str | Path, read: Callable, *args):
    """`read(*args)`, its complaints about the layout turned into a ValueError naming the file."""
    try:
        if not (found := read(*args)):
            raise ValueError("expected at least one case, found none")
        return found
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not in the layout that was expected ({missing})") from None


def squad(path: str | Path, limit: int | None = None) -> list[Case]:
    """Answerable questions of a SQuAD 2.0 file, prompted as in the published evaluation."""
    return named(path, lambda raw: list(islice(_squad(raw), limit)), read_json(path))


def _squad(raw: dict) -> Iterator[Case]:
    for entry in raw["data"]:
        for paragraph in entry["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                if answers and not qa.get("is_impossible", False):
                    prompt = f"Questions: {qa['question']} Answer:"
                    yield Case((f"Context: {paragraph['context']}",), (Question(prompt, answers[:1]),), "squad")


def natural_questions(path: str | Path, limit: int | None = None) -> list[Case]:
    """Questions with a short answer of a simplified NaturalQuestions file (.jsonl), prompted as published."""
    return named(path, lambda raw: list(islice(_natural_questions(raw), limit)), read_json(path))


def _natural_questions(raw: list[dict]) -> Iterator[Case]:
    for line in raw:
        annotation = line["annotations"][0]
        if annotation["short_answers"]:
            context = f"Context: {_span(line, annotation['long_answer'])}"
            prompt = f"Questions: {line['question_text']}? Answer:"
            answer = _span(line, annotation["short_answers"][0])
            yield Case((context,), (Question(prompt, (answer,)),), "natural questions")


def _span(line: dict, span: dict) -> str:
    tokens = line["document_tokens"][span["start_token"] : span["end_token"]]
    return " ".join(token["token"] for token in tokens if not token["html_token"])


RETENTION_FILES = {"squad": squad, "nq": natural_questions}
