"""What one training step reads and writes: after MemoryLLM, section 3.2, every step is an episode of updates, of which
one carries gradient, and of questions asked at its end.

    (a) new knowledge: one update with gradient; half the time its rows alone are read, half the time the whole pool
    (b) continuous contexts: several updates, the last one with gradient; questions about all of them
    (c) against forgetting: an update with gradient, then unrelated ones; questions about the first
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernel.training import facts
from memkernel.training.facts import Fact

SCORED_OF_PROMPTS = 0.1  # of the tokens of questions, drawn at random; of answers all
SCORED_OF_TOLD = 0.5  # of the tokens of facts that are told again
ASKED = 0.6  # of the facts that are read after the first; the others are told again
EARLIER = 0.3  # of the facts that are read after the first, from the updates of earlier steps
LONGEST_AGO = 16  # updates that a fact of an earlier step is asked about
MOST_FACTS = 6  # of an update, as far as there is room
RELATIONS_TOLD = (1, 1, 1, 2, 4)  # of which one is drawn: how many relations the facts of an episode have
CORRECTED = 0.1  # of the facts, by a later one
ABOUT_GRADED = 0.5  # of the questions of an episode of several updates
FIRST_FILL = 0.04  # of the episodes begin with empty pools


@dataclass(frozen=True)
class Plan:
    """An episode's shape. updates: how many; graded: the one with gradient; alone: only its rows are read; first: the
    pools are empty before; chunk: tokens of an update; blocks: how many updates' rows, the newest of the pool, are
    read, unless alone."""

    updates: int
    graded: int
    alone: bool
    first: bool
    chunk: int
    blocks: int


@dataclass(frozen=True)
class Episode:
    """Tokens of an episode of P pools.

    chunks: [updates, P, T] int64. read: [P * sequences, T'] int64, padded on the right. answer: like read, the number
    of the answer that a token belongs to, -1 outside answers. scored: like read, bool, whether a token counts in the
    loss.
    told: what each pool was told, oldest first, as (updates since, fact), 0 for the episode's last update.
    """

    chunks: Tensor
    read: Tensor
    answer: Tensor
    scored: Tensor
    told: list[list[tuple[int, Fact]]]


def plan_step(progress: float, write_rows: int, memory_rows: int, rng: random.Random) -> Plan:
    """The curriculum at `progress` from 0 to 1: updates whose new rows alone are read, then more and ever more of the
    newest rows and the tasks that need them, until the whole pool is read."""
    chunk = rng.randint(write_rows, 2 * write_rows)
    whole = min(progress / 0.3, 1)  # how far the tasks are those of the full recipe
    blocks = (memory_rows / write_rows) ** whole
    first = rng.random() < FIRST_FILL
    if rng.random() < min(0.5, whole):
        updates = 1 + int(2 ** rng.uniform(0, math.log2(blocks)))
        seen = math.ceil(max(blocks, updates))
        return Plan(updates, rng.choice((0, updates - 1)), False, first, chunk, seen)
    alone = rng.random() >= 0.5 * whole
    return Plan(1, 0, alone, first, chunk, math.ceil(blocks))


def make_episode(
    plan: Plan, earlier: list[list[tuple[int, Fact]]], sequences: int, items: int, tokenizer, rng, held_out: bool
) -> Episode:
    """Text for one pool per entry of `earlier`, the `told` of the last episode, and `sequences` sequences that read
    each, of `items` facts asked or told again; the first is of this episode, and asked. `tokenizer` is a
    `tokenizers.Tokenizer`."""
    chunks, rows, told, answers = [], [], [], 0
    for before in earlier:
        story = Story(plan, before, tokenizer, rng, held_out)
        chunks.append(story.chunks)
        told.append(story.told())
        for _ in range(sequences):
            row: list[tuple[int, int, bool]] = []  # token, answer, scored
            for i, fact in enumerate(story.choose(items)):
                if i == 0 or rng.random() < ASKED:
                    row += story.asked(fact, answers)
                    answers += 1
                else:
                    row += story.told_again(fact)
            rows.append(row)
    filler = (tokenizer.token_to_id("<pad>"), -1, False)
    longest = max(map(len, rows))
    padded = [row + [filler] * (longest - len(row)) for row in rows]
    read, answer, scored = (torch.tensor([[part[i] for part in row] for row in padded]) for i in range(3))
    scored[:, 0] = False  # nothing predicts it
    return Episode(torch.tensor(chunks).transpose(0, 1), read, answer, scored, told)


class Story:
    """The updates of one pool, and what is true at their end."""

    def __init__(self, plan: Plan, earlier: list[tuple[int, Fact]], tokenizer, rng: random.Random, held_out: bool):
        self.plan, self.tokenizer, self.rng, self.held_out = plan, tokenizer, rng, held_out
        # Facts of few relations, which only their subjects tell apart.
        self.relations = tuple(rng.sample(facts.ALL, rng.choice(RELATIONS_TOLD)))
        self.truth: dict[tuple[str, str], tuple[int, Fact]] = {}  # by key: the update that said so last, and the fact
        self.chunks = [self._chunk(update) for update in range(plan.updates)]
        # Of updates before this episode: negative numbers.
        self.earlier = [] if plan.first else [(-1 - age, fact) for age, fact in earlier if fact.key not in self.truth]

    def told(self) -> list[tuple[int, Fact]]:
        """All that is true, as `Episode.told`, of the last LONGEST_AGO updates."""
        pairs = [(self.plan.updates - 1 - update, fact) for update, fact in [*self.earlier, *self.truth.values()]]
        return [pair for pair in pairs if pair[0] < LONGEST_AGO]

    def choose(self, count: int) -> list[Fact]:
        """Different facts to read, mostly of the update with gradient; fewer than `count` if fewer were told."""
        pairs = list(self.truth.values())
        self.rng.shuffle(pairs)
        if self.plan.alone:
            pairs = [pair for pair in pairs if pair[0] == self.plan.graded] or pairs
        # A stable sort: each pair of the graded update is moved to the front or left among the others.
        pairs.sort(key=lambda pair: pair[0] != self.plan.graded or self.rng.random() > ABOUT_GRADED)
        chosen = [fact for _, fact in pairs[:count]]
        seen = [fact for update, fact in self.earlier if self.plan.updates - update <= self.plan.blocks]
        if seen and not self.plan.alone:
            others = [self.rng.choice(seen) if self.rng.random() < EARLIER else fact for fact in chosen[1:]]
            chosen = list(dict.fromkeys([*chosen[:1], *others]))
        return chosen

    def asked(self, fact: Fact, number: int) -> list[tuple[int, int, bool]]:
        """Tokens of a question and its answer, as (token, answer, scored)."""
        question, answer = (self.tokenizer.encode(text).ids for text in (fact.question(self.rng), fact.value))
        answer.append(self.tokenizer.token_to_id("</s>"))
        drawn = [(token, -1, self.rng.random() < SCORED_OF_PROMPTS) for token in question]
        return drawn + [(token, number, True) for token in answer]

    def told_again(self, fact: Fact) -> list[tuple[int, int, bool]]:
        """Tokens of a statement that a text goes on with, in any words."""
        ids = self.tokenizer.encode(fact.statement(self.rng)).ids
        return [(token, -1, self.rng.random() < SCORED_OF_TOLD) for token in ids]

    def _chunk(self, update: int) -> list[int]:
        """Exactly plan.chunk tokens: as many facts as there is room for, before them the end of a side text."""
        room, sentences = self.plan.chunk, []
        for _ in range(self.rng.randint(1, MOST_FACTS)):
            fact, sentence = self._sentence()
            ids = self.tokenizer.encode(sentence).ids
            if len(ids) > room:
                break
            room -= len(ids)
            sentences.append(ids)
            self.truth[fact.key] = (update, fact)
        side: list[int] = []
        while len(side) < room:
            side = self.tokenizer.encode(facts.side_text(self.rng)).ids + side
        return side[len(side) - room :] + [token for sentence in sentences for token in sentence]

    def _sentence(self) -> tuple[Fact, str]:
        told = [fact for _, fact in self.truth.values()]
        if told and self.rng.random() < CORRECTED:
            fact = facts.corrected(self.rng.choice(told), self.rng, self.held_out)
            return fact, fact.correction(self.rng) if self.rng.random() < 0.7 else fact.statement(self.rng)
        about = self.rng.choice(told) if told and self.rng.random() < 0.25 else None
        fact = facts.draw_fact(self.rng, self.held_out, about, self.relations)
        while fact.key in self.truth:
            fact = facts.draw_fact(self.rng, self.held_out, None, self.relations)
        return fact, fact.statement(self.rng)
