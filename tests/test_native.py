"""The CPU kernels against the reference: every op, every instruction set of this machine, one and two threads.

Computed numbers by `assert_no_worse` against the reference in float64; integers and moved rows bit for bit. Arguments
are views into larger buffers, and what surrounds them must survive.
"""

import os
import signal

import pytest
import torch

from memkernel import native, ops, reference
from tests.compare import assert_no_worse

pytestmark = pytest.mark.skipif(not native.isas(), reason=native.WHY_NOT or "")

SENTINEL = -7
COMPUTED = {"add_rms_norm_": [0], "rope_write_": [0], "rotate_memory_": [0]}  # positions of written arguments
MOVED = {"rope_write_": [1], "memory_write_": [0, 1]}
FLOAT32 = {"rope_write_": [5, 6], "rotate_memory_": [3, 4]}  # cos and sin, whatever the model's dtype


def norm(shape):
    return lambda: ("rms_norm", [torch.randn(shape) * 3, torch.rand(shape[-1]) + 1, 1e-5])


def add_norm(shape):
    return lambda: ("add_rms_norm_", [torch.randn(shape) * 3, torch.randn(shape), torch.rand(shape[-1]) + 1, 1e-5])


def swiglu(shape):
    return lambda: ("swiglu", [torch.randn(shape) * 5])


def linear(rows, size, outs):
    return lambda: ("linear", [torch.randn(rows, size), torch.randn(outs, size)])


def angles(positions, D):
    angle = torch.rand(positions, D // 2) * 7
    return angle.cos(), angle.sin()


def rope(B, T, Tq, H, G, D, S, starts):
    def case():
        cache, new = torch.randn(2, B, S, G, D), torch.randn(2, B, T, G, D)
        tail = [*angles(S + 5, D), torch.tensor(starts, dtype=torch.int32), 5]
        return "rope_write_", [*cache, torch.randn(B, Tq, H, D), *new, *tail]

    return case


def permutations(L, M):
    return torch.stack([torch.randperm(M) for _ in range(L)]).int()


def rotate(L, M, G, D):
    def case():
        return "rotate_memory_", [*torch.randn(2, L, M, G, D), permutations(L, M), *angles(M + 1, D), 1]

    return case


def attention(B, P, T, H, G, D, M, S, starts):
    def case():
        memory, own = torch.randn(2, P, M, G, D), torch.randn(2, B, S, G, D)
        return "memory_attention", [torch.randn(B, T, H, D), *memory, *own, torch.tensor(starts, dtype=torch.int32)]

    return case


def write(L, M, W, *shapes):
    def case():
        pools, rows = ([torch.randn(L, n, *shape) for shape in shapes] for n in (M, W))
        return "memory_write_", [pools, permutations(L, M), rows, permutations(L, M)[:, :W].contiguous()]

    return case


CASES = {
    "norm-1": norm((1, 1)),
    "norm-ragged": norm((2, 3, 100)),
    "norm-wide": norm((5, 2048)),
    "norm-no-rows": norm((0, 64)),
    "norm-no-rows-in-the-middle": norm((2, 0, 64)),
    "add-norm-ragged": add_norm((3, 33)),
    "add-norm-wide": add_norm((2, 40, 4096)),
    "add-norm-no-rows": add_norm((2, 0, 32)),
    "swiglu-1": swiglu((1, 2)),
    "swiglu-ragged": swiglu((2, 3, 202)),
    "swiglu-wide": swiglu((3, 2 * 8192)),
    "linear-1": linear(1, 1, 1),
    "linear-empty-sum": linear(2, 0, 3),
    "linear-ragged": linear(3, 100, 37),
    "linear-one-row": linear(1, 2048, 257),
    "linear-long": linear(2, 8192, 64),
    "linear-rows": linear(7, 515, 66),
    "linear-many-rows": linear(70, 65, 34),
    "rope-one-token": rope(1, 1, 1, 4, 2, 64, 9, [8]),
    "rope-ragged": rope(3, 5, 5, 6, 2, 20, 16, [0, 11, 3]),
    "rope-last-queries": rope(2, 9, 2, 4, 4, 128, 40, [1, 30]),
    "rotate-1": rotate(1, 1, 1, 2),
    "rotate-ragged": rotate(3, 33, 2, 36),
    "rotate-12801": rotate(1, 12801, 1, 64),
    "attention-one-token": attention(1, 1, 1, 8, 2, 64, 255, 8, [7]),
    "attention-odd-head": attention(2, 1, 3, 4, 2, 7, 33, 5, [0, 2]),
    "attention-no-heads": attention(1, 1, 2, 0, 1, 16, 5, 2, [0]),
    "attention-no-tokens": attention(2, 1, 0, 4, 2, 16, 5, 2, [0, 1]),
    "attention-six-rows": attention(3, 1, 1, 4, 2, 64, 131, 200, [199, 0, 77]),
    "attention-five-rows": attention(1, 1, 5, 2, 2, 128, 65, 70, [60]),
    "attention-no-memory": attention(1, 1, 9, 4, 4, 32, 0, 9, [0]),
    "attention-one-row": attention(2, 1, 1, 2, 2, 16, 1, 4, [0, 3]),
    "attention-prefill": attention(1, 1, 65, 4, 2, 64, 257, 70, [5]),
    "attention-ragged-batch": attention(3, 1, 5, 6, 2, 20, 40, 20, [1, 15, 6]),
    "attention-two-pools": attention(4, 2, 3, 6, 2, 16, 11, 9, [0, 1, 2, 6]),
    "attention-8-on-one": attention(8, 1, 1, 8, 2, 128, 513, 6, [0, 1, 2, 3, 4, 5, 0, 1]),
    "attention-12801": attention(1, 1, 2, 4, 1, 64, 12801, 5, [3]),
    "write": write(3, 40, 7, (2, 16), (5,)),
    "write-nothing": write(2, 12, 0, (4,)),
    "write-all": write(2, 12, 12, (4,)),
    "write-12801": write(2, 12801, 256, (1, 3)),
}


def flat(values):
    """Tensors of an argument list, lists of tensors opened."""
    return [t for v in values for t in (v if isinstance(v, list) else [v]) if torch.is_tensor(t)]


def each(values, change):
    """`values` with every tensor, also those in lists, put through `change`."""
    return [[change(t) for t in v] if isinstance(v, list) else change(v) if torch.is_tensor(v) else v for v in values]


def cast(op, args, dtype):
    """Fresh arguments, the model's tensors in `dtype`."""
    fresh = each(args, lambda t: t.to(dtype, copy=True) if t.is_floating_point() else t.clone())
    return [args[i].clone() if i in FLOAT32.get(op, []) else fresh[i] for i in range(len(args))]


def embedded(t):
    """A buffer of sentinels and a view of it that equals `t`, with sentinels before and after."""
    dim = 0 if t.ndim < 4 else 1
    shape = list(t.shape)
    shape[dim] += 2
    whole = torch.full(shape, SENTINEL, dtype=t.dtype)
    view = whole.narrow(dim, 1, t.shape[dim])
    view.copy_(t)
    return whole, view


@pytest.fixture(autouse=True)
def _outputs_filled_with_nan():
    """Also those that C++ allocates: PyTorch fills them in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=native.isas())
def isa(request):
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_the_reference(name, dtype, isa, threads):
    op, args = CASES[name]()
    args = cast(op, args, dtype)
    exact, plain = cast(op, args, torch.float64), cast(op, args, dtype)
    wholes = []

    def embed(t):
        whole, view = embedded(t)
        wholes.append((whole, view))
        return view

    mine = each(args, embed)
    got = getattr(ops, op)(*mine)
    want_exact, want_plain = getattr(reference, op)(*exact), getattr(reference, op)(*plain)
    if got is not None and got.numel():
        assert got.is_contiguous()
        assert_no_worse(name, got, want_exact, want_plain)
    for i in range(len(args)):
        for a, b, c, d in zip(*(flat([values[i]]) for values in (mine, exact, plain, args)), strict=True):
            if i in COMPUTED.get(op, []) and a.numel():
                assert_no_worse(f"{name}, argument {i}", a, b, c)
            else:
                assert torch.equal(a, c if i in MOVED.get(op, []) else d), f"{name}, argument {i}"
    for whole, view in wholes:
        view.fill_(SENTINEL)
        assert (whole == SENTINEL).all(), "written outside of the view"


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("12801")])
def test_does_not_depend_on_the_strides_of_what_is_read(name, isa):
    op, args = CASES[name]()
    mine, theirs = each(args, torch.clone), each(args, torch.clone)
    # A transposed weight is PyTorch's to multiply with.
    stay = COMPUTED.get(op, []) + MOVED.get(op, []) + [1] * (op == "linear")
    for i, value in enumerate(mine):
        if i not in stay:
            mine[i] = each([value], lambda t: t.mT.contiguous().mT if t.ndim > 1 else torch.stack([t, t], 1)[:, 0])[0]
    got, want = getattr(ops, op)(*mine), getattr(ops, op)(*theirs)
    for a, b in zip(flat([got, *mine]), flat([want, *theirs]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "rows, count", [(0, 0), (1, 1), (2, 1), (5, 5), (100, 7), (12800, 256), (12801, 0), (2**31, 3)]
)
@pytest.mark.parametrize("shared", [False, True])
def test_draws_what_the_reference_draws(rows, count, shared, isa, threads):
    for state in (torch.tensor([0, 0]), torch.tensor([2**40 + 12345, 2**62 + 7]), torch.tensor([-1, 5, 3])[::2]):
        want = reference.draw_ranks(state, 3, rows, count, shared)
        got = ops.draw_ranks(state, 3, rows, count, shared)
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, torch.bool])
def test_any_dtype_is_moved(dtype, isa):
    op, args = CASES["write"]()
    mine, theirs = cast(op, args, dtype), cast(op, args, dtype)
    ops.memory_write_(*mine), reference.memory_write_(*theirs)
    assert all(torch.equal(a, b) for a, b in zip(flat(mine), flat(theirs), strict=True))


@pytest.mark.parametrize("name", ["norm-ragged", "add-norm-ragged", "swiglu-ragged", "linear-ragged", "rope-ragged"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_computed_by_the_reference(name, dtype):
    op, args = CASES[name]()
    mine, theirs = cast(op, args, dtype), cast(op, args, dtype)
    got, want = getattr(ops, op)(*mine), getattr(reference, op)(*theirs)
    assert all(torch.equal(a, b) for a, b in zip(flat([got, *mine]), flat([want, *theirs]), strict=True))


@pytest.mark.parametrize("name", ["add-norm-ragged", "rope-ragged", "rotate-ragged", "write"])
def test_writes_to_any_strides(name):
    op, args = CASES[name]()
    mine = each(args, lambda t: t.mT.contiguous().mT if t.ndim > 1 else t.clone())
    got, want = getattr(ops, op)(*mine), getattr(reference, op)(*args)
    for a, b in zip(flat([got, *mine]), flat([want, *args]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["norm-ragged", "swiglu-ragged", "linear-ragged", "attention-one-token"])
def test_arguments_that_require_gradients(name):
    op, args = CASES[name]()
    got = getattr(ops, op)(*each(args, lambda t: t.clone().requires_grad_(t.is_floating_point())))
    assert torch.equal(got, getattr(ops, op)(*args))


WRONG = [  # case, argument, what becomes of it
    ("norm-ragged", 1, lambda t: t[:-1]),
    ("norm-ragged", 1, lambda t: t.double()),
    ("add-norm-ragged", 1, lambda t: t[:2]),
    ("add-norm-ragged", 2, lambda t: t.bfloat16()),
    ("swiglu-ragged", 0, lambda t: t[..., :-1]),
    ("rope-ragged", 8, lambda offset: -1),
    ("rotate-ragged", 5, lambda offset: -1),
    ("linear-ragged", 1, lambda t: t[:, :-1]),
    ("linear-ragged", 1, lambda t: t[0]),
    ("rope-ragged", 1, lambda t: t[:, :-1]),
    ("rope-ragged", 2, lambda t: torch.cat([t, t], 1)),
    ("rope-ragged", 4, lambda t: t.double()),
    ("rope-ragged", 5, lambda t: t[:, :-1]),
    ("rope-ragged", 7, lambda t: t.long()),
    ("rotate-ragged", 1, lambda t: t[:, :-1]),
    ("rotate-ragged", 2, lambda t: t.long()),
    ("attention-ragged-batch", 0, lambda t: t[:, :, :-1]),
    ("attention-ragged-batch", 2, lambda t: t[:, :-1]),
    ("attention-ragged-batch", 3, lambda t: t[:, :4]),
    ("attention-ragged-batch", 5, lambda t: t[:1]),
    ("write", 0, lambda pools: pools[:1]),
    ("write", 2, lambda rows: [rows[0], rows[1].double()]),
    ("write", 3, lambda t: t.long()),
]


@pytest.mark.parametrize("name, index, change", WRONG)
def test_errors_are_those_of_the_reference(name, index, change):
    op, args = CASES[name]()
    args[index] = change(args[index])
    messages = []
    for namespace in (ops, reference):
        with pytest.raises(ValueError) as caught:
            getattr(namespace, op)(*args)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "name, index, value",
    [("rope-ragged", 7, 12), ("rope-ragged", 7, -1), ("rotate-ragged", 2, 33), ("rotate-ragged", 2, -2)]
    + [("attention-ragged-batch", 5, 16), ("write", 1, 40), ("write", 3, -1), ("write", 3, 40)],
)
def test_integers_that_point_outside_are_refused_and_nothing_is_written(name, index, value):
    op, args = CASES[name]()
    args[index].view(-1)[1] = value
    before = each(args, torch.clone)
    with pytest.raises(ValueError, match=f": expected values from 0 to .*, got {value}$"):
        getattr(ops, op)(*args)
    assert all(torch.equal(a, b) for a, b in zip(flat(args), flat(before), strict=True))


def test_a_forked_process_computes_too():
    """The threads of the parent do not exist in the child: waiting for them would never end."""
    torch.set_num_threads(2)
    try:
        op, args = CASES["attention-12801"]()
        want = ops.memory_attention(*args)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            same = relative_difference(ops.memory_attention(*args), want) < 1e-5
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)


def relative_difference(a, b):
    return (a - b).abs().max() / b.abs().max()


def test_unknown_instruction_sets_are_refused():
    with pytest.raises(ValueError, match="isa: expected one of"):
        native.set_isa("abacus")
