"""Bad input of every kind, failures and Ctrl-C in the middle: the memory is bit for bit as before, or as after."""

import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from memkernel import Engine, memory_file, ops, reference, tiny
from memkernel.memory import Delta

FLOAT32, IDS = torch.float32, list(range(20))
FACTS = {"step": "-1", "seed": "x", "draw": "any", "initialized": "yes", "layers": "4", "rows": "64", "write_rows": "8"}
RAISING = "{% if messages[0]['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}" + tiny.CHAT_TEMPLATE


def load(folder, **kwargs):
    return Engine.from_pretrained(folder, **{"device": "cpu", "dtype": FLOAT32, "keep_hidden": True} | kwargs)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Engines and files that the table's calls use; `mute` has no tokenizer and an empty memory."""
    root = tmp_path_factory.mktemp("errors")
    torch.manual_seed(0)
    tiny.write_tokenizer(tiny.write_checkpoint(root / "tiny"))
    tiny.write_checkpoint(root / "mute")
    tiny.write_tokenizer(tiny.write_checkpoint(root / "other", seed=1))
    llama = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2)
    LlamaForCausalLM(llama).save_pretrained(root / "llama")
    engines = {name: load(root / name, keep_hidden=name != "llama") for name in ("mute", "other", "llama")}
    engines |= {"engine": load(root / "tiny"), "lean": load(root / "tiny", keep_hidden=False)}
    engines["engine"].tokenizer.chat_template, engines["other"].tokenizer.chat_template = None, RAISING
    for name, file in (("engine", "good"), ("other", "other"), ("lean", "bare")):
        engines[name].update([torch.randint(256, (40,)), IDS])
        engines[name].memory.save(root / f"{file}.memory")
    whole = (root / "good.memory").read_bytes()
    (root / "short.memory").write_bytes(whole[:-100])
    (root / "flipped.memory").write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    tensors, facts = memory_file.load(root / "good.memory")
    tensors = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    altered = {"rank": tensors["rank"].clamp(min=1), "value": tensors["value"].clone(), "key": tensors["key"][:, 1:]}
    altered["value"][1, 5, 0, 0] = torch.nan
    for name, tensor in altered.items():  # files that are whole, with the digest that they should have
        memory_file.save(root / f"{name}.memory", tensors | {name: tensor}, facts)
    for name, text in FACTS.items():
        memory_file.save(root / f"{name}.memory", tensors, facts | {name: text})
    memory_file.save(root / "seedless.memory", tensors, {k: v for k, v in facts.items() if k != "seed"})
    save_file({"x": torch.zeros(1)}, root / "strange.memory")
    return SimpleNamespace(root=root, memory=engines["engine"].memory, **engines)


def delta(rows=16, dtype=FLOAT32, value=0.0, layers=3, heads=2):
    shapes = (layers, rows, heads, 16), (layers, rows, 2, 16), (layers, rows, 64)
    return Delta(*(torch.full(shape, value, dtype=dtype) for shape in shapes))


def dropped(change=None, dtype=torch.int64, count=16):
    ranks = torch.arange(count).repeat(3, 1).to(dtype)
    if change is not None:
        ranks[1, 3] = change
    return ranks


def update(text, **options):
    return lambda w: w.engine.update(text, **options)


def generate(**sampling):
    return lambda w: w.engine.generate(IDS, **sampling)


def read(name):
    return lambda w: w.memory.load(w.root / f"{name}.memory")


def reload(**options):
    return lambda w: load(w.root / "tiny", **options)


START, ROWS, TABLE = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 4, 2, 16), torch.zeros(8, 8)
RANK = torch.arange(6, dtype=torch.int32)[None]
IDS_EXPECTED = "text: expected text, or integer token ids"
# fmt: off
BAD = {  # what is done, what the message must say
    "empty-text": (update(""), "^text: expected text, got ''"),
    "empty-list": (update([]), "^text: expected at least one token, got none"),
    "one-empty-of-several": (update(["fine, this is long enough", ""]), r"^text\[1\]: expected text"),
    "none": (update(None), IDS_EXPECTED),
    "dict": (update({"a": 1}), IDS_EXPECTED),
    "bytes": (update(b"some text of bytes"), IDS_EXPECTED),
    "float-ids": (update([1.0, 2.0]), IDS_EXPECTED),
    "bool-ids": (update([True, False]), IDS_EXPECTED),
    "complex-ids": (update(np.array([1j, 2])), IDS_EXPECTED),
    "array-of-strings": (update(np.array(["a"])), IDS_EXPECTED),
    "three-dimensions": (update(torch.zeros(2, 2, 20, dtype=torch.int64)), "^text.*: expected text, or integer"),
    "nested-lists": (update([[IDS, IDS], [IDS, IDS]]), r"^text\[0\]: expected "),
    "nested-ragged-lists": (update([[IDS, [1, 2]]]), r"^text\[0\]: expected "),
    "nested-texts": (update([["two texts where", "one is expected"]]), r"^text\[0\]: expected "),
    "nested-array": (update([np.zeros((2, 20), int)]), r"^text\[0\]: expected "),
    "negative-id": (update([*IDS, -1]), r"^text: expected token ids in \[0, 260\), got -1"),
    "id-of-vocabulary-size": (lambda w: w.engine.logits([*IDS, 260]), r"^input_ids: expected token ids in \[0, 260\)"),
    "huge-id": (update([*IDS, 1 << 70]), IDS_EXPECTED),
    "half-a-surrogate": (update("some text \ud800 and more"), "^text: "),
    "unequal-logits": (lambda w: w.engine.logits([IDS, IDS[:3]]), "^input_ids: expected sequences of one length"),
    "text-without-tokenizer": (lambda w: w.mute.update("some text"), "^text: text needs a tokenizer"),
    "score-of-nothing": (lambda w: w.engine.score(IDS, []), "completion: expected at least one"),
    "score-of-several": (lambda w: w.engine.score(["a", "b"], "c"), "^prompt"),
    "stream-several": (lambda w: w.engine.stream([IDS, IDS]), "^prompt: expected one prompt to stream, got 2"),
    "stream-without-tokenizer": (lambda w: w.mute.stream(IDS), "^prompt: streaming text needs a tokenizer"),
    "messages-without-role": (lambda w: w.other.chat([{"content": "hi"}]), "^messages: expected a list of"),
    "content-none": (lambda w: w.other.chat([{"role": "user", "content": None}]), "^messages: "),
    "template-refuses": (lambda w: w.other.chat([{"role": "robot", "content": "hi"}]), "^messages: .*no robots"),
    "chat-of-text": (lambda w: w.other.chat("hi"), "^messages: expected a list of"),
    "chat-without-template": (lambda w: w.engine.chat([{"role": "user", "content": "hi"}]), "^messages: .*template"),
    "chunk-tokens-0": (update(IDS, chunk_tokens=0), "^chunk_tokens: expected an integer of at least 16"),
    "chunk-tokens-15": (update(IDS, chunk_tokens=15), "^chunk_tokens: expected"),
    "chunk-tokens-text": (update(IDS, chunk_tokens="a"), "^chunk_tokens: expected"),
    "chunk-tokens-true": (update(IDS, chunk_tokens=True), "^chunk_tokens: expected"),
    "dropped-shape": (update(IDS, dropped=dropped(count=15)), r"^dropped: expected shape \[3, 16\]"),
    "dropped-floats": (update(IDS, dropped=dropped(dtype=FLOAT32)), "^dropped: expected an int64"),
    "dropped-twice": (update(IDS, dropped=dropped(0)), "^dropped: expected distinct ranks"),
    "dropped-128": (update(IDS, dropped=dropped(128)), "^dropped: expected distinct ranks"),
    "dropped-negative": (update(IDS, dropped=dropped(-1)), "^dropped: expected distinct ranks"),
    "dropped-many-chunks": (update(IDS * 60, dropped=dropped()), "^dropped: expected .* one chunk, got 3"),
    "dropped-at-first": (lambda w: w.mute.update(IDS, dropped=dropped()), "^dropped: expected None, the first update"),
    "update-of-llama": (lambda w: w.llama.update(IDS), "^memory: .* is a plain Llama"),
    "memory-of-llama": (lambda w: w.llama.memory, "^memory: .* is a plain Llama"),
    "delta-nan": (lambda w: w.memory.write(delta(value=torch.nan)), "^delta.hidden: expected finite numbers"),
    "delta-infinite": (lambda w: w.memory.write(delta(value=-torch.inf)), "^delta.hidden: expected finite numbers"),
    "delta-dtype": (lambda w: w.memory.write(delta(dtype=torch.float16)), "^delta.hidden: expected .*float32"),
    "delta-layers": (lambda w: w.memory.write(delta(layers=2)), r"^delta.hidden: expected \[3, 16, 64\]"),
    "delta-heads": (lambda w: w.memory.write(delta(heads=4)), r"^delta.key: expected \[3, 16, 2, 16\]"),
    "delta-too-long": (lambda w: w.memory.write(delta(rows=129)), "^delta: expected 1 to 128 rows"),
    "delta-too-short": (lambda w: w.lean.memory.write(delta(15)), "^delta: expected 16 to 128 rows"),
    "set-none": (lambda w: setattr(w.engine, "memory", None), "^memory: expected a Memory of this model, got NoneType"),
    "set-other": (lambda w: setattr(w.engine, "memory", w.other.memory), "^memory: expected a Memory of this model"),
    "set-other-dtype": (lambda w: setattr(w.engine, "memory", reload(dtype="float16")(w).memory), "^memory: .*float16"),
    "load-missing": (read("no"), "no.memory: expected a memory file, found none"),
    "load-folder": (lambda w: w.memory.load(w.root), "expected a memory file, found none"),
    "load-truncated": (read("short"), "short.memory: expected a whole memory file"),
    "load-flipped": (read("flipped"), "flipped.memory: expected contents with digest"),
    "load-nan": (read("value"), "value.memory: value: expected finite numbers"),
    "load-shape": (read("key"), r"key.memory: key: expected \[3, 128, 2, 16\]"),
    "load-rank": (read("rank"), "rank.memory: rank: expected a permutation"),
    "load-without-hidden": (read("bare"), "bare.memory: expected a tensor 'hidden'"),
    "load-without-seed": (read("seedless"), "seedless.memory: seed: expected"),
    "load-other-model": (read("other"), "other.memory: fingerprint: expected"),
    "load-strange": (read("strange"), "strange.memory: format: expected"),
    "save-nowhere": (lambda w: w.memory.save(w.root / "none" / "a"), "^path: expected .* in an existing folder"),
    "save-onto-folder": (lambda w: w.memory.save(w.root), "^path: expected a file name"),
    "save-pretrained-onto-files": (lambda w: w.engine.save_pretrained(w.root), "^folder: expected a new or empty"),
    "save-pretrained-lean": (lambda w: w.lean.save_pretrained(w.root / "new"), "^hidden: .*keep_hidden=True"),
    "no-folder": (lambda w: load(w.root / "nothing here"), "nothing here: expected a checkpoint folder or a hub id"),
    "no-config": (lambda w: load(w.root), "config.json: expected a checkpoint folder"),
    "revision-of-folder": (reload(revision="main"), "^revision: expected None"),
    "device": (reload(device="gpu"), "^device: expected 'auto', 'cpu' or 'cuda', got 'gpu'"),
    "dtype-name": (reload(dtype="float12"), "^dtype: expected 'auto' or one of"),
    "draw": (reload(draw="random"), "^draw: expected one of"),
    "seed": (reload(seed=-1), "^seed: expected an integer"),
    # sampling, through the engine (all values of all parameters: test_sampling.py)
    "unknown-parameter": (generate(temprature=1), "^temprature: not a sampling parameter"),
    "two-names": (generate(max_tokens=3, max_new_tokens=3), "^max_new_tokens: .*got both"),
    "max-tokens": (generate(max_tokens=0), "^max_tokens: expected"),
    "temperature": (generate(temperature=-1), "^temperature: expected"),
    "top-p-0": (generate(top_p=0), "^top_p: expected"),
    "top-p-above-1": (generate(top_p=1.5), "^top_p: expected"),
    "top-k": (generate(top_k=-2), "^top_k: expected"),
    "min-p": (generate(min_p=2), "^min_p: expected"),
    "sampling-seed": (generate(seed=-1), "^seed: expected"),
    "min-above-max": (generate(max_tokens=3, min_tokens=4), r"^min_tokens: expected .*\[0, 3\]"),
    "stop-empty": (generate(stop=""), "^stop: expected non-empty"),
    "stop-without-tokenizer": (lambda w: w.mute.generate(IDS, stop="a"), "^stop: stop strings need a tokenizer"),
    "stop-token": (generate(stop_token_ids=[260]), "^stop_token_ids: expected ids below 260"),
    "rms_norm": (lambda w: ops.rms_norm(ROWS, ROWS[0, 0], 1e-5), r"^weight: expected \[16\]"),
    "add_rms_norm_": (lambda w: ops.add_rms_norm_(ROWS, ROWS[:, 1:], ROWS[0, 0, 0], 1e-5), r"^x: expected \[1, 4,"),
    "swiglu": (lambda w: ops.swiglu(torch.zeros(2, 5)), "^gate_up: expected an even last dimension"),
    "rope_write_": (lambda w: ops.rope_write_(*[ROWS] * 5, TABLE, TABLE, START.long(), 0), r"^start: expected .*int32"),
    "rotate_memory_": (lambda w: ops.rotate_memory_(ROWS, ROWS, RANK, TABLE, TABLE, 1), r"^rank: expected \[1, 4\]"),
    "memory_attention": (lambda w: ops.memory_attention(ROWS, ROWS.half(), *[ROWS] * 3, START), "^memory_key: "),
    "draw_ranks": (lambda w: ops.draw_ranks(START.repeat(2).long(), 1, 4, 5, False), "^count: expected 0 to 4"),
    "draw_ranks-layers": (lambda w: ops.draw_ranks(START.repeat(2).long(), -1, 4, 2, False), "^layers: expected"),
    "memory_write_": (lambda w: ops.memory_write_([ROWS], RANK[:, :4], [], RANK[:, :2]), "^rows: expected one tensor"),
} | {f"load-{name}": (read(name), f"{name}.memory: {name}: expected") for name in FACTS}
# fmt: on


def everything(memory):
    """All that a memory is, whatever its attributes are called."""
    parts = {name: part for name, part in vars(memory).items() if name not in ("config", "ops")}
    return {name: part.clone() if isinstance(part, torch.Tensor) else part for name, part in parts.items()}


def assert_same(got, want):
    different = {k for k, v in want.items() if not (torch.equal(got[k], v) if torch.is_tensor(v) else got[k] == v)}
    assert got.keys() == want.keys() and not different


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(world, name):
    act, message = BAD[name]
    memories = (world.memory, world.mute.memory, world.lean.memory, world.other.memory)
    before = [everything(memory) for memory in memories]
    with pytest.raises(ValueError, match=message):
        act(world)
    assert world.engine.memory is world.memory
    for memory, want in zip(memories, before, strict=True):
        assert_same(everything(memory), want)


def test_good_file_still_loads(world):
    """The refusals above are not of everything."""
    world.memory.load(world.root / "good.memory")
    assert torch.equal(load_file(world.root / "good.memory")["rank"], world.memory.rank)


TEXT, CHUNK = torch.arange(48), {"chunk_tokens": 16}
POINTS = [("rms_norm", 0, 1), ("swiglu", 0, 3), ("rms_norm", 1, 8), ("rope_write_", 1, 2), ("memory_attention", 2, 3)]
POINTS += [("add_rms_norm_", 2, 1), ("draw_ranks", 1, 1), ("memory_write_", 2, 1)]


@pytest.fixture
def twins(world):
    """An engine whose ops can be replaced, and one that goes undisturbed."""
    mine = SimpleNamespace(
        **{name: getattr(reference, name) for name, op in vars(ops).items() if hasattr(op, "_schema")}
    )
    return load(world.root / "tiny", ops=mine), load(world.root / "tiny", ops=reference), mine


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name, chunk, nth", POINTS)
def test_a_chunk_that_fails_is_not_taken_in_and_those_before_it_stay(twins, name, chunk, nth, error):
    engine, twin, mine = twins
    working, calls = getattr(mine, name), []

    def failing(*args):
        calls.append(engine.memory.step)
        if calls.count(chunk) == nth:
            raise error("no more")
        return working(*args)

    setattr(mine, name, failing)
    with pytest.raises(error, match="no more"):
        engine.update(TEXT, **CHUNK)
    if chunk:
        twin.update(TEXT[: 16 * chunk], **CHUNK)
    assert_same(everything(engine.memory), everything(twin.memory))
    setattr(mine, name, working)
    for whole in (engine, twin):
        whole.update(TEXT[16 * chunk :], **CHUNK)
    assert_same(everything(engine.memory), everything(twin.memory))


@pytest.fixture
def handler():
    """Python's own handling of Ctrl-C, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("chunk, owner, name", [(0, torch, "index_select"), (1, None, "memory_write_")])
def test_ctrl_c_during_a_write_waits_until_it_is_whole(twins, handler, monkeypatch, chunk, owner, name):
    engine, twin, mine = twins
    for _ in range(chunk):
        engine.update(TEXT[:16]), twin.update(TEXT[:16])
    with monkeypatch.context() as patch:
        working = getattr(owner or mine, name)
        interrupted = lambda *args, **kw: (os.kill(os.getpid(), signal.SIGINT), working(*args, **kw))[1]  # noqa: E731
        patch.setattr(owner or mine, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.update(TEXT, **CHUNK)
    twin.update(TEXT[:16])
    assert_same(everything(engine.memory), everything(twin.memory))
    assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads_may_update(twins):
    thread = threading.Thread(target=twins[0].update, args=(TEXT,))
    thread.start()
    thread.join()
    twins[1].update(TEXT)
    assert_same(everything(twins[0].memory), everything(twins[1].memory))
