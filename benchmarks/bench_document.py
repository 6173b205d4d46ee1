"""End to end: a document of 10,000 tokens into the memory, then 20 questions about it."""

import pytest
import torch
from torch import Tensor

from benchmarks.lab import MODEL_BOUND, Case, Lab
from benchmarks.shapes import Work
from benchmarks.timing import Contender
from memkernel.engine import CHUNK_TOKENS, Engine

QUESTION_TOKENS, ANSWER_TOKENS = 32, 8
CHECKED_CHUNKS = 2  # chunks of the document after which the answers' first logits are compared, with equal drops


def document_case(lab: Lab) -> Case:
    tokens, asked = (600, 2) if lab.shape == "tiny" else (10_000, 20)
    document, questions = lab.ids(tokens), lab.ids(asked, QUESTION_TOKENS, seed=1)
    chunks = document.split(CHUNK_TOKENS)
    dropped = lab.dropped(CHECKED_CHUNKS)

    def engine_contender(shared: Engine, batched: bool) -> Contender:
        engine = Engine(shared.model, shared.memory.fork(), shared.folder)

        def call() -> None:
            engine.update(document)
            for prompt in [questions] if batched else questions:
                engine.generate(prompt, max_tokens=ANSWER_TOKENS)

        def output() -> list[Tensor]:
            checked = Engine(shared.model, shared.memory.fork(), shared.folder)
            for chunk, ranks in zip(chunks, dropped, strict=False):
                checked.update(chunk, dropped=ranks)
            if batched:
                return [checked.logits(questions)[:, -1]]
            return [torch.stack([checked.logits(question)[0, -1] for question in questions])]

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

        return Contender(call, lambda: truth)

    def published_answers() -> list[Tensor]:
        checked = lab.published()
        for chunk, ranks in zip(chunks, dropped, strict=False):
            checked.update(chunk, ranks)
        return [torch.cat([checked.prefill(question[None])[0][:, -1] for question in questions])]

    truth = published_answers()
    work = Work()
    for chunk in chunks:
        work = work + lab.least.inject(len(chunk)) + lab.least.write(lab.config.memory_rows)
    prompt = lab.least.read(QUESTION_TOKENS, sequences=asked)
    steps = [lab.least.read(1, past=1 + QUESTION_TOKENS + i, sequences=asked) for i in range(ANSWER_TOKENS - 1)]
    return Case(
        builders={
            "memkernel": lambda: engine_contender(lab.engine, batched=True),
            "memkernel, one by one": lambda: engine_contender(lab.engine, batched=False),
            "published": published,
        },
        truth=truth,
        bound=MODEL_BOUND[lab.dtype],
        work=sum([prompt, *steps], start=work),
        min_rounds=1,
        budget=0.0,
    )


@pytest.mark.parametrize("contender", ["memkernel", "memkernel, one by one", "published"])
def bench_document(race, contender):
    race("document and questions", {}, contender, document_case)
