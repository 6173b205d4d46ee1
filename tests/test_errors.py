"""Bad input of every kind: each gives a ValueError that names the argument, and the memory is bit for bit as before."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from memkernel import Engine, memory_file, ops, tiny
from memkernel.memory import Delta

FLOAT32, IDS = torch.float32, list(range(20))
MESSAGES = [{"role": "user", "content": "hi"}]


def load(folder, **kwargs):
    return Engine.from_pretrained(folder, **{"device": "cpu", "dtype": FLOAT32, "keep_hidden": True} | kwargs)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Engines and files that the table's calls use; `engine` has taken in two updates."""
    root = tmp_path_factory.mktemp("errors")
    torch.manual_seed(0)
    tiny.write_tokenizer(tiny.write_checkpoint(root / "tiny"))
    tiny.write_checkpoint(root / "mute")  # no tokenizer
    tiny.write_tokenizer(tiny.write_checkpoint(root / "other", seed=1))
    tiny.write_checkpoint(root / "narrow", tiny.MEMORYLLM | {"num_blocks": 4})
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2)
    ).save_pretrained(root / "llama")
    names = ("tiny", "mute", "other", "narrow", "llama")
    engines = {name: load(root / name, keep_hidden=name != "llama") for name in names}
    engine = engines["tiny"]
    engine.tokenizer.chat_template = None
    for length in (40, 60):
        engine.update(torch.randint(256, (length,)))
    engines["narrow"].update(IDS)
    engines["other"].update(IDS)
    paths = {name: root / f"{name}.memory" for name in ("good", "other", "narrow", "short", "flipped", "nan", "bare")}
    for name, memory in (
        ("good", engine.memory),
        ("other", engines["other"].memory),
        ("narrow", engines["narrow"].memory),
    ):
        memory.save(paths[name])
    whole = paths["good"].read_bytes()
    paths["short"].write_bytes(whole[:-100])
    paths["flipped"].write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    tensors, metadata = memory_file.load(paths["good"])
    tensors["value"][1, 5, 0, 0] = torch.nan
    memory_file.save(paths["nan"], tensors, metadata)
    tensors, metadata = memory_file.load(paths["good"])
    del tensors["hidden"]
    memory_file.save(paths["bare"], tensors, metadata)
    save_file({"x": torch.zeros(1)}, root / "strange.memory")
    return SimpleNamespace(root=root, engine=engine, memory=engine.memory, path=paths, **engines)


def delta(rows=16, dtype=FLOAT32, value=0.0, layers=3):
    shapes = (layers, rows, 2, 16), (layers, rows, 2, 16), (layers, rows, 64)
    return Delta(*(torch.full(shape, value, dtype=dtype) for shape in shapes))


def dropped(change=None, dtype=torch.int64, count=16):
    ranks = torch.stack([torch.randperm(128)[:count] for _ in range(3)]).to(dtype)
    if change is not None:
        ranks[1, 3] = change(ranks[1])
    return ranks


START = torch.zeros(1, dtype=torch.int32)
ROWS = torch.zeros(1, 4, 2, 16)
TABLE = torch.zeros(8, 8)
RANK = torch.arange(6, dtype=torch.int32)[None]

BAD = {  # what is done, what the message must say
    # text and token ids
    "empty-text": (lambda w: w.engine.update(""), "text: expected text, got ''"),
    "empty-list": (lambda w: w.engine.update([]), "text: expected at least one token, got none"),
    "empty-tensor": (lambda w: w.engine.generate(torch.empty(0, dtype=torch.int64)), "prompt: expected at least one"),
    "one-empty-of-several": (lambda w: w.engine.update(["fine, this is long enough", ""]), r"text\[1\]: expected text"),
    "none": (lambda w: w.engine.update(None), "text: expected text, or integer token ids"),
    "dict": (lambda w: w.engine.generate({"a": 1}), "prompt: expected text, or integer token ids"),
    "float-ids": (lambda w: w.engine.update([1.0, 2.0]), r"text: expected .*integer token ids"),
    "bool-ids": (lambda w: w.engine.update([True, False]), "text: expected .*integer token ids"),
    "negative-id": (lambda w: w.engine.update([*IDS, -1]), r"text: expected token ids in \[0, 260\), got -1"),
    "id-of-vocabulary-size": (lambda w: w.engine.logits([*IDS, 260]), r"input_ids: expected token ids in \[0, 260\)"),
    "three-dimensions": (lambda w: w.engine.logits(torch.zeros(2, 2, 2, dtype=torch.int64)), "input_ids: expected"),
    "mixed-list": (lambda w: w.engine.update([1, "a"]), "text: expected text, or integer"),
    "array-of-strings": (lambda w: w.engine.update(np.array(["a"])), "text: expected text, or integer"),
    "unequal-logits": (lambda w: w.engine.logits([IDS, IDS[:3]]), r"input_ids: expected sequences of one length"),
    "text-without-tokenizer": (lambda w: w.mute.update("some text"), "text: text needs a tokenizer"),
    "score-of-nothing": (lambda w: w.engine.score(IDS, []), "completion: expected at least one"),
    "stream-several": (lambda w: w.engine.stream([IDS, IDS]), "prompt: expected one prompt to stream, got 2"),
    "stream-without-tokenizer": (lambda w: w.mute.stream(IDS), "prompt: streaming text needs a tokenizer"),
    "messages-without-role": (lambda w: w.engine.chat([{"content": "hi"}]), "messages: expected a list of"),
    "chat-of-text": (lambda w: w.engine.chat("hi"), "messages: expected a list of"),
    "chat-without-template": (
        lambda w: w.engine.chat(MESSAGES),
        "messages: they need a tokenizer with a chat template",
    ),
    # updates
    "chunk-tokens-0": (
        lambda w: w.engine.update(IDS, chunk_tokens=0),
        "chunk_tokens: expected an integer of at least 16",
    ),
    "chunk-tokens-15": (lambda w: w.engine.update(IDS, chunk_tokens=15), "chunk_tokens: expected"),
    "chunk-tokens-text": (lambda w: w.engine.update(IDS, chunk_tokens="64"), "chunk_tokens: expected"),
    "chunk-tokens-true": (lambda w: w.engine.update(IDS, chunk_tokens=True), "chunk_tokens: expected"),
    "dropped-shape": (lambda w: w.engine.update(IDS, dropped=dropped(count=15)), r"dropped: expected shape \[3, 16\]"),
    "dropped-floats": (lambda w: w.engine.update(IDS, dropped=dropped(dtype=FLOAT32)), "dropped: expected an int64"),
    "dropped-list": (
        lambda w: w.engine.update(IDS, dropped=[[1] * 16] * 3),
        "dropped: expected an int64 or int32 tensor",
    ),
    "dropped-twice": (
        lambda w: w.engine.update(IDS, dropped=dropped(lambda r: r[0])),
        "dropped: expected distinct ranks",
    ),
    "dropped-128": (lambda w: w.engine.update(IDS, dropped=dropped(lambda r: 128)), "dropped: expected distinct ranks"),
    "dropped-negative": (
        lambda w: w.engine.update(IDS, dropped=dropped(lambda r: -1)),
        "dropped: expected distinct ranks",
    ),
    "dropped-many-chunks": (
        lambda w: w.engine.update(IDS * 60, dropped=dropped()),
        "dropped: expected text of one chunk, got 3",
    ),
    "dropped-at-first": (lambda w: w.mute.update(IDS, dropped=dropped()), "dropped: expected None, the first update"),
    "update-of-llama": (lambda w: w.llama.update(IDS), "memory: .* is a plain Llama"),
    "memory-of-llama": (lambda w: w.llama.memory, "memory: .* is a plain Llama"),
    "delta-nan": (lambda w: w.memory.write(delta(value=torch.nan)), "delta.hidden: expected finite numbers"),
    "delta-infinite": (lambda w: w.memory.write(delta(value=-torch.inf)), "delta.hidden: expected finite numbers"),
    "delta-dtype": (lambda w: w.memory.write(delta(dtype=torch.float16)), "delta.hidden: expected .*float32"),
    "delta-layers": (lambda w: w.memory.write(delta(layers=2)), r"delta.hidden: expected \[3, 16, 64\]"),
    "delta-too-long": (lambda w: w.memory.write(delta(rows=129)), "delta: expected 1 to 128 rows"),
    # memories and files
    "set-none": (lambda w: setattr(w.engine, "memory", None), "memory: expected a Memory of this model, got NoneType"),
    "set-other": (lambda w: setattr(w.engine, "memory", w.other.memory), "memory: expected a Memory of this model"),
    "set-other-dtype": (
        lambda w: setattr(w.engine, "memory", load(w.root / "tiny", dtype=torch.bfloat16).memory),
        "memory: expected torch.float32 on cpu, got torch.bfloat16",
    ),
    "load-missing": (lambda w: w.memory.load(w.root / "no.memory"), "no.memory: expected a memory file, found none"),
    "load-folder": (lambda w: w.memory.load(w.root), "expected a memory file, found none"),
    "load-truncated": (lambda w: w.memory.load(w.path["short"]), "short.memory: expected a whole memory file"),
    "load-flipped": (lambda w: w.memory.load(w.path["flipped"]), "flipped.memory: expected contents with digest"),
    "load-nan": (lambda w: w.memory.load(w.path["nan"]), "nan.memory: value: expected finite numbers"),
    "load-without-hidden": (lambda w: w.memory.load(w.path["bare"]), "bare.memory: expected a tensor 'hidden'"),
    "load-other-model": (lambda w: w.memory.load(w.path["other"]), "other.memory: fingerprint: expected"),
    "load-other-geometry": (lambda w: w.memory.load(w.path["narrow"]), "narrow.memory: fingerprint: expected"),
    "load-strange": (lambda w: w.memory.load(w.root / "strange.memory"), "strange.memory: format: expected"),
    "load-text": (lambda w: w.memory.load(__file__), "test_errors.py: expected a whole memory file"),
    "save-nowhere": (
        lambda w: w.memory.save(w.root / "none" / "a"),
        "path: expected a file name in an existing folder",
    ),
    "save-onto-folder": (lambda w: w.memory.save(w.root), "path: expected a file name"),
    "save-pretrained-onto-files": (
        lambda w: w.engine.save_pretrained(w.root),
        "folder: expected a new or empty folder",
    ),
    "hidden-not-kept": (
        lambda w: load(w.root / "tiny", keep_hidden=False).memory.hidden(),
        "hidden: .*keep_hidden=True",
    ),
    # loading
    "no-folder": (lambda w: load(w.root / "nothing here"), "nothing here: expected a checkpoint folder or a hub id"),
    "no-config": (lambda w: load(w.root), "config.json: expected a checkpoint folder"),
    "revision-of-folder": (lambda w: load(w.root / "tiny", revision="main"), "revision: expected None"),
    "device": (lambda w: load(w.root / "tiny", device="gpu"), "device: expected 'auto', 'cpu' or 'cuda', got 'gpu'"),
    "device-meta": (lambda w: load(w.root / "tiny", device="meta"), "device: expected 'cpu' or an available 'cuda'"),
    "dtype-name": (lambda w: load(w.root / "tiny", dtype="float12"), "dtype: expected 'auto' or one of"),
    "dtype-integer": (lambda w: load(w.root / "tiny", dtype=torch.int8), "dtype: expected 'auto' or one of"),
    "draw": (lambda w: load(w.root / "tiny", draw="random"), "draw: expected one of"),
    "seed": (lambda w: load(w.root / "tiny", seed=-1), "seed: expected an integer"),
    # sampling, through the engine (all values of all parameters: test_sampling.py)
    "unknown-parameter": (lambda w: w.engine.generate(IDS, temprature=1), "temprature: not a sampling parameter"),
    "two-names": (lambda w: w.engine.generate(IDS, max_tokens=3, max_new_tokens=3), "max_new_tokens: .*got both"),
    "temperature": (lambda w: w.engine.generate(IDS, temperature=-1), "temperature: expected"),
    "min-above-max": (lambda w: w.engine.stream(IDS, max_tokens=3, min_tokens=4), r"min_tokens: expected .*\[0, 3\]"),
    "stop-without-tokenizer": (lambda w: w.mute.generate(IDS, stop="a"), "stop: stop strings need a tokenizer"),
    "stop-token": (lambda w: w.engine.generate(IDS, stop_token_ids=[260]), "stop_token_ids: expected ids below 260"),
    # ops
    "rms_norm": (lambda w: ops.rms_norm(torch.zeros(2, 4), torch.zeros(5), 1e-5), r"weight: expected \[4\]"),
    "add_rms_norm_": (
        lambda w: ops.add_rms_norm_(ROWS, ROWS[:, 1:], ROWS[0, 0, 0], 1e-5),
        r"x: expected \[1, 4, 2, 16\]",
    ),
    "swiglu": (lambda w: ops.swiglu(torch.zeros(2, 5)), "gate_up: expected an even last dimension"),
    "rope_write_": (
        lambda w: ops.rope_write_(ROWS, ROWS, ROWS, ROWS, ROWS, TABLE, TABLE, START.long(), 0),
        r"start: expected \[1\] torch.int32",
    ),
    "rotate_memory_": (lambda w: ops.rotate_memory_(ROWS, ROWS, RANK, TABLE, TABLE, 1), r"rank: expected \[1, 4\]"),
    "memory_attention-dtype": (
        lambda w: ops.memory_attention(ROWS, ROWS.half(), ROWS, ROWS, ROWS, START),
        "memory_key: expected .*float32",
    ),
    "memory_attention-pools": (
        lambda w: ops.memory_attention(ROWS, ROWS.repeat(2, 1, 1, 1), ROWS, ROWS, ROWS, START),
        "query: expected a batch divisible by 2 pools",
    ),
    "draw_ranks": (
        lambda w: ops.draw_ranks(torch.zeros(2, dtype=torch.int64), 1, 4, 5, False),
        "count: expected 0 to 4",
    ),
    "memory_write_": (lambda w: ops.memory_write_([ROWS], RANK[:, :4], [], RANK[:, :2]), "rows: expected one tensor"),
}


def everything(memory):
    state = {name: tensor.clone() for name, tensor in memory._state().items()}
    return state, (memory.step, memory.seed, memory.initialized, memory.draw)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(world, name):
    act, message = BAD[name]
    before = [everything(memory) for memory in (world.memory, world.mute.memory)]
    with pytest.raises(ValueError, match=message):
        act(world)
    assert world.engine.memory is world.memory
    for (old, facts), memory in zip(before, (world.memory, world.mute.memory), strict=True):
        new, now = everything(memory)
        assert now == facts
        assert all(torch.equal(new[key], old[key]) for key in old)


def test_the_table_has_at_least_forty_kinds():
    assert len(BAD) >= 40


def test_good_file_still_loads(world):
    """The refusals above are not of everything."""
    world.memory.load(world.path["good"])
    assert torch.equal(load_file(world.path["good"])["rank"], world.memory.rank)
