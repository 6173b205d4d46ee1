"""Model editing: an update states a new fact; is it taken over (efficacy), also in other words (generalisation), and is
what it does not concern left alone (specificity)?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from memkernel.evaluation.cases import named, read_json

PARTS = ("efficacy", "generalisation", "specificity")


@dataclass(frozen=True)
class Check:
    """`target` should follow `prompt`; with `rival`, it should be likelier than that."""

    prompt: str
    target: str
    rival: str | None = None


@dataclass(frozen=True)
class Edit:
    text: str  # what the update says
    efficacy: tuple[Check, ...]
    generalisation: tuple[Check, ...]
    specificity: tuple[Check, ...]


def zsre(path: str | Path, limit: int | None = None) -> list[Edit]:
    """A ZsRE file in MEND's layout: src, rephrase, alt (the new answer), loc and loc_ans (a question left alone)."""
    return named(path, lambda raw: [_zsre(entry) for entry in raw[:limit]], read_json(path))


def _zsre(entry: dict) -> Edit:
    def ask(question: str, answer: str) -> tuple[Check, ...]:
        return (Check(f"Question: {question.removeprefix('nq question: ').rstrip('?')}? Answer:", f" {answer}"),)

    told = f"Question: {entry['src'].rstrip('?')}? Answer: {entry['alt']}"
    asked = ask(entry["src"], entry["alt"]), ask(entry["rephrase"], entry["alt"])
    return Edit(told, *asked, ask(entry["loc"], entry["loc_ans"]))


def counterfact(path: str | Path, limit: int | None = None) -> list[Edit]:
    """A CounterFact file: requested_rewrite, paraphrase_prompts, neighborhood_prompts."""
    return named(path, lambda raw: list(islice(_counterfact(raw), limit)), read_json(path))


def _counterfact(raw: list[dict]) -> Iterator[Edit]:
    for entry in raw:
        rewrite = entry["requested_rewrite"]
        new, true = (f" {rewrite[name]['str']}" for name in ("target_new", "target_true"))
        prompt = rewrite["prompt"].format(rewrite["subject"])
        paraphrases = tuple(Check(text, new, true) for text in entry["paraphrase_prompts"])
        neighbours = tuple(Check(text, true, new) for text in entry["neighborhood_prompts"])
        yield Edit(f"{prompt}{new}.", (Check(prompt, new, true),), paraphrases, neighbours)


FILES = {"zsre": zsre, "counterfact": counterfact}


def edits(engine, edits: list[Edit], progress: Callable[[int], None] = lambda done: None) -> dict:
    """Make every edit in a copy of the engine's memory of its own and check it, beside the same checks before it.

    A check without a rival scores the share of the target's tokens that are likeliest given those before (as ZsRE is
    scored), one with a rival whether the target's mean log-probability is the greater (as CounterFact is).

    Returns {"before": {...}, "after": {...}}, each with `efficacy`, `generalisation`, `specificity` (means over checks)
    and `score`, their harmonic mean.
    """
    base, scores = engine.memory, {when: {part: [] for part in PARTS} for when in ("before", "after")}
    try:
        for i, edit in enumerate(edits):
            engine.memory = base.fork()
            for when in scores:
                if when == "after":
                    engine.update(edit.text, chunk_tokens=None)
                for part in PARTS:
                    scores[when][part] += [_check(engine, check) for check in getattr(edit, part)]
            progress(i + 1)
    finally:
        engine.memory = base
    return {"edits": len(edits)} | {when: _summary(parts) for when, parts in scores.items()}


def _check(engine, check: Check) -> float:
    likelihood, share = follow(engine, check.prompt, check.target)
    return share if check.rival is None else float(likelihood > follow(engine, check.prompt, check.rival)[0])


def follow(engine, prompt: str, target: str) -> tuple[float, float]:
    """Mean log-probability of the target's tokens after the prompt, and the share of them that are likeliest."""
    before, after = (engine.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, target))
    logits = engine.logits([*before, *after])[0, len(before) - 1 : -1]
    scores, likeliest = logits.log_softmax(-1), logits.argmax(-1).tolist()
    mean = sum(scores[i, token].item() for i, token in enumerate(after)) / len(after)
    return mean, sum(a == b for a, b in zip(after, likeliest, strict=True)) / len(after)


def _summary(parts: dict[str, list[float]]) -> dict:
    means = {part: sum(values) / len(values) for part, values in parts.items() if values}
    positive = len(means) == len(PARTS) and all(means.values())
    return means | {"score": len(PARTS) / sum(1 / mean for mean in means.values()) if positive else 0.0}
