"""End to end: a document of 10,000 tokens into the memory, then 20 questions about it, of 32 tokens with answers of 4.

The questions go to memkernel as one batch; the published data flow, which repeats the pool for each sequence, takes
them one after the other."""

import pytest
import torch
from torch import Tensor

from benchmarks.lab import Case, Lab
from benchmarks.shapes import Work
from benchmarks.timing import Contender
from memkernel.engine import CHUNK_TOKENS, Engine

QUESTION_TOKENS, ANSWER_TOKENS = 32, 4
CHECKED_QUESTIONS = 2  # whose answers' first logits are compared, after the first chunk with equal drops


def document_case(lab: Lab) -> Case:
    tokens, asked = (600, 2) if lab.shape == "tiny" else (10_000, 20)
    document, questions = lab.ids(tokens), lab.ids(asked, QUESTION_TOKENS, seed=1)
    chunks = document.split(CHUNK_TOKENS)
    dropped, checked_questions = lab.dropped(1)[0], questions[:CHECKED_QUESTIONS]

    def engine_contender(shared: Engine) -> Contender:
        engine = Engine(shared.model, shared.memory.fork(), shared.folder)

        def call() -> None:
            engine.update(document)
            engine.generate(questions, max_tokens=ANSWER_TOKENS, ignore_eos=True)

        def output() -> list[Tensor]:
            checked = Engine(shared.model, shared.memory.fork(), shared.folder)
            checked.update(chunks[0], dropped=dropped)
            return [checked.logits(checked_questions)[:, -1]]

        return Contender(call, output)

    def published() -> Contender:
        rival = lab.published()

        def call() -> None:
            for chunk in chunks:
                rival.update(chunk)
            for question in questions:
                logits, cache = rival.prefill(question[None])
                for _ in range(ANSWER_TOKENS - 1):
                    logits, cache = rival.decode(logits[:, -1:].argmax(-1), cache)

        def output() -> list[Tensor]:
            checked = lab.published()
            checked.update(chunks[0], dropped)
            return [torch.cat([checked.prefill(question[None])[0][:, -1] for question in checked_questions])]

        return Contender(call, output)

    work = Work()
    for chunk in chunks:
        work = work + lab.least.inject(len(chunk)) + lab.least.write(lab.config.memory_rows)
    prompt = lab.least.read(QUESTION_TOKENS, sequences=asked)
    steps = [lab.least.read(1, past=1 + QUESTION_TOKENS + i, sequences=asked) for i in range(ANSWER_TOKENS - 1)]
    return Case(
        builders={
            "memkernel": lambda: engine_contender(lab.engine),
            "published": published,
        },
        truth=("published",),
        bound=lab.model_bound,
        work=sum([prompt, *steps], start=work),
        once=True,
    )


@pytest.mark.parametrize("contender", ["memkernel", "published"])
def bench_document(race, contender):
    race("document and questions", {}, contender, document_case)
