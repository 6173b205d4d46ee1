"""What `make demo` shows: the shipped model is told a page of facts, answers questions about them, forgets them, more
slowly than it loses their rows, while it is told others, and keeps its memory in a file that a second process reads."""

import json
import random
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

from memkernel.cli import read_texts
from memkernel.engine import Engine
from memkernel.evaluation import cases
from memkernel.request import Completion
from memkernel.training import facts
from memkernel.training.facts import Fact

MODEL = Path(__file__).parent / "small"
PAGE = MODEL / "page.txt"
LATER = (0, 1, 2, 4, 8, 12, 16, 24, 32)  # further updates after which the page's facts are asked again
COPIES = 8  # of the memory that forget, each by its own draws
ANSWER_TOKENS = 16
BAR = 40  # columns of a recall of 1


def run(files: list[str], as_json: bool = False, device: str = "auto", dtype: str = "auto") -> int:
    """Run the demo on the facts in `files`, by default the shipped page, and print it, or one JSON object.

    A sentence in one of the shapes of `training.facts` is told and asked about, any other is told.

    Returns 0, or 1 if a second process that loads the saved memory answers otherwise. Raises ValueError for files that
    cannot be read or state no fact.
    """
    text = "\n".join(read_texts(files or [str(PAGE)]))
    told = cases.stated(text)
    if not told:
        raise ValueError(f"files: expected a fact, such as 'Mila lives in Dresden.', got none in {', '.join(files)}")
    say = (lambda *_: None) if as_json else print
    torch.set_num_threads(1)  # the tensors are tiny: a second thread would only be waited for
    engine = Engine.from_pretrained(MODEL, device=device, dtype=dtype)
    config, rng = engine.config, random.Random(0)
    say(f"memkernel demo: {config.num_layers} layers of width {config.hidden_size}, {config.memory_rows} memory rows a")
    say(f"layer, {config.write_rows} of them rewritten by an update; trained by `make train-tiny`")
    engine.memory.reset()
    # A memory in use is full of other things.
    known = frozenset(fact.subject for fact in told)
    others = cases.unrelated(2 * config.write_rows, cases.counter(engine), known=known)
    for _ in range(2 * config.memory_rows // config.write_rows):
        engine.update(next(others), chunk_tokens=None)
    questions = [fact.question(rng) for fact in told]
    report: dict = {"model": str(MODEL), "facts": len(told)}
    before = [answer.text.strip() for answer in engine.generate(questions, max_tokens=ANSWER_TOKENS)]
    report["chunks"] = _tell(engine, text, rng, say)
    answers = engine.generate(questions, max_tokens=ANSWER_TOKENS)
    report["answers"] = _compare(told, questions, before, answers, say)
    with tempfile.TemporaryDirectory(prefix="memkernel-demo-") as folder:
        report["reload"] = _reload(engine, Path(folder) / "memory", questions[0], answers[0], say)
    report["fading"] = _fade(engine, told, questions, others, say)
    if as_json:
        print(json.dumps(report))
    return 0 if report["reload"]["equal"] else 1


def _tell(engine: Engine, text: str, rng: random.Random, say: Callable) -> list[str]:
    """Update from the sentences of a text, as many at a time as the model was trained on."""
    chunks = cases.updates_of(text, 2 * engine.config.write_rows, cases.counter(engine), rng)
    say(f"\nTold, in {len(chunks)} updates:")
    for chunk in chunks:
        engine.update(chunk, chunk_tokens=None)
        say(textwrap.fill(chunk, 100, initial_indent="  ", subsequent_indent="    "))
    return chunks


def _compare(told: list[Fact], questions: list[str], before: list[str], answers: list, say: Callable) -> list[dict]:
    """Questions with their answers before and after the page was told."""
    rows = []
    say(f"\n{'Asked':44}{'before':>14}{'after':>14}")
    for fact, question, old, answer in zip(told, questions, before, answers, strict=True):
        new = answer.text.strip()
        rows.append({"question": question, "expected": fact.value, "before": old, "after": new})
        say(f"  {question.removesuffix(facts.ANSWER):42}{old:>14}{new:>14}{'' if new == fact.value else '   WRONG'}")
    right = sum(row["after"] == row["expected"] for row in rows)
    say(f"  {right} of {len(rows)} right, {sum(row['before'] == row['expected'] for row in rows)} before")
    return rows


def _fade(engine: Engine, told: list[Fact], questions: list[str], others, say: Callable) -> list[dict]:
    """Recall of the page after further updates, mean of COPIES of the memory, beside the survival of its rows."""
    memory, config = engine.memory, engine.config
    right = dict.fromkeys(LATER, 0)
    for copy in range(COPIES):
        engine.memory = memory.fork()
        engine.memory.reseed(copy)
        for t in range(LATER[-1] + 1):
            if t:
                engine.update(next(others), chunk_tokens=None)
            if t in right:
                answers = engine.generate(questions, max_tokens=ANSWER_TOKENS)
                right[t] += sum(a.text.strip() == fact.value for a, fact in zip(answers, told, strict=True))
    engine.memory = memory
    survival, rows = 1 - config.write_rows / config.memory_rows, []
    say(f"\nRecall after t further updates (#), and recall(0) (1 - {config.write_rows}/{config.memory_rows})^t (|)")
    for t, count in right.items():
        recall = count / (COPIES * len(told))
        theory = right[0] / (COPIES * len(told)) * survival**t
        rows.append({"t": t, "recall": recall, "theory": theory})
        bar = list(("#" * round(recall * BAR)).ljust(BAR + 1))
        bar[round(theory * BAR)] = "|"
        say(f"  {t:3d}  {recall:4.2f}  {''.join(bar).rstrip()}")
    return rows


def _reload(engine: Engine, path: Path, question: str, answer: Completion, say: Callable) -> dict:
    """Save the memory, have a second process load it and answer the same question, and compare the answers."""
    engine.memory.save(path)
    command = [sys.executable, "-m", "memkernel", "ask", str(MODEL), question, "--memory", str(path), "--json"]
    command += ["--max-tokens", str(ANSWER_TOKENS), "--device", str(engine.memory.key.device)]
    command += ["--dtype", str(engine.memory.key.dtype).removeprefix("torch.")]
    second = subprocess.run(command, capture_output=True, text=True)
    if second.returncode:
        raise RuntimeError(f"the second process failed with exit code {second.returncode}:\n{second.stderr}")
    again = json.loads(second.stdout)
    report = {"bytes": path.stat().st_size, "answer": again["text"], "equal": again["token_ids"] == answer.token_ids}
    say(f"\nSaved, {report['bytes']:,} bytes; a second process loads it and answers the first question:")
    say(f"  {again['text'].strip()}, {'equal' if report['equal'] else 'NOT EQUAL'} token by token")
    return report
