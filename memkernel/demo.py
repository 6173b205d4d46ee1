"""What `make demo` shows: updates, forgetting beside its theory, answers, and a memory that outlives its process."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from memkernel import tiny
from memkernel.cli import read_texts
from memkernel.engine import CHUNK_TOKENS, MIN_TOKENS, Engine, split_chunks
from memkernel.request import Completion

NOTE = """This model is tiny and was made just now with random weights: its answers are gibberish.
The mathematics and the bookkeeping are real: every number below was computed in this run."""
GEOMETRY = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_blocks": 16, "num_tokens": 32}
UPDATES = 60  # at least so many, if the text is long enough for chunks of MIN_TOKENS
QUESTION = "What is kept in the memory?"
ANSWER_TOKENS = 32
LAGS = (1, 2, 4, 8, 12, 16, 24, 32, 48)  # the t of the printed table


def run(files: list[str], as_json: bool = False, device: str = "auto", dtype: str = "auto") -> int:
    """Run the demo on the text of `files`, by default memkernel's README, and print it, or one JSON object.

    Returns 0, or 1 if a second process that loads the saved memory answers otherwise. Raises ValueError for files that
    cannot be read.
    """
    source, text = (", ".join(files), "\n\n".join(read_texts(files))) if files else _own_text()
    say = (lambda *_: None) if as_json else print
    say(f"memkernel demo\n\n{NOTE}\n")
    torch.set_num_threads(1)  # the tensors are tiny: a second thread would only be waited for
    with tempfile.TemporaryDirectory(prefix="memkernel-demo-") as folder:
        tiny.write_checkpoint(folder, tiny.MEMORYLLM | GEOMETRY, seed=8)
        tiny.write_tokenizer(folder)
        engine = Engine.from_pretrained(folder, device=device, dtype=dtype)
        facts: dict = {"note": NOTE, "model": _describe(engine, say)}
        before = engine.generate(QUESTION, max_tokens=ANSWER_TOKENS).text
        facts["updates"], facts["survivors"] = _update(engine, source, text, say)
        after = engine.generate(QUESTION, max_tokens=ANSWER_TOKENS)
        facts["answers"] = {"question": QUESTION, "before": before, "after": after.text}
        say(f"Answers    to {QUESTION!r}, a dot for what is not ASCII")
        say(f"           before  {_printable(before)}\n           after   {_printable(after.text)}\n")
        facts["reload"] = _reload(engine, after, say)
    if as_json:
        print(json.dumps(facts))
    return 0 if facts["reload"]["equal"] else 1


def _own_text() -> tuple[str, str]:
    try:
        if text := metadata.metadata("memkernel").get_payload():
            return "the README of memkernel", text
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        pass
    return "the source of memkernel.engine", Path(sys.modules[Engine.__module__].__file__).read_text()


def _printable(text: str) -> str:
    return "".join(letter if " " <= letter <= "~" else "." for letter in text)


def _describe(engine: Engine, say: Callable) -> dict:
    config, memory = engine.config, engine.memory
    dtype, device = str(memory.key.dtype).removeprefix("torch."), str(memory.key.device)
    facts = {"layers": config.num_layers, "hidden_size": config.hidden_size, "heads": config.num_heads}
    facts |= {"kv_heads": config.num_kv_heads, "head_size": config.head_size, "dtype": dtype, "device": device}
    facts |= {"memory_rows": config.memory_rows, "write_rows": config.write_rows}
    facts["memory_bytes"] = memory.key.nbytes + memory.value.nbytes
    say("Model      {layers} layers of width {hidden_size}, {dtype} on {device}".format(**facts))
    say("           {heads} query heads and {kv_heads} key/value heads of {head_size}".format(**facts))
    say("Memory     {memory_rows} rows a layer, {write_rows} rewritten by an update".format(**facts))
    say("           {memory_bytes:,} bytes of keys and values\n".format(**facts))
    return facts


def _update(engine: Engine, source: str, text: str, say: Callable) -> tuple[dict, list[dict]]:
    """Update chunk by chunk; returns facts of the updates and of how the rows that each wrote survived."""
    ids = torch.tensor(engine.tokenizer(text, add_special_tokens=False).input_ids)
    used = ids[: UPDATES * CHUNK_TOKENS]  # so that a long file is not a long demo
    chunks = split_chunks(used, max(MIN_TOKENS, len(used) // UPDATES))
    memory, config, seconds = engine.memory, engine.config, 0.0
    born = torch.zeros(memory.rank.shape, dtype=torch.int64)  # by slot: the update that wrote the row there
    alive = torch.zeros(len(chunks), len(chunks), dtype=torch.int64)  # [update, birth], over all layers
    for i, chunk in enumerate(chunks):
        seconds += engine.update(chunk, chunk_tokens=None).seconds
        if i > 0:  # the first fills the whole pool with copies of its rows
            born[memory.rank.cpu() >= config.memory_rows - config.write_rows] = i
        alive[i] = torch.bincount(born.flatten(), minlength=len(chunks))
    facts = {"source": source, "tokens_given": len(ids), "tokens": len(used), "chunks": len(chunks)}
    facts |= {"seconds": seconds, "tokens_per_second": len(used) / seconds, "version": memory.step}
    say("Updates    {chunks} chunks, {tokens:,} of {tokens_given:,} tokens of {source}".format(**facts))
    say("           in {seconds:.2f} s: {tokens_per_second:,.0f} tokens/s\n".format(**facts))
    return facts, _survivors(alive, config.num_layers, config.write_rows, config.memory_rows, say)


def _survivors(alive: torch.Tensor, layers: int, write_rows: int, memory_rows: int, say: Callable) -> list[dict]:
    """The share of an update's rows alive after t more, averaged over all layers and all updates but the first."""
    table = []
    say(f"Survivors  of the {write_rows} rows a layer that an update wrote, after t further updates, and the theory")
    say(f"             t  blocks   alive  (1 - {write_rows}/{memory_rows})^t   difference in standard errors")
    for t in LAGS:
        births = range(1, len(alive) - t)
        if not births:
            break
        rows = len(births) * layers * write_rows
        share, theory = sum(int(alive[i + t, i]) for i in births) / rows, (1 - write_rows / memory_rows) ** t
        # Of independent rows; rows of a layer compete for its slots, which makes the true error a little smaller.
        error = math.sqrt(theory * (1 - theory) / rows)
        table.append({"t": t, "rows": rows, "alive": share, "theory": theory, "standard_error": error})
        blocks = len(births) * layers
        say(f"           {t:3d} {blocks:7d} {share:7.4f} {theory:17.4f} {(share - theory) / error:+12.1f}")
    say("" if table else "           the text is too short for this table\n")
    return table


def _reload(engine: Engine, answer: Completion, say: Callable) -> dict:
    """Save the memory, have a second process load it and answer the same question, and compare the answers."""
    path = engine.folder / "memory"
    engine.memory.save(path)
    command = [sys.executable, "-m", "memkernel", "ask", str(engine.folder), QUESTION, "--memory", str(path), "--json"]
    command += ["--max-tokens", str(ANSWER_TOKENS), "--device", str(engine.memory.key.device)]
    command += ["--dtype", str(engine.memory.key.dtype).removeprefix("torch.")]
    second = subprocess.run(command, capture_output=True, text=True)
    if second.returncode:
        raise RuntimeError(f"the second process failed with exit code {second.returncode}:\n{second.stderr}")
    again = json.loads(second.stdout)
    facts = {"bytes": path.stat().st_size, "token_ids": answer.token_ids, "second_process": again["token_ids"]}
    facts["equal"] = again["token_ids"] == answer.token_ids
    pairs = zip(answer.logprobs, again["logprobs"], strict=False)  # the tokens that both gave
    facts["largest_logprob_difference"] = max(abs(one - other) for one, other in pairs)
    say(f"Reload     memory saved, {facts['bytes']:,} bytes; a second process loads it and answers")
    say(f"           {len(again['token_ids'])} tokens, {'equal to' if facts['equal'] else 'NOT EQUAL TO'} those above;")
    say(f"           their log-probabilities differ by at most {facts['largest_logprob_difference']:.1e}")
    return facts
