"""How long facts are remembered: recall right after they are told and after t unrelated updates, beside controls."""

import math
from collections.abc import Callable, Iterator

from memkernel.evaluation.cases import Case, Question

LATER = (0, 1, 2, 4, 8, 16)


def exact(text: str, question: Question) -> bool:
    """The completion is the answer and nothing else."""
    return text.strip() in question.answers


def contains(text: str, question: Question) -> bool:
    """The completion has the answer in it: how the published evaluation counts."""
    return any(answer.strip() in text for answer in question.answers)


def retention(
    engine,
    cases: list[Case],
    unrelated: Iterator[str],
    later: tuple[int, ...] = LATER,
    match: Callable[[str, Question], bool] = exact,
    max_tokens: int = 10,
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """Tell each case to a copy of the engine's memory, ask its questions, and again after t unrelated updates.

    Every copy draws what it drops with a seed of its own. The engine's memory is as it was afterwards.

    Returns a JSON object: `curve`, for every t the recall over all questions, its standard error, recall(0) times the
    survival (1 - W/M)^t, and the recall of each kind of case; `empty_memory` and `foreign_memory`, the recall of the
    same questions of an empty memory, and of one that was told the case before instead; `newer_wins`, the share of
    corrected facts whose newer value is given among those where either is.
    """
    if not cases:
        raise ValueError("cases: expected at least one, got none")
    later = tuple(sorted({0, *later}))
    base, config = engine.memory, engine.config
    right: dict[int, list[tuple[str, bool]]] = {t: [] for t in later}  # of each question: its case's kind, and whether
    empty, foreign, newer, older = [], [], 0, 0
    try:
        for i, case in enumerate(cases):
            engine.memory = base.fork()
            engine.memory.reset()
            empty += _ask(engine, case, match, max_tokens)
            engine.memory = _told(engine, base, cases[i - 1], seed=i)
            foreign += _ask(engine, case, match, max_tokens) if len(cases) > 1 else []
            engine.memory = _told(engine, base, case, seed=i)
            for t in range(later[-1] + 1):
                if t:
                    engine.update(next(unrelated), chunk_tokens=None)
                if t in right:
                    texts = _answers(engine, case, max_tokens)
                    pairs = list(zip(texts, case.questions, strict=True))
                    right[t] += [(case.kind, match(text, question)) for text, question in pairs]
                    corrected = [(text, q) for text, q in pairs if q.older is not None and t == 0]
                    newer += sum(match(text, q) for text, q in corrected)
                    older += sum(text.strip() == q.older for text, q in corrected)
            progress(i + 1)
    finally:
        engine.memory = base
    facts = {"cases": len(cases), "questions": len(right[0]), "write_rows": config.write_rows}
    facts |= {"memory_rows": config.memory_rows, "curve": _curve(right, 1 - config.write_rows / config.memory_rows)}
    facts |= {"empty_memory": _mean(empty), "foreign_memory": _mean(foreign)}
    return facts | {"newer_wins": newer / (newer + older) if newer + older else None}


def _told(engine, base, case: Case, seed: int):
    """A copy of `base` that was told the case; it becomes the engine's memory on the way."""
    engine.memory = base.fork()
    engine.memory.reseed(seed)
    for text in case.texts:
        engine.update(text, chunk_tokens=None)
    return engine.memory


def _answers(engine, case: Case, max_tokens: int) -> list[str]:
    prompts = [question.prompt for question in case.questions]
    return [completion.text for completion in engine.generate(prompts, max_tokens=max_tokens)]


def _ask(engine, case: Case, match: Callable, max_tokens: int) -> list[bool]:
    texts = _answers(engine, case, max_tokens)
    return [match(text, question) for text, question in zip(texts, case.questions, strict=True)]


def _curve(right: dict[int, list[tuple[str, bool]]], survival: float) -> list[dict]:
    first, curve = _mean([hit for _, hit in right[0]]), []
    for t, results in right.items():
        recall = _mean([hit for _, hit in results])
        kinds = {kind: _mean([hit for k, hit in results if k == kind]) for kind, _ in results}
        error = math.sqrt(recall * (1 - recall) / len(results))
        theory = first * survival**t
        curve.append({"t": t, "recall": recall, "standard_error": error, "theory": theory, "kinds": kinds})
    return curve


def _mean(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
