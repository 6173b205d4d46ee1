"""The Triton kernels against the reference: on a CUDA device for real, elsewhere in Triton's interpreter.

The interpreter computes float32 and float16 rightly, bfloat16 not (it truncates, and multiplies bit patterns), so that
bfloat16 is for CUDA; moved rows are tested in any dtype. It runs programs one after the other: races are for CUDA too.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from memkernel import Engine, ops, reference, tiny
from tests.cases import CASES, COMPUTED, MOVED, SENTINEL, WRONG, cast, each, embedded, flat, permutations, rotate
from tests.compare import assert_no_worse

triton = pytest.importorskip("triton", reason="needs Triton")
from memkernel import kernels  # noqa: E402 - it imports triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
pytestmark = pytest.mark.skipif(
    not CUDA and triton.__version__ < "3.9" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton before 3.9 fails with numpy 2.4",
)
NAMES = kernels.__all__


def on_device(values):
    return each(values, lambda t: t.to(DEVICE))


def assert_as_the_reference(name, op, args, dim=None):
    """Run the kernel on views into sentinels; compare what it returns, and all arguments, with the reference."""
    exact, plain = cast(op, args, torch.float64), cast(op, args, next(t.dtype for t in flat(args)))
    wholes = []

    def embed(t):
        whole, view = embedded(t.to(DEVICE), dim)
        wholes.append((whole, view))
        return view

    mine = each(args, embed)
    got = getattr(kernels, op)(*mine)
    want_exact, want_plain = getattr(reference, op)(*exact), getattr(reference, op)(*plain)
    if got is not None and got.numel():
        assert got.is_contiguous()
        assert_no_worse(name, got.cpu(), want_exact, want_plain)
    for i in range(len(args)):
        for a, b, c, d in zip(*(flat([values[i]]) for values in (mine, exact, plain, args)), strict=True):
            if i in COMPUTED.get(op, []) and a.numel():
                assert_no_worse(f"{name}, argument {i}", a.cpu(), b, c)
            else:
                assert torch.equal(a.cpu(), c if i in MOVED.get(op, []) else d), f"{name}, argument {i}"
    for whole, view in wholes:
        view.fill_(SENTINEL)
        assert (whole == SENTINEL).all(), "written outside of the view"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_the_reference(name, dtype):
    op, args = CASES[name]()
    assert_as_the_reference(name, op, cast(op, args, dtype))


def test_rotates_layers_in_one_launch():
    """Sentinels around whole layers, so that all rows have one stride, as the kernel wants them."""
    op, args = rotate(3, 33, 3, 36)()
    assert_as_the_reference("rotate", op, args, dim=0)


def test_the_normed_row_is_rounded_before_the_weight():
    """More exact than the reference would be wrong too: checkpoints were trained with this rounding."""
    x, weight = torch.randn(8, 500).half(), torch.rand(500).half() + 1
    got, want = kernels.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5).cpu(), reference.rms_norm(x, weight, 1e-5)
    assert (got == want).float().mean() > 0.99  # without it a quarter of them differs


# Matrix products in another layout may add in another order.
WITHOUT_PRODUCTS = [name for name in CASES if not name.startswith(("linear", "attention")) and "12801" not in name]


@pytest.mark.parametrize("name", WITHOUT_PRODUCTS)
def test_does_not_depend_on_the_strides_of_what_is_read(name):
    op, args = CASES[name]()
    mine, theirs = on_device(each(args, torch.clone)), on_device(each(args, torch.clone))
    stay = COMPUTED.get(op, []) + MOVED.get(op, [])
    for i, value in enumerate(mine):
        if i not in stay:
            mine[i] = each([value], lambda t: t.mT.contiguous().mT if t.ndim > 1 else torch.stack([t, t], 1)[:, 0])[0]
    got, want = getattr(kernels, op)(*mine), getattr(kernels, op)(*theirs)
    for a, b in zip(flat([got, *mine]), flat([want, *theirs]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["add-norm-ragged", "rope-ragged", "rotate-ragged", "write"])
def test_writes_to_any_strides(name):
    op, args = CASES[name]()
    mine = on_device(each(args, lambda t: t.mT.contiguous().mT if t.ndim > 1 else t.clone()))
    got, want = getattr(kernels, op)(*mine), getattr(reference, op)(*args)
    for a, b in zip(flat([got, *mine]), flat([want, *args]), strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("name", ["norm-ragged", "add-norm-ragged", "swiglu-ragged", "rope-ragged", "rotate-ragged"])
def test_float64_is_computed_by_the_reference(name):
    op, args = CASES[name]()
    mine, theirs = on_device(cast(op, args, torch.float64)), on_device(cast(op, args, torch.float64))
    got, want = getattr(kernels, op)(*mine), getattr(reference, op)(*theirs)
    assert all(torch.equal(a, b) for a, b in zip(flat([got, *mine]), flat([want, *theirs]), strict=True))


def test_rows_too_long_for_a_program_are_the_reference():
    x, weight = torch.randn(2, 16385), torch.rand(16385)
    got = kernels.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    assert torch.equal(got, reference.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5))


@pytest.mark.parametrize(
    "rows, count", [(0, 0), (1, 1), (2, 1), (5, 5), (33, 32), (100, 7), (12800, 256), (12801, 0), (2**31, 3)]
)
@pytest.mark.parametrize("shared", [False, True])
def test_draws_what_the_reference_draws(rows, count, shared):
    for state in (torch.tensor([0, 0]), torch.tensor([2**40 + 12345, 2**62 + 7]), torch.tensor([-1, 5, 3])[::2]):
        want = reference.draw_ranks(state, 3, rows, count, shared)
        got = kernels.draw_ranks(state.to(DEVICE), 3, rows, count, shared)
        assert got.dtype == want.dtype and torch.equal(got.cpu(), want)


HIDDEN, INT8, HALF, WIDE = ((1030,), torch.float32), ((3,), torch.int8), ((2, 5), torch.bfloat16), ((), torch.float64)


@pytest.mark.parametrize(
    "L, M, W, pools",
    [
        (1, 1, 1, [HALF]),
        (2, 9, 1, [HALF, HALF, HIDDEN]),
        (2, 9, 9, [INT8, HALF, HIDDEN, WIDE, HALF]),
        (3, 4097, 60, [WIDE, HALF]),
        (2, 7, 3, []),
        (2, 7, 3, [((0,), torch.float32), HALF]),
        (1, 131072, 3, [HALF]),
        (0, 7, 3, [HALF]),
    ],
)
def test_writes_what_the_reference_writes(L, M, W, pools):
    """Again and again into the same pools, of several dtypes and sizes; each a view with sentinels on both sides."""
    rank, wholes = permutations(max(L, 1), M)[:L], []
    for shape, dtype in pools:
        wholes.append(torch.full((L, M + 2, *shape), SENTINEL, dtype=dtype))
        wholes[-1][:, 1:-1] = torch.randint(100, (L, M, *shape)).to(dtype)
    mine, my_rank = on_device([wholes])[0], rank.to(DEVICE, copy=True)
    mine = [whole.clone() for whole in mine]
    for step in range(3):
        state = torch.tensor([7, step])
        rows = [torch.randint(100, (L, W, *shape)).to(dtype) for shape, dtype in pools]
        dropped = kernels.draw_ranks(state.to(DEVICE), L, M, W, False)
        kernels.memory_write_([whole[:, 1:-1] for whole in mine], my_rank, on_device([rows])[0], dropped)
        reference.memory_write_([whole[:, 1:-1] for whole in wholes], rank, rows, dropped.cpu())
        assert torch.equal(my_rank.cpu(), rank)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, wholes, strict=True))


@pytest.mark.parametrize("name, index, change", WRONG)
def test_errors_are_those_of_the_reference(name, index, change):
    op, args = CASES[name]()
    args[index] = change(args[index])
    messages = []
    for namespace in (kernels, reference):
        with pytest.raises(ValueError) as caught:
            getattr(namespace, op)(*on_device(args))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_engine_on_the_kernels(tmp_path):
    """Update and answer, float32: the same ranks and tokens as on the reference, the rest to rounding."""
    folder = tiny.write_checkpoint(tmp_path, initialized=True)
    ids, engines = torch.arange(24) % 250, []
    for namespace in (kernels, reference):
        engine = Engine.from_pretrained(folder, device=DEVICE, dtype="float32", keep_hidden=True, ops=namespace)
        engine.update(ids)
        engines.append((engine, engine.logits(ids[:9])))
    (mine, my_logits), (theirs, their_logits) = engines
    assert torch.equal(mine.memory.rank, theirs.memory.rank)
    for name in ("key", "value", "rotated_key", "recent", "hidden_by_slot"):
        torch.testing.assert_close(getattr(mine.memory, name), getattr(theirs.memory, name), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(my_logits, their_logits, rtol=2e-5, atol=2e-5)
    prompts = [ids[:7].tolist(), ids[:3].tolist()]
    answers = [[c.token_ids for c in e.generate(prompts, max_tokens=3, ignore_eos=True)] for e, _ in engines]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", NAMES)
def test_registered_for_cuda(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"memkernel::{name}", "CUDA")


def test_without_triton_cuda_runs_the_reference():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from memkernel import ops\n"
        "assert not torch._C._dispatch_has_kernel_for_dispatch_key('memkernel::rms_norm', 'CUDA')\n"
        "print(ops.WHY_NO_TRITON)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Triton cannot be imported: ")


def update_of_size_8b(L, M=12800, W=256):
    """Pools of the 8B model's shape, and a function that draws and writes by a step counted on the device."""
    pools = [torch.randn(L, M, 8, 128, device="cuda").bfloat16() for _ in range(2)]
    rows = [torch.randn(L, W, 8, 128, device="cuda").bfloat16() for _ in range(2)]
    rank, state = permutations(L, M).cuda(), torch.tensor([3, 0], device="cuda")

    def update():
        ops.memory_write_(pools, rank, rows, ops.draw_ranks(state, L, M, W, False))
        state[1] += 1

    return [*pools, rank], state, update


@needs_cuda
def test_a_captured_update_replays():
    tensors, state, update = update_of_size_8b(L=2)
    update()  # compiles, which a capture cannot
    saved = [t.clone() for t in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    for t, old in zip(tensors, saved, strict=True):
        assert torch.equal(t, old)
    for _ in range(3):
        graph.replay()
    replayed = [t.clone() for t in tensors]
    assert state[1] == 4
    for t, old in zip(tensors, saved, strict=True):
        t.copy_(old)
    state[1] = 1
    for _ in range(3):
        update()
    assert all(torch.equal(a, b) for a, b in zip(tensors, replayed, strict=True))


@needs_cuda
def test_repeats_bit_for_bit():
    """A race between programs or warps would show in some of 200 runs."""
    tensors, state, update = update_of_size_8b(L=4)
    saved, want = [t.clone() for t in tensors], None
    for _ in range(200):
        for t, old in zip(tensors, saved, strict=True):
            t.copy_(old)
        state[1] = 0
        update()
        want = want or [t.clone() for t in tensors]
        assert all(torch.equal(a, b) for a, b in zip(tensors, want, strict=True))
