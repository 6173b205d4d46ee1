"""The CPU kernels against the reference: every op, every instruction set of this machine, one and two threads.

Computed numbers by `assert_no_worse` against the reference in float64; integers and moved rows bit for bit. Arguments
are views into larger buffers, and what surrounds them must survive.
"""

import os
import signal

import pytest
import torch

from memkernel import native, ops, reference
from tests.cases import CASES, COMPUTED, MOVED, SENTINEL, WRONG, cast, each, embedded, flat
from tests.compare import assert_no_worse

pytestmark = pytest.mark.skipif(not native.isas(), reason=native.WHY_NOT or "")


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
        whole, view = embedded(t, dim=1 if op == "linear" else None)  # rows further apart than they are long
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


@pytest.mark.parametrize("namespace", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "name, index, value",
    [("rope-ragged", 7, 12), ("rope-ragged", 7, -1), ("rotate-ragged", 2, 33), ("rotate-ragged", 2, -2)]
    + [("attention-ragged-batch", 5, 16), ("attention-ragged-batch", 5, -1), ("write", 1, 40), ("write", 3, -1)]
    + [("write", 3, 40)],
)
def test_integers_that_point_outside_are_refused_and_nothing_is_written(name, index, value, dtype, namespace):
    op, args = CASES[name]()
    args = cast(op, args, dtype)
    args[index].view(-1)[1] = value
    before = each(args, torch.clone)
    with pytest.raises(ValueError, match=f": expected values from 0 to .*, got {value}$"):
        getattr(namespace, op)(*args)
    assert all(torch.equal(a, b) for a, b in zip(flat(args), flat(before), strict=True))


def test_an_offset_beyond_all_positions_is_refused():
    op, args = CASES["rope-ragged"]()
    args[5:7] = (table[:1] for table in args[5:7])
    args[8] = 2**63 - 1
    with pytest.raises(ValueError, match="^start: expected values from 0 to "):
        getattr(ops, op)(*args)


@pytest.mark.parametrize("namespace", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize(
    "name, index",
    [("add-norm-ragged", 0), ("rotate-ragged", 0), ("rope-ragged", 0), ("rope-ragged", 1), ("write", 0), ("write", 1)],
)
def test_what_shares_memory_with_itself_is_not_written_to(name, index, namespace):
    op, args = CASES[name]()
    wanted = args[index][0] if isinstance(args[index], list) else args[index]
    shared = wanted[:1].expand(wanted.shape)
    args[index] = [shared, *args[index][1:]] if isinstance(args[index], list) else shared
    before = each(args, torch.clone)
    with pytest.raises(ValueError, match="expected elements that share no memory, got strides"):
        getattr(namespace, op)(*args)
    assert all(torch.equal(a, b) for a, b in zip(flat(args), flat(before), strict=True))


def test_no_layers_are_walked_over_where_nothing_is_drawn():
    assert ops.draw_ranks(torch.tensor([7, 3]), 1 << 60, 5, 0, True).shape == (1 << 60, 0)


def test_ranks_that_are_not_distinct_write_nothing_outside_of_the_pool(isa):
    pool, rank = embedded(torch.zeros(1, 400, 16), dim=1)[0], torch.randperm(400, dtype=torch.int32)[None]
    for _ in range(20):
        dropped = torch.randint(400, (1, 256), dtype=torch.int32)
        ops.memory_write_([pool[:, 1:-1]], rank, [torch.ones(1, 256, 16)], dropped)
    assert (pool[:, [0, -1]] == SENTINEL).all() and ((pool[:, 1:-1] == 0) | (pool[:, 1:-1] == 1)).all()


@pytest.mark.parametrize(
    "name", ["attention-five-rows", "attention-twelve-rows", "attention-prefill", "attention-12801"]
)
@pytest.mark.parametrize("size", [2.0**10, 2.0**20, 2.0**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_huge_scores_choose_one_key(name, size, dtype, isa, threads):
    """The largest score takes all the weight, and is not lost to the rounding of a huge exponent."""
    op, args = CASES[name]()
    args = cast(op, args, dtype)
    args[0], args[1], args[3] = (args[i].sign() * size for i in (0, 1, 3))  # sums are exact: equal scores stay equal
    out, exact = ops.memory_attention(*args), reference.memory_attention(*cast(op, args, torch.float64))
    assert_no_worse(name, out, exact, reference.memory_attention(*args))


@pytest.mark.parametrize("name", ["attention-five-rows", "attention-twelve-rows", "attention-prefill"])
@pytest.mark.parametrize("index", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_broken_memory_row_is_not_hidden(name, index, number, dtype, isa):
    op, args = CASES[name]()
    args = cast(op, args, dtype)
    args[index][0, 3, 1, 5] = number
    out, want = ops.memory_attention(*args), reference.memory_attention(*args)
    assert not want.isfinite().all() and torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())


@pytest.mark.parametrize("T", [1, 3, 9], ids=["few", "twelve", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_many_equal_weights_sum_to_one(T, dtype, isa, threads):
    """Equal numbers are rounded the same way each time: in one long float32 sum the errors add up."""
    op, args = CASES["attention-12801"]()
    args[0], args[3], args[4] = (
        args[0][:, :1].repeat(1, T, 1, 1),
        args[3].new_zeros(1, T, 1, 64),
        args[4].new_ones(1, T, 1, 64),
    )
    args[1].zero_()
    args[2].fill_(1)
    args[1][0, 0, 0, :8], args[0][..., :8], args[5][0] = 2.302585, 1, 0  # the first weighs ten times as much
    args = cast(op, args, dtype)
    torch.testing.assert_close(ops.memory_attention(*args), torch.ones_like(args[0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", [f"attention-{which}" for which in ("two-rows", "six-rows", "eleven-rows", "8-on-one")]
)
@pytest.mark.parametrize("index", [3, 4], ids=["key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_broken_row_of_one_sequence_does_not_reach_the_others(name, index, number, dtype, isa):
    op, args = CASES[name]()
    args = cast(op, args, dtype)
    want = ops.memory_attention(*args)
    args[index][0, 0] = number
    out = ops.memory_attention(*args)
    assert not out[0].isfinite().all() and torch.equal(out[1:], want[1:])


@pytest.mark.parametrize("name", ["attention-12801", "linear-panels"])
def test_a_forked_process_computes_too(name):
    """The threads of the parent do not exist in the child: waiting for them would never end."""
    torch.set_num_threads(2)
    try:
        op, args = CASES[name]()
        want = getattr(ops, op)(*args)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            got = getattr(ops, op)(*args)
            torch.set_num_threads(1)  # PyTorch's own ops would wait for those threads
            same = relative_difference(got, want) < 1e-5
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)


def relative_difference(a, b):
    return (a - b).abs().max() / b.abs().max()


def test_unknown_instruction_sets_are_refused():
    with pytest.raises(ValueError, match="isa: expected one of"):
        native.set_isa("abacus")
