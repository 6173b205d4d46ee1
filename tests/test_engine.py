"""The engine from outside: prompts, batches, streams, scores, updates, forks, round trips."""

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import memkernel
from memkernel import ops, reference, tiny
from memkernel.engine import split_chunks
from tests.compare import relative_error

PLAIN = {k: v for k, v in tiny.MEMORYLLM.items() if not k.startswith(("num_blocks", "num_tokens", "add_", "drop_"))}
TEXT = "David likes apples, and bananas; où est-il?"
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "hi"}]
ENDINGS = [{}, {"stop": list("aeiourstln, ")}, SAMPLED | {"stop": list("aeiours")}]


def load(folder, dtype="float32", **options):
    return memkernel.Engine.from_pretrained(folder, device="cpu", dtype=dtype, **{"keep_hidden": True} | options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A memory as shipped, one that is empty, and a plain Llama: the same weights, a tokenizer that writes a BOS."""
    root = tmp_path_factory.mktemp("checkpoints")
    shapes = {"shipped": (tiny.MEMORYLLM, True), "empty": (tiny.MEMORYLLM, False), "plain": (PLAIN, False)}
    for name, (config, initialized) in shapes.items():
        tiny.write_tokenizer(tiny.write_checkpoint(root / name, config, initialized=initialized))
        tokenizer = AutoTokenizer.from_pretrained(root / name)
        bos = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 257)])
        tokenizer.backend_tokenizer.post_processor = bos
        tokenizer.save_pretrained(root / name)
    return SimpleNamespace(**{name: root / name for name in shapes})


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load(folder) for name, folder in vars(folders).items()} | {"wide": load(folders.shipped, "float64")}


@pytest.fixture
def get(loaded):
    """An engine of its own over weights that are loaded once."""

    def get(name="shipped"):
        engine = copy.copy(loaded[name])
        engine._memory = engine._memory and engine._memory.fork()
        return engine

    return get


def state(memory):
    """Everything that a memory is, whatever attributes it has."""
    fields = {name: value for name, value in vars(memory).items() if name not in ("config", "ops")}
    return {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in fields.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        same = torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value
        assert same, name


# fmt: off
IDS = [5, 200, 31, 7]
ONE = {
    "tuple": tuple(IDS), "tensor": torch.tensor(IDS), "tensor-1xT": torch.tensor([IDS]), "array-1xT": np.array([IDS]),
} | {kind: np.array(IDS, dtype=kind) for kind in ("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")}
MANY = {
    "tensor-BxT": torch.tensor([IDS, IDS]), "array-BxT": np.array([IDS, IDS]), "lists": [IDS, IDS],
    "mixed": [torch.tensor(IDS), tuple(IDS), np.array([IDS])], "one-in-a-list": [IDS],
}
# fmt: on


@pytest.mark.parametrize("name", [*ONE, *MANY])
def test_one_prompt_gives_a_completion_and_several_give_a_list(get, name):
    engine, given = get(), (ONE | MANY)[name]
    want, got = engine.generate(IDS, max_tokens=3), engine.generate(given, max_tokens=3)
    got = got if name in MANY else [got]
    assert [a.token_ids for a in got] == [want.token_ids] * (len(given) if name in MANY else 1)
    assert relative_error(engine.logits(given)[-1:], engine.logits(IDS)) < 1e-6


def test_text_is_encoded_without_bos_for_a_memory_and_with_it_for_a_plain_llama(get):
    for name, bos in (("shipped", []), ("empty", []), ("plain", [257])):
        engine = get(name)
        ids = engine.tokenizer(TEXT, add_special_tokens=False).input_ids
        assert torch.equal(engine.logits(TEXT), engine.logits(bos + ids))
        turn = engine.tokenizer("user: hi\nassistant: ", add_special_tokens=False).input_ids
        assert engine.chat(MESSAGES, max_tokens=3) == engine.generate(bos + turn, max_tokens=3)
        assert [p.tolist() for p in engine._prompts("", [MESSAGES, TEXT])[0]] == [bos + turn, bos + ids]


@pytest.mark.parametrize("with_memory", [True, False], ids=["memory", "no-memory"])
@pytest.mark.parametrize("params", ENDINGS, ids=["greedy", "stop", "sampled-and-stop"])
def test_a_batch_gives_what_each_prompt_gives_alone(get, with_memory, params):
    engine, ended = get("wide"), set()  # float64: rounding differs with the batch, and must not decide a token
    if not with_memory:
        engine.memory.reset()
    for seed in range(3):
        prompts = [torch.randint(256, (length,)) for length in (1, 9, 30, 2)]
        sampling = params | {"seed": seed, "max_tokens": 24, "repetition_penalty": 1.3}
        for together, prompt in zip(engine.generate(prompts, **sampling), prompts, strict=True):
            alone = engine.generate(prompt, **sampling)
            assert (together.token_ids, together.text) == (alone.token_ids, alone.text)
            assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-6)
            ended.add(alone.finish_reason)
    assert ended == {"stop", "length"} or not params


@pytest.mark.parametrize("params", [{}, SAMPLED | {"seed": 3}, SAMPLED | {"seed": 4, "stop": ["a", "\n"]}], ids=str)
@pytest.mark.parametrize("name", ["shipped", "plain"])
def test_stream_is_generate_in_pieces(get, name, params):
    engine, pieces = get(name), []
    want = engine.generate(TEXT, max_tokens=40, **params)
    for piece in engine.stream(TEXT, max_tokens=40, **params):
        pieces.append(piece)
        engine.generate([IDS, TEXT], max_tokens=2)  # other readers do not disturb it
    assert "".join(pieces) == want.text and "" not in pieces and len(pieces) > 3


CHANGES = {
    "update": lambda engine, path: engine.update("a" * 16),
    "switch": lambda engine, path: setattr(engine, "memory", engine.memory.fork()),
    "reset": lambda engine, path: engine.memory.reset(),
    "load-of-the-same-step": lambda engine, path: engine.memory.load(path / "other"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_stream_refuses_changes_of_the_memory(get, tmp_path, name):
    engine, other = get(), get()
    engine.update("a" * 16)
    other.update("b" * 16)
    other.memory.save(tmp_path / "other")
    pieces = engine.stream(TEXT, max_tokens=60, ignore_eos=True)
    next(pieces)
    CHANGES[name](engine, tmp_path)
    with pytest.raises(RuntimeError, match="^memory: "):
        list(pieces)


@pytest.mark.parametrize("name", ["shipped", "empty", "plain"])
def test_logits_scores_and_decoding_agree(get, name):
    engine = get(name)
    prompts = torch.randint(256, (3, 21))
    logits = engine.logits(prompts)
    assert logits.shape == (3, 21, 260) and logits.dtype == torch.float32 and logits.isfinite().all()
    before, after = prompts[0, :6].tolist(), prompts[0, 6:].tolist()
    want = engine.logits(prompts[0])[0].log_softmax(-1)[torch.arange(5, 20), prompts[0, 6:]]
    assert engine.score(before, after) == pytest.approx(want.tolist(), abs=1e-6)
    answer = engine.generate(before, max_tokens=40, **SAMPLED, seed=1)  # step by step, against all at once
    assert answer.logprobs == pytest.approx(engine.score(before, answer.token_ids), abs=1e-5)


def test_score_of_texts_is_that_of_their_tokens(get):
    """A BOS token stands before the prompt of a plain Llama, and never between prompt and completion."""
    for name, bos in (("shipped", []), ("plain", [257])):
        engine = get(name)
        prompt, completion = (engine.tokenizer(text, add_special_tokens=False).input_ids for text in (TEXT, " No."))
        assert engine.score(TEXT, " No.") == engine.score(bos + prompt, completion)


def test_reading_leaves_the_memory_as_it_is(get):
    engine = get()
    engine.update(TEXT)
    engine.logits(TEXT)  # brings the rotated keys up to date
    before = state(engine.memory)
    engine.logits([TEXT, TEXT])
    engine.score(TEXT, "a")
    engine.generate([TEXT, "b"], max_tokens=5, seed=0, temperature=1.0)
    list(engine.stream(TEXT, max_tokens=5))
    engine.chat(MESSAGES, max_tokens=5)
    assert_same(state(engine.memory), before)


def test_an_empty_memory_reads_as_a_plain_llama(get):
    empty, plain, shipped, ids = get("empty"), get("plain"), get("shipped"), torch.randint(256, (2, 30))
    assert torch.equal(empty.logits(ids), plain.logits(ids))
    assert relative_error(shipped.logits(ids), plain.logits(ids)) > 0.01
    shipped.memory.reset()
    assert torch.equal(shipped.logits(ids), plain.logits(ids))


def test_both_namespaces_of_ops_give_the_same(folders):
    engines = [load(folders.shipped, torch.float64, ops=namespace) for namespace in (ops, reference)]
    for engine in engines:
        engine.update(TEXT)
    assert relative_error(*(engine.logits(TEXT) for engine in engines)) < 1e-6


def test_endings_of_all_sources(tmp_path):
    tiny.write_tokenizer(tiny.write_checkpoint(tmp_path, tiny.MEMORYLLM | {"vocab_size": 262, "eos_token_id": [1]}))
    first = load(tmp_path).generate(IDS, max_tokens=3, ignore_eos=True).token_ids
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [first[2], 999]}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|eot_id|>")
    engine = load(tmp_path)
    assert set(engine.eos_token_ids) == {1, 258, first[2]}  # not <unk>, which unknown tokens are turned into
    answer = engine.generate(IDS, max_tokens=9)
    assert (answer.token_ids, answer.finish_reason) == (first, "stop")
    engine.tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    engine.tokenizer.save_pretrained(tmp_path)
    assert set(load(tmp_path).eos_token_ids) == {1, 258, first[2], 260}


@pytest.mark.parametrize("chunk_tokens", [16, 17, 31, 100, 512])
def test_split_chunks(chunk_tokens):
    everything = torch.arange(2100)
    for n in range(1, 2101):
        chunks = split_chunks(everything[:n], chunk_tokens)
        sizes = [len(chunk) for chunk in chunks]
        assert torch.equal(torch.cat(chunks), everything[:n]) and 0 < min(sizes) <= max(sizes) <= chunk_tokens
        if any(16 * pieces <= n <= chunk_tokens * pieces for pieces in range(1, n + 1)):
            assert min(sizes) >= 16, n
        if n % chunk_tokens == 0:
            assert sizes == [chunk_tokens] * (n // chunk_tokens)


def test_update_of_several_texts_is_one_after_the_other(get):
    engine, apart, short = get(), get(), "b" * 20
    long = torch.randint(256, (600,))
    done = engine.update([long, short])
    assert (done.chunks, done.tokens, done.version) == (3, 620, 3) and done.seconds > 0
    assert [apart.update(part).version for part in (long[:512], long[512:], short)] == [1, 2, 3]
    assert_same(state(engine.memory), state(apart.memory))
    assert [engine.update(long, chunk_tokens=n).chunks for n in (100, 512, None)] == [6, 2, 1]


def test_a_short_text_warns_and_is_written(get):
    with pytest.warns(UserWarning, match="^text of 15 tokens: fewer than 16 ") as caught:
        assert get().update(["a" * 16, "b" * 15]).version == 2
    assert [Path(warning.filename).name for warning in caught] == ["test_engine.py"]  # the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get().update("a" * 16)


def test_a_fork_is_independent_and_engines_switch(get):
    engine = get()
    engine.update(TEXT)
    mine, before = engine.memory, engine.logits(TEXT)
    other = engine.memory = mine.fork()
    assert torch.equal(engine.logits(TEXT), before)
    engine.update("something else, long enough to count")
    after = engine.logits(TEXT)
    assert relative_error(after, before) > 1e-3
    for memory, want, text in ((mine, before, "a third thing that is not the second"), (other, after, TEXT)):
        engine.memory = memory
        assert torch.equal(engine.logits(TEXT), want)
        engine.update(text)


@pytest.mark.parametrize("name", ["shipped", "empty"])
def test_save_pretrained_and_back(get, tmp_path, name):
    engine = get(name)
    engine.save_pretrained(tmp_path / "as-is")
    assert torch.equal(load(tmp_path / "as-is").logits(TEXT), engine.logits(TEXT))
    engine.update([TEXT, "and another one, to be sure of it"])
    (tmp_path / "after").mkdir()  # an empty folder will do
    engine.save_pretrained(tmp_path / "after")
    assert {p.name for p in (tmp_path / "after").iterdir()} == {p.name for p in engine.folder.iterdir()}
    back = load(tmp_path / "after")
    assert torch.equal(back.memory.hidden(), engine.memory.hidden())
    assert torch.equal(back.memory.recent, engine.memory.recent) and back.memory.initialized
    assert relative_error(back.logits(TEXT), engine.logits(TEXT)) < 1e-6  # keys are projected anew, in other blocks
    engine.memory.save(tmp_path / "memory")
    back.memory.load(tmp_path / "memory")  # the pool that a checkpoint ships with is no part of the model
    assert torch.equal(back.logits(TEXT), engine.logits(TEXT))
