"""Answering prompts in steps that are the same work each time: equal to the plain loop, padded, late, without a sync.

`fixed` engines do on the CPU all that a CUDA device does but the capture: fixed shapes, buckets, one step ahead.
"""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import memkernel
from memkernel import Engine, reference, tiny
from memkernel.decoding import IDLE_DECODERS, Decoder
from memkernel.graphs import Graph, Graphs
from memkernel.memory import Delta, Memory
from memkernel.sampling import SamplingParams, uniform
from memkernel.updating import KEPT_LENGTHS

PROMPTS = [list(range(1, 1 + n)) for n in (9, 1, 30)]
SAMPLED = {"temperature": 1.2, "min_p": 0.01, "top_k": 40, "top_p": 0.95, "seed": 7}
SAMPLING = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 3},
    "cut": SAMPLED,
    "all": SAMPLED
    | {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": -0.3, "logprobs": 3, "min_tokens": 6}
    | {"stop_token_ids": list(range(0, 256, 9))},
    "ends": {"stop_token_ids": list(range(0, 256, 5))},
    "reports": {"logprobs": 5, "repetition_penalty": 1.2},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Weights in float64: rounding must not decide a token."""
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("decoding"), initialized=True)
    tiny.write_tokenizer(folder)
    return Engine.from_pretrained(folder, device="cpu", dtype="float64", keep_hidden=True)


@pytest.fixture
def make(loaded):
    """An engine of its own over weights that are loaded once."""

    def make(fixed=True, ops=None):
        model, memory = loaded.model, loaded.memory.fork()
        if ops is not None:
            model = copy.copy(model)
            model.ops = memory.ops = ops
        engine = Engine(model, memory, loaded.folder)
        engine._graphs.static = fixed
        return engine

    return make


def chosen_by_hand(logits, prompt, output, params, barred):
    """The next token after `output`: penalties, min_tokens, then temperature, min_p, top_k, top_p, one at a time."""
    logits = logits.clone()
    for token in {*prompt, *output}:
        logits[token] *= params.repetition_penalty ** (-1 if logits[token] > 0 else 1)
    for token in set(output):
        logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    if len(output) < params.min_tokens:
        logits[barred] = -torch.inf
    if params.temperature == 0:
        return int(logits.argmax())
    p = (logits.double() / params.temperature).softmax(-1)
    p[p < params.min_p * p.max()] = 0
    order = p.argsort(descending=True, stable=True)
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    total, above = p.sum(), 0.0
    for token in order.tolist() if params.top_p < 1 else []:
        above, mine = above + p[token], p[token]
        if above - mine >= params.top_p * total:
            p[token] = 0
    numbers = uniform(torch.tensor([params.seed or 0]), torch.tensor([len(output)]), len(p))[0]
    return int((p / -numbers.log()).argmax())


def answer_by_hand(engine, prompt, sampling):
    """(tokens, log-probabilities, the likeliest, reason) of the loop that reads everything anew for each token."""
    params, output, logprobs, tops = SamplingParams.from_kwargs(**sampling), [], [], []
    while True:
        logits = engine.logits([*prompt, *output])[0, -1]
        barred = [*params.stop_token_ids, *engine.eos_token_ids]
        token = chosen_by_hand(logits, prompt, output, params, barred)
        likely = logits.log_softmax(-1)
        output.append(token), logprobs.append(likely[token].item())
        tops.append({int(t): likely[t].item() for t in likely.argsort(descending=True)[: params.logprobs]})
        if token in barred and len(output) >= params.min_tokens:
            return output, logprobs, tops, "stop"
        if len(output) == params.max_tokens:
            return output, logprobs, tops, "length"


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "growing"])
@pytest.mark.parametrize("name", SAMPLING)
def test_generation_is_the_plain_loop(make, name, fixed):
    engine, sampling = make(fixed), SAMPLING[name] | {"max_tokens": 24}
    reasons = set()
    for prompts in (PROMPTS, PROMPTS[2:]):  # three in a bucket of four, and one
        for prompt, got in zip(prompts, engine.generate(prompts, **sampling), strict=True):
            tokens, logprobs, tops, reason = answer_by_hand(engine, prompt, sampling)
            assert (got.token_ids, got.finish_reason) == (tokens, reason)
            assert got.logprobs == pytest.approx(logprobs, abs=1e-5)
            if sampling.get("logprobs"):
                assert [list(top) for top in got.top_logprobs] == [list(top) for top in tops]
                for mine, theirs in zip(got.top_logprobs, tops, strict=True):
                    assert mine == pytest.approx(theirs, abs=1e-5)
            reasons.add(reason)
    assert reasons == ({"stop"} if name == "ends" else {"length"} if name != "all" else reasons)


@pytest.mark.parametrize("with_memory", [True, False], ids=["memory", "no-memory"])
def test_dummies_change_nothing(make, with_memory):
    """Three sequences in a bucket of four: whatever the fourth's rows and tokens are, and bit for bit."""
    engine = make()
    if not with_memory:
        engine.memory.reset()
    want = engine.generate(PROMPTS, max_tokens=12, **SAMPLED)
    ((_, decoder),) = next(iter(engine._decoders.idle.values()))
    assert len(decoder.sampler.tokens) == 4 and decoder.cache.start.tolist()[3] == int(with_memory) + 11
    begin = decoder.begin

    def disturbed(*args):
        begin(*args)
        decoder.cache.key[:, 3], decoder.cache.value[:, 3] = 1e30, -1e30
        decoder.sampler.tokens[3] = 200

    decoder.begin = disturbed
    assert engine.generate(PROMPTS, max_tokens=12, **SAMPLED) == want
    assert decoder.cache.key[0, 3, 100].max() == 1e30  # it was this decoder


def test_decoders_are_used_again_and_cleared(make, monkeypatch):
    made = []
    init = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *args: (made.append(args), init(self, *args))[1])
    engine, short = make(ops=reference), [prompt[:3] for prompt in PROMPTS]
    want = [engine.generate(prompts, max_tokens=20) for prompts in (PROMPTS, short)]
    assert engine.generate(PROMPTS, max_tokens=20) == want[0]
    engine.generate(PROMPTS[0], max_tokens=3), engine.generate(PROMPTS[1], max_tokens=5)
    assert len(made) == 2
    value = engine.memory.value.clone()
    engine.memory.value[1, 3] = torch.nan
    with pytest.raises(ValueError, match="^logits: expected numbers, got NaN"):
        engine.generate(PROMPTS, max_tokens=20)
    engine.memory.value.copy_(value)  # rows of NaN, which the short prompts do not write, would reach the reference
    assert engine.generate(short, max_tokens=20) == want[1] and len(made) == 2
    assert engine.generate(PROMPTS, max_tokens=20) == want[0]
    for length in range(IDLE_DECODERS + 3):
        engine.generate(PROMPTS[0], max_tokens=2, logprobs=length)
    assert sum(map(len, engine._decoders.idle.values())) == IDLE_DECODERS


def test_idle_decoders_give_way_where_memory_runs_out(make, monkeypatch):
    engine, asked = make(), []

    def scarce(*args):
        asked.append(len(engine._decoders.idle))
        if engine._decoders.idle or len(asked) > 3:
            raise torch.OutOfMemoryError("none left")
        return Decoder(*args)

    monkeypatch.setattr("memkernel.decoding.Decoder", scarce)
    engine.generate([1, 2], max_tokens=2)
    want = engine.generate([1, 2], max_tokens=2, logprobs=1)
    assert asked == [0, 1, 0]
    assert engine.generate([1, 2], max_tokens=2, logprobs=1) == want
    engine._decoders.idle.clear()
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([1, 2], max_tokens=2)


def test_a_decoder_does_not_outlive_its_memory(make):
    engine = make()
    first = engine.memory
    engine.generate(PROMPTS, max_tokens=3)
    engine.update(list(range(20)))
    engine.memory = first.fork()
    engine.generate(PROMPTS, max_tokens=3)
    engine.update(list(range(20)))
    decoders = [weakref.ref(decoder) for idle in engine._decoders.idle.values() for _, decoder in idle]
    assert len(decoders) == 2 and len(engine._updater.of) == 2
    gone = weakref.ref(first)
    del first
    assert gone() is None  # at once: nothing but the caller kept it
    gc.collect()
    assert [decoder() is None for decoder in decoders] == [True, False] and len(engine._updater.of) == 1


@pytest.mark.parametrize("sampling", [{}, SAMPLED | {"stop": list("aeiou")}], ids=["greedy", "drawn"])
def test_streams_run_side_by_side(make, sampling):
    engine, plain = make(), make(False)
    texts = ["David likes", "apples and bananas"]
    want = [plain.generate(text, max_tokens=30, **sampling).text for text in texts]
    streams, got = [engine.stream(text, max_tokens=30, **sampling) for text in texts], ["", ""]
    while streams_left := [i for i in range(2) if streams[i] is not None]:
        for i in streams_left:
            piece = next(streams[i], None)
            streams[i] = None if piece is None else streams[i]
            got[i] += piece or ""
    assert got == want


def test_the_host_is_one_step_late_and_drops_the_surplus(make, monkeypatch):
    engine, steps = make(), []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self: (steps.append(self.collected), step(self))[1])
    free = engine.generate(PROMPTS[0], max_tokens=10, ignore_eos=True)
    assert steps == list(range(9)) and len(free.token_ids) == 10  # the last token's step is known not to be needed
    steps.clear()
    stop = free.token_ids[4]
    ended = engine.generate(PROMPTS[0], max_tokens=10, ignore_eos=True, stop_token_ids=[stop])
    index = free.token_ids.index(stop)
    assert (ended.token_ids, ended.finish_reason) == (free.token_ids[: index + 1], "stop")
    assert steps == list(range(index + 1))  # one more than was needed
    steps.clear()
    engine._graphs.static = False
    assert engine.generate(PROMPTS[0], max_tokens=10, ignore_eos=True, stop_token_ids=[stop]) == ended
    assert len(steps) == index


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "growing"])
def test_a_change_of_the_memory_ends_a_stream(make, fixed):
    engine = make(fixed)
    pieces = engine.stream("David likes", max_tokens=60, ignore_eos=True)
    next(pieces)
    engine.update(list(range(20)))
    with pytest.raises(RuntimeError, match="^memory: "):
        list(pieces)
    want = make(False)
    want.update(list(range(20)))
    assert engine.generate(PROMPTS, max_tokens=9).__repr__() == want.generate(PROMPTS, max_tokens=9).__repr__()


# -- what a capture needs ---------------------------------------------------------------------------------------------

WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "unique")


class Trace(TorchDispatchMode):
    """What is computed inside the block: operations, shapes and numbers, but for values on the device."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = tree_map_only(torch.Tensor, lambda t: (tuple(t.shape), t.stride(), t.dtype), (args, kwargs or {}))
        self.calls.append((str(func), str(shapes)))
        return func(*args, **(kwargs or {}))

    def waiting(self):
        return [name for name, _ in self.calls if any(f".{word}." in f".{name}." for word in WAITING)]


@pytest.mark.parametrize("name", SAMPLING)
def test_every_step_is_the_same_work_and_waits_for_nothing(make, name, monkeypatch):
    """On a CUDA device, whose part the CPU plays: only for the CPU are indices checked."""
    monkeypatch.setattr("memkernel._check.expect_below", lambda name, tensor, limit: None)
    engine = make(ops=reference)
    requests, _ = engine._requests(PROMPTS, SAMPLING[name] | {"max_tokens": 50})
    _, decoder = engine._decoders.take(requests, engine.memory)
    with torch.inference_mode():
        decoder.begin(requests, engine.memory)
    tensors = {**vars(decoder.cache), **vars(decoder.sampler), "rotated": engine.memory.rotated_key}
    addresses = {k: t.data_ptr() for k, t in tensors.items() if isinstance(t, torch.Tensor)}
    traces = []
    for _ in range(4):
        with Trace() as trace:
            decoder.step()
        assert not trace.waiting() and len(trace.calls) > 50
        traces.append(trace.calls)
    assert traces[1] == traces[2] == traces[3]  # the first may make a longer table of rotations
    assert {k: tensors[k].data_ptr() for k in addresses} == addresses


def test_work_is_done_then_captured_then_replayed(monkeypatch):
    """The order of things on a CUDA device, whose part is played here: capturing records, replaying does."""
    log = []

    class Recorded:
        def replay(self):
            log.append("replay")

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    streams = []  # of captures

    def capture(graph, stream, **options):
        log.append("capture"), streams.append(stream)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: (str(device), len(streams)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: log.append("pool"))
    monkeypatch.setattr(Graph, "_on_side_stream", lambda self, function: (log.append("side"), function()))
    graphs = Graphs(torch.device("cuda:1"), memkernel.ops)
    with monkeypatch.context() as patch:
        for has_kernels in (True, False):
            patch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key, has=has_kernels: has)
            cuda, cpu = torch.device("cuda"), torch.device("cpu")
            pairs = [(cuda, memkernel.ops), (cuda, reference), (cpu, memkernel.ops)]
            assert [Graphs(*pair).static for pair in pairs] == [has_kernels, False, False]
    first, second = Graph(graphs), Graph(graphs)
    for graph in (first, first, second, first, second):
        graph.run(lambda: log.append("work"))
    done, captured, replayed = ["side", "work"], ["capture", "work", "replay"], ["replay"]
    assert log == [*done, "pool", *captured, *done, *replayed, *captured]
    del first, graph
    second = None
    log.clear()
    third = Graph(graphs)
    third.run(lambda: None), third.run(lambda: None)
    assert log == ["side", "pool", "capture", "replay"]  # no graph of the pool was left
    assert streams == [("cuda:1", 0)] * 3  # one, on the engine's device: what shares a pool must share it


def test_every_update_of_a_length_is_the_same_work(make):
    engine = make()
    engine.update(list(range(40)))
    memory, ids, traces = engine.memory, torch.arange(40), []
    for _ in range(3):
        with torch.inference_mode(), Trace() as trace:
            engine._updater.write(ids, memory, None)
        traces.append(trace.calls)
        assert not trace.waiting()
    assert traces[1] == traces[2]


@pytest.mark.parametrize("keep_hidden", [True, False])
def test_updates_through_buffers_are_those_without(make, keep_hidden):
    """Two memories in turns, lengths that repeat and lengths that do not; bit for bit, the draw's state included."""
    engines = [make(fixed) for fixed in (True, False)]
    for engine in engines:
        if not keep_hidden:
            engine.memory.hidden_by_slot = None
    memories = [[engine.memory, engine.memory.fork()] for engine in engines]
    for pair in memories:
        pair[1].reset()
    lengths = [40, 16, 40, 100, 40, 16, 600, *range(20, 20 + 2 * KEPT_LENGTHS)]
    for i, length in enumerate(lengths):
        ids = torch.randint(256, (length,))
        for engine, pair in zip(engines, memories, strict=True):
            engine.memory = pair[i % 2]
            engine.update(ids)
    for mine, theirs in zip(*memories, strict=True):
        for name, value in vars(theirs).items():
            same = torch.equal(getattr(mine, name), value) if torch.is_tensor(value) else getattr(mine, name) == value
            assert same, name
        assert mine.state.tolist() == [mine.seed, mine.step]
    of = engines[0]._updater.of
    assert all(len(graphs.by_length) <= KEPT_LENGTHS for graphs in of.values()) and len(of) == 2


def test_the_state_on_the_device_is_that_of_the_host(make, tmp_path):
    memory = make().memory

    def check(memory):
        assert memory.state.tolist() == [memory.seed, memory.step]

    def write(memory):
        L, W, E = memory.recent.shape
        G, D = memory.key.shape[2:]
        memory.write(Delta(*(torch.rand(shape).double() for shape in ((L, W, G, D), (L, W, G, D), (L, W, E)))))

    for _ in range(3):
        write(memory)
        check(memory)
    with pytest.raises(ValueError, match="^delta"):
        memory.write(Delta(memory.key, memory.value, memory.recent))
    check(memory)
    memory.save(tmp_path / "memory")
    other = memory.fork()
    write(other)
    check(other), check(memory)
    assert other.step == memory.step + 1
    other.seed = 5
    memory.reset()
    check(memory)
    memory.load(tmp_path / "memory")
    check(memory)
    assert memory.step == other.step - 1


def test_a_memory_of_another_device_is_refused_with_the_way_to_bring_it(make, loaded):
    engine = make()
    memory = engine.memory
    assert memory.to("cpu") is memory is memory.to(torch.device("cpu"))
    elsewhere = Memory(loaded.config, memory.fingerprint, memory.ops, torch.float64, torch.device("meta"))
    with pytest.raises(
        ValueError, match=r"^memory: expected one on cpu, got one on meta; memory\.to\('cpu'\) is a copy"
    ):
        engine.memory = elsewhere
    assert engine.memory is memory
    for wrong in ("gpu", "cuda:99", None, 3.5):
        with pytest.raises(ValueError, match="^device: expected "):
            memory.to(wrong)
