"""Updates without end: does the memory still take in, keep finite, and leave the language alone after a million?"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from memkernel.evaluation.cases import Case
from memkernel.evaluation.retention import exact
from memkernel.memory_file import write_whole

SAVE_EVERY = 1000  # updates


def integrity(
    engine,
    updates: int,
    text_at: Callable[[int], Iterator[str]],
    cases: list[Case],
    held_out: list[str],
    folder: str | Path,
    settings: dict,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Update `updates` times from an empty memory; probe after 1, 10, 100, ... and at the end.

    Args:
        text_at: the texts from a number on, each a function of its number, so that a run can go on where it ended.
        cases: told, each to a copy of the memory, and asked at every probe.
        held_out: texts whose perplexity is probed; not told.
        folder: keeps `integrity.json` and `integrity.memory`; a run that finds them there goes on with them.
        settings: what texts, cases and the engine depend on, as JSON: a run of others is not gone on with.
    Returns the JSON object: `settings`, and `probes`, each with the updates before it, recall right after telling,
        perplexity, for every layer the root mean square and the largest magnitude of keys and values, and whether all
        are finite.
    Raises ValueError if `folder` holds a run of other settings, or of more updates.
    """
    if updates < 1:
        raise ValueError(f"updates: expected at least 1, got {updates}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report, saved = folder / "integrity.json", folder / "integrity.memory"
    probes: list[dict] = []
    if report.exists() and saved.exists():
        before = json.loads(report.read_text())
        if before.get("settings") != settings:
            raise ValueError(f"{report}: settings: expected {settings}, got {before.get('settings')}")
        engine.memory.load(saved)
        if engine.memory.step > updates:
            raise ValueError(f"updates: expected at least the {engine.memory.step} that were done, got {updates}")
        probes = [p for p in before["probes"] if p["updates"] <= engine.memory.step]
        say(f"going on after {engine.memory.step:,} updates")
    else:
        engine.memory.reset()
    done, texts = engine.memory.step, text_at(engine.memory.step)
    while done < updates:
        engine.update(next(texts), chunk_tokens=None)
        done += 1
        if done == updates or math.log10(done).is_integer():
            probes = [p for p in probes if p["updates"] != done] + [{"updates": done} | probe(engine, cases, held_out)]
            say(" ".join(f"{name} {value:,.6g}" for name, value in probes[-1].items() if not isinstance(value, list)))
        if done == updates or done % SAVE_EVERY == 0:
            # The report first: probes that are ahead of the memory are made again, those behind would be missing.
            write_json(report, {"updates": done, "settings": settings, "probes": probes})
            engine.memory.save(saved)
    return {"updates": done, "settings": settings, "probes": probes}


def write_json(path: Path, facts: dict) -> None:
    """Write a report, whole or not at all."""
    text = json.dumps(facts, indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))


def probe(engine, cases: list[Case], held_out: list[str]) -> dict:
    """What is measured of one memory, which stays as it is."""
    memory, hits, scores = engine.memory, [], []
    pools = [memory.key.float().flatten(1), memory.value.float().flatten(1)]
    facts: dict = {"finite": all(bool(pool.isfinite().all()) for pool in pools)}
    try:
        for case in cases:
            engine.memory = memory.fork()
            for text in case.texts:
                engine.update(text, chunk_tokens=None)
            prompts = [question.prompt for question in case.questions]
            for completion, question in zip(engine.generate(prompts, max_tokens=10), case.questions, strict=True):
                hits.append(exact(completion.text, question))
    finally:
        engine.memory = memory
    for text in held_out:
        ids = engine.tokenizer(text, add_special_tokens=False).input_ids
        scores += engine.score(ids[:1], ids[1:])
    facts |= {"recall": sum(hits) / len(hits), "perplexity": math.exp(-sum(scores) / len(scores))}
    for name, pool in zip(("key", "value"), pools, strict=True):
        facts |= {f"{name}_rms": pool.square().mean(1).sqrt().tolist(), f"{name}_largest": pool.abs().amax(1).tolist()}
    return facts
