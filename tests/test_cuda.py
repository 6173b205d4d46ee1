"""What needs a CUDA device: skipped, by name, where there is none."""

import pytest
import torch

from memkernel import Engine, ops, reference, tiny
from tests.compare import assert_no_worse, relative_error
from tests.test_ops import NAMES, arguments, tensors_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = ("draw_ranks", "memory_write_")  # data is moved and counted: equal bit for bit


def moved(values, device, dtype=None):
    """The arguments on a device, floating-point ones in `dtype`; RoPE's tables stay float32."""
    if isinstance(values, list):
        return [moved(value, device, dtype) for value in values]
    if not isinstance(values, torch.Tensor):
        return values
    return values.to(device, dtype if dtype and values.is_floating_point() else None, copy=True)


def cast(name, given, device, dtype):
    tables = {"rope_write_": (5, 6), "rotate_memory_": (3, 4)}.get(name, ())
    return [moved(value, device, None if i in tables else dtype) for i, value in enumerate(given)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_op_against_fp64(name, dtype):
    rounded = cast(name, arguments(name), "cpu", dtype)
    exact = cast(name, rounded, "cpu", torch.float64)
    plain = cast(name, rounded, "cpu", dtype)
    mine = cast(name, rounded, "cuda", dtype)
    outs = [getattr(ops, name)(*mine), getattr(reference, name)(*exact), getattr(reference, name)(*plain)]
    groups = [tensors_of([*given, out]) for given, out in zip((mine, exact, plain), outs, strict=True)]
    for ours, truth, yard in zip(*groups, strict=True):
        if name in INTEGERS or not ours.is_floating_point():
            assert torch.equal(ours.cpu(), yard), name
        else:
            assert_no_worse(name, ours.cpu(), truth.double(), yard)


@pytest.mark.parametrize("name", NAMES)
def test_op_repeats_bit_for_bit(name):
    first, second = (cast(name, arguments(name), "cuda", torch.float32) for _ in range(2))
    a, b = getattr(ops, name)(*first), getattr(ops, name)(*second)
    for x, y in zip(tensors_of([*first, a]), tensors_of([*second, b]), strict=True):
        assert torch.equal(x, y)


def test_engine_computes_on_cuda_what_it_computes_on_the_cpu(tmp_path):
    tiny.write_checkpoint(tmp_path, initialized=True)
    engines = [Engine.from_pretrained(tmp_path, device=device, dtype="float32") for device in ("cpu", "cuda")]
    ids = torch.arange(40) % 250
    for engine in engines:
        engine.update(ids)
        engine.update(ids + 3)
    cpu, cuda = engines
    assert torch.equal(cuda.memory.rank.cpu(), cpu.memory.rank)
    for a, b in ((cuda.memory.key, cpu.memory.key), (cuda.memory.value, cpu.memory.value)):
        assert relative_error(a.cpu(), b) < 2e-5
    assert relative_error(cuda.logits(ids).cpu(), cpu.logits(ids)) < 2e-5
    prompts = [ids[:7].tolist(), ids[:20].tolist()]
    texts = [[c.token_ids for c in engine.generate(prompts, max_tokens=12, ignore_eos=True)] for engine in engines]
    assert texts[0] == texts[1]


def test_memory_saved_on_one_device_is_read_on_the_other(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model", initialized=True)
    cpu, cuda = (Engine.from_pretrained(folder, device=device, dtype="float32") for device in ("cpu", "cuda"))
    cuda.update(torch.arange(40))
    cuda.memory.save(tmp_path / "memory")
    cpu.memory.load(tmp_path / "memory")
    assert torch.equal(cpu.memory.key, cuda.memory.key.cpu()) and torch.equal(cpu.memory.rank, cuda.memory.rank.cpu())


# -- graphs -----------------------------------------------------------------------------------------------------------

SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "frequency_penalty": 0.2, "logprobs": 2, "min_tokens": 4}
PROMPTS = [list(range(1, 1 + n)) for n in (9, 1, 30)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def loaded(tmp_path_factory, request):
    """Heads of 64, which the kernels take."""
    config = tiny.MEMORYLLM | {"hidden_size": 256, "num_blocks": 16}
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("cuda"), config, initialized=True)
    return Engine.from_pretrained(folder, device="cuda", dtype=request.param)


@pytest.fixture
def make(loaded):
    """An engine of its own over weights that are loaded once; without `replays` it launches the same work each time."""

    def make(replays=True):
        engine = Engine(loaded.model, loaded.memory.fork(), loaded.folder)
        if not replays:
            engine._graphs.device = torch.device("cpu")  # where there is nothing to capture
        return engine

    return make


def ids_of(length, seed):
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed))


def assert_same_memory(one, other):
    for name, value in vars(one).items():
        same = torch.equal(value, getattr(other, name)) if torch.is_tensor(value) else value == getattr(other, name)
        assert same, name


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "drawn"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["B1", "B3"])
def test_decoding_by_replays_is_decoding_launch_by_launch(make, prompts, sampling):
    replayed, launched = make(), make(replays=False)
    want = launched.generate(prompts, max_tokens=40, ignore_eos=True, **sampling)
    for _ in range(3):  # the graph is captured in the first and used again
        assert replayed.generate(prompts, max_tokens=40, ignore_eos=True, **sampling) == want
    assert len(replayed._graphs.captured) == 1


def test_updates_by_replays_are_updates_launch_by_launch(make):
    replayed, launched = make(), make(replays=False)
    for i, length in enumerate([40, 16, 40, 40, 16, 200, 40, 600]):
        for engine in (replayed, launched):
            engine.update(ids_of(length, i))
    assert_same_memory(replayed.memory, launched.memory)
    assert replayed.memory.state.tolist() == [replayed.memory.seed, 9]
    assert len(replayed._graphs.captured) == 3  # the write, and the lengths 40 and 16
    assert replayed.generate(PROMPTS, max_tokens=5) == launched.generate(PROMPTS, max_tokens=5)


def test_memories_may_be_switched_between_replays(make):
    engines = make(), make(replays=False)
    forks = [[engine.memory, engine.memory.fork(), engine.memory.fork()] for engine in engines]
    for i in range(12):
        answers = []
        for engine, memories in zip(engines, forks, strict=True):
            engine.memory = memories[i % 3]
            engine.update(ids_of(40, i))
            answers.append(engine.generate(PROMPTS, max_tokens=8, ignore_eos=True))
        assert answers[0] == answers[1]
    for one, other in zip(*forks, strict=True):
        assert_same_memory(one, other)
    engine, before = engines[0], len(engines[0]._graphs.captured)
    engine.memory = forks[0][2]
    del forks[0][:2], memories
    assert len(engine._graphs.captured) == before // 3  # a memory's graphs go with it


def test_two_hundred_repeats_are_equal_bit_for_bit(make):
    engine = make()
    memory = engine.memory
    parts = {name: part.clone() for name, part in vars(memory).items() if torch.is_tensor(part)}
    want = None
    for _ in range(200):
        for name, part in parts.items():
            getattr(memory, name).copy_(part)
        memory._note_edit()
        engine.update(ids_of(40, 0))
        got = [memory.key.clone(), memory.value.clone(), memory.rank.clone(), memory.recent.clone()]
        got.append(engine.generate(PROMPTS, max_tokens=8, **SAMPLED))
        if want is not None:
            assert all(torch.equal(a, b) for a, b in zip(got[:4], want[:4], strict=True)) and got[4] == want[4]
        want = got


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "drawn"])
def test_steps_do_not_wait_for_the_device(make, sampling):
    engine = make()
    requests, _ = engine._requests(PROMPTS, sampling | {"max_tokens": 60})
    _, decoder = engine._decoders.take(requests, engine.memory)
    with torch.inference_mode():
        decoder.begin(requests, engine.memory)
    decoder.collect()
    for _ in range(2):
        decoder.step()
        decoder.collect()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            decoder.step()
            decoder.collect()  # waits for that step's event, not for the device
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert decoder.graph.captured is not None


def test_a_memory_moves_between_devices(make):
    engine = make()
    engine.update(ids_of(40, 0))
    want = engine.generate(PROMPTS, max_tokens=8)
    stored = engine.memory.to("cpu")
    assert stored.key.device.type == "cpu" and engine.memory.to("cuda") is engine.memory
    with pytest.raises(ValueError, match=r"memory\.to\('cuda:0'\)"):
        engine.memory = stored
    engine.update(ids_of(40, 1))
    engine.memory = stored.to("cuda")
    assert engine.generate(PROMPTS, max_tokens=8) == want
    assert stored.step == engine.memory.step == 1
