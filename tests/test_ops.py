"""The registered ops: schema, fake implementation, dispatch, torch.compile."""

import pytest
import torch
from torch.library import opcheck

from memkernel import _check, ops, reference

NAMES = [
    "add_rms_norm_",
    "draw_ranks",
    "linear",
    "memory_attention",
    "memory_write_",
    "rms_norm",
    "rope_write_",
    "rotate_memory_",
    "swiglu",
]


def arguments(name):
    """One valid call of each op, fresh tensors each time."""
    torch.manual_seed(1)
    cos, sin = torch.rand(2, 32, 8)
    start = torch.tensor([1, 4], dtype=torch.int32)
    rank = torch.stack([torch.randperm(10), torch.randperm(10)]).int()
    return {
        "add_rms_norm_": (torch.randn(2, 16), torch.randn(2, 16), torch.rand(16), 1e-5),
        "draw_ranks": (torch.tensor([3, 4]), 2, 10, 3, False),
        "linear": (torch.randn(2, 16), torch.randn(5, 16)),
        "memory_attention": (
            torch.randn(2, 3, 4, 16),
            *torch.randn(2, 1, 7, 2, 16),
            *torch.randn(2, 2, 8, 2, 16),
            start,
        ),
        "memory_write_": ([torch.randn(2, 10, 4)], rank, [torch.randn(2, 3, 4)], torch.tensor([[1, 5, 2]] * 2).int()),
        "rms_norm": (torch.randn(2, 16), torch.rand(16), 1e-5),
        "rope_write_": (
            *torch.randn(2, 2, 8, 2, 16),
            torch.randn(2, 2, 4, 16),
            *torch.randn(2, 2, 3, 2, 16),
            cos,
            sin,
            start,
            2,
        ),
        "rotate_memory_": (torch.zeros(2, 10, 2, 16), torch.randn(2, 10, 2, 16), rank, cos, sin, 1),
        "swiglu": (torch.randn(2, 16),),
    }[name]


def tensors_of(values):
    return [
        t for value in values for t in (value if isinstance(value, list) else [value]) if isinstance(t, torch.Tensor)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    opcheck(getattr(ops, name), arguments(name))


@pytest.mark.parametrize("name", NAMES)
def test_dispatches_to_the_same_result_as_the_reference(name):
    """To the rounding of a kernel where there is one; tests/test_native.py is about those."""
    mine, theirs = arguments(name), arguments(name)
    got, want = getattr(ops, name)(*mine), getattr(reference, name)(*theirs)
    for a, b in zip(tensors_of([got, *mine]), tensors_of([want, *theirs]), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-5 if a.is_floating_point() else 0, atol=1e-6)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_strided_input_gives_the_strides_that_the_fake_promises(name):
    op, rest = getattr(ops, name), arguments(name)[1:]
    x = torch.randn(4, 3, 16).transpose(0, 1)
    assert op(x, *rest).is_contiguous()
    assert torch.equal(op(x, *rest), op(x.contiguous(), *rest))
    opcheck(op, (x, *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["memory_attention", "rope_write_"])
def test_queries_that_lie_otherwise_give_the_strides_that_the_fake_promises(name, dtype):
    index = {"memory_attention": 0, "rope_write_": 2}[name]
    args = [t.to(dtype) if t.is_floating_point() and t.ndim > 2 else t for t in arguments(name)[:-1]]
    args.append(arguments(name)[-1])
    plain = getattr(ops, name)(*args)
    args[index] = args[index].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # the tokens of a number together
    assert getattr(ops, name)(*args).is_contiguous()
    assert torch.equal(getattr(ops, name)(*args), plain)
    opcheck(getattr(ops, name), tuple(args))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("draw_ranks", "swiglu")])
def test_a_meta_tensor_among_others_is_refused(name):
    """PyTorch then calls the fake, which computes nothing."""
    args = list(arguments(name))
    args[1] = args[1].to("meta")
    with pytest.raises(ValueError, match="expected .* on (cpu|meta), got "):
        getattr(ops, name)(*args)


def test_indices_are_read_on_the_cpu_only():
    _check.expect_below("start", torch.empty(2, dtype=torch.int32, device="meta"), lambda: pytest.fail("was asked for"))


def test_fakes_check_shapes():
    with pytest.raises(ValueError, match="^weight: expected "):
        ops.rms_norm(torch.empty(2, 16, device="meta"), torch.empty(8, device="meta"), 1e-5)


@pytest.mark.parametrize("namespace", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("draw_ranks", "memory_write_")])
def test_numbers_that_are_not_floats_are_refused(name, namespace):
    args = [arg.to(torch.int32) if isinstance(arg, torch.Tensor) else arg for arg in arguments(name)]
    with pytest.raises(ValueError, match="expected one of .*torch.float16.*, got torch.int32"):
        getattr(namespace, name)(*args)


@pytest.mark.parametrize("dims", [9, 70])
def test_a_tensor_may_have_many_dimensions(dims):
    x, weight = torch.randn(2, 16), torch.rand(16)
    many = x.as_strided([1] * (dims - 2) + [2, 16], [32] * (dims - 2) + [16, 1])
    assert torch.equal(ops.rms_norm(many, weight, 1e-5).flatten(), ops.rms_norm(x, weight, 1e-5).flatten())


def test_sizes_that_are_known_at_run_time_only_compile_whole():
    def normed(residual, kept, x, weight):
        residual = residual[kept]
        return ops.add_rms_norm_(residual, x[kept], weight, 1e-5)

    args = torch.randn(6, 16), torch.arange(6) % 2 == 0, torch.randn(6, 16), torch.rand(16)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(normed, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*args), normed(*args))


def test_longer_tables_and_other_offsets_need_no_further_compilation():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *args: ops.rope_write_(*args), fullgraph=True, dynamic=True, backend=count)
    for longer, offset in ((0, 5), (8, 6), (64, 30)):
        args = list(arguments("rope_write_"))
        args[5:7] = (torch.cat([table, torch.rand(longer + offset, 8)]) for table in args[5:7])
        args[8] = offset
        assert torch.equal(compiled(*args), ops.rope_write_(*args))
    assert len(graphs) == 1


def test_the_reference_can_be_vmapped():
    query, memory_key, memory_value, key, value, start = arguments("memory_attention")
    queries = torch.stack([query, 2 * query])
    rest = (memory_key, memory_value, key, value)
    got = torch.func.vmap(lambda q, s: reference.memory_attention(q, *rest, s))(queries, torch.stack([start, start]))
    torch.testing.assert_close(got, torch.stack([reference.memory_attention(q, *rest, start) for q in queries]))


@pytest.mark.parametrize("namespace", [ops, reference], ids=["ops", "reference"])
def test_degenerate_shapes(namespace):
    for name, index, wrong in (
        ("rms_norm", 0, torch.tensor(1.0)),
        ("swiglu", 0, torch.tensor(1.0)),
        ("linear", 0, torch.tensor(1.0)),
        ("memory_attention", 1, torch.randn(0, 7, 2, 16)),
        ("rotate_memory_", 0, torch.randn(2, 10, 2, 15)),
        ("rope_write_", 0, torch.randn(2, 8, 2, 15)),
    ):
        args = list(arguments(name))
        args[index] = wrong
        with pytest.raises(ValueError, match="^(x|gate_up|query|rotated|cache_key): expected "):
            getattr(namespace, name)(*args)
    nothing = torch.randn(2, 3, 4, 0), *torch.randn(4, 2, 3, 2, 0), torch.zeros(2, dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        cast = [t.to(dtype) if t.is_floating_point() else t for t in nothing]
        assert namespace.memory_attention(*cast).shape == (2, 3, 4, 0)


def test_every_reference_op_is_registered_and_no_other():
    public = {
        name for name, value in vars(reference).items() if callable(value) and value.__module__ == reference.__name__
    }
    assert {name for name in public if not name.startswith("_")} == set(NAMES)
    assert {name for name in vars(ops) if hasattr(getattr(ops, name), "_schema")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name):
    """aot_eager functionalizes the in-place ops: results and writes must survive it."""
    op = getattr(ops, name)
    torch._dynamo.reset()  # it compiles one function for 8 ops at most
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")
    mine, theirs = arguments(name), arguments(name)
    got, want = compiled(*mine), op(*theirs)
    assert (got is None and want is None) or torch.equal(got, want)
    for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True):
        assert torch.equal(a, b)


def test_a_module_that_embeds_the_ops_compiles_whole():
    """Inductor, as another serving stack would embed them: norm, rotation into a cache, attention over a memory."""

    def attend(x, weight, projection, cache_key, cache_value, memory_key, memory_value, cos, sin, start):
        q, k, v = (ops.rms_norm(x, weight, 1e-5) @ projection).unflatten(-1, (8, 16)).split([4, 2, 2], dim=2)
        q = ops.rope_write_(cache_key, cache_value, q, k, v, cos, sin, start, 7)
        return ops.memory_attention(q, memory_key, memory_value, cache_key, cache_value, start).flatten(2)

    def inputs():
        torch.manual_seed(2)
        # Storages of their own: torch 2.11's Inductor reads beyond two written views of one tensor.
        cache, memory = [torch.zeros(2, 8, 2, 16) for _ in range(2)], torch.randn(2, 1, 7, 2, 16)
        table, start = torch.rand(2, 32, 8), torch.tensor([1, 4], dtype=torch.int32)
        return torch.randn(2, 3, 32), torch.rand(32), torch.randn(32, 128), *cache, *memory, *table, start

    mine, theirs = inputs(), inputs()
    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(*mine), attend(*theirs))
    torch.testing.assert_close(mine[3], theirs[3])  # the cache was written


def test_reference_is_differentiable():
    """Training goes through the reference: gradients of attention, norm and SwiGLU agree with finite differences."""
    query, memory_key, memory_value, key, value, start = (t.double() for t in arguments("memory_attention"))
    start = start.int()
    tensors = [t[..., :4].clone().requires_grad_() for t in (query, memory_key, memory_value, key, value)]
    assert torch.autograd.gradcheck(lambda *args: reference.memory_attention(*args, start), tensors, fast_mode=True)
    x, weight = (t.double().requires_grad_() for t in arguments("rms_norm")[:2])
    assert torch.autograd.gradcheck(lambda x, w: reference.swiglu(reference.rms_norm(x, w, 1e-5)), (x, weight))
