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
