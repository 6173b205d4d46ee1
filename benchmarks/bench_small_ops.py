"""The ops between the matrix products, on the rows of one prompt, with cold caches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lab import OP_BOUND, Case, Lab
from benchmarks.shapes import Work
from benchmarks.timing import Contender
from memkernel import huge_pages, ops, reference

CONTENDERS = ["memkernel", "reference", "pytorch"]
EPS = 1e-5


def case(lab: Lab, call, pytorch, inputs: list[Tensor], read: list[Tensor], written: list[Tensor]) -> Case:
    """call(namespace, *inputs) and pytorch(*inputs) give the tensors to compare; both may write to `inputs`."""

    def contender(function) -> Contender:
        mine = [huge_pages.copy(x, x.device) for x in inputs]  # in pages like those of a model's weights
        return Contender(call=lambda: function(*mine), output=lambda: function(*(x.clone() for x in inputs)))

    def with_ops(namespace) -> Contender:
        return contender(lambda *given: call(namespace, *given))

    tables = (lab.config.head_size // 2,)  # RoPE's cosines and sines stay float32
    wide = [x if x.shape[-1:] == tables else x.double() for x in inputs]
    return Case(
        builders={
            "memkernel": lambda: with_ops(ops),
            "reference": lambda: with_ops(reference),
            "pytorch": lambda: contender(pytorch),
        },
        truth=call(reference, *wide),
        bound=OP_BOUND[lab.dtype],
        work=Work(sum(x.nbytes for x in read), sum(x.nbytes for x in written)),
        cold=True,
        budget=0.5,
    )


def add_rms_norm(lab: Lab, T: int) -> Case:
    E = lab.config.hidden_size
    inputs = [lab.random(T, E, seed=0), lab.random(T, E, seed=1), lab.random(E, seed=2)]

    def pytorch(residual, x, weight):
        residual += x
        return [F.rms_norm(residual, (E,), weight, EPS), residual]

    def ours(namespace, residual, x, weight):
        return [namespace.add_rms_norm_(residual, x, weight, EPS), residual]

    return case(lab, ours, pytorch, inputs, read=inputs, written=inputs[:2])


def swiglu(lab: Lab, T: int) -> Case:
    inputs = [lab.random(T, 2 * lab.config.intermediate_size)]

    def pytorch(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return [F.silu(gate) * up]

    def ours(namespace, gate_up):
        return [namespace.swiglu(gate_up)]

    return case(lab, ours, pytorch, inputs, read=inputs, written=[inputs[0][:, ::2]])


def rope_write(lab: Lab, T: int) -> Case:
    config = lab.config
    H, G, D = config.num_heads, config.num_kv_heads, config.head_size
    fused = lab.random(1, T, H + 2 * G, D)
    offset = config.memory_rows
    cos, sin = config.rope.table(offset + T + 1, D, lab.device)
    start = torch.ones(1, dtype=torch.int32, device=lab.device)
    caches = [lab.random(1, T + 1, G, D, seed=i) for i in (1, 2)]

    def ours(namespace, cache_key, cache_value, fused, cos, sin):
        q, k, v = fused.split([H, G, G], dim=2)
        rotated = namespace.rope_write_(cache_key, cache_value, q, k, v, cos, sin, start, offset)
        return [rotated, cache_key[:, 1:], cache_value[:, 1:]]

    def pytorch(cache_key, cache_value, fused, cos, sin):
        """Rotation by halves as in transformers, then a copy into the cache."""
        q, k, v = fused.split([H, G, G], dim=2)
        cos, sin = (torch.cat([table[offset + 1 : offset + 1 + T]] * 2, dim=-1)[None, :, None] for table in (cos, sin))

        def rotate(x):
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-second, first], dim=-1) * sin

        cache_key[:, 1:], cache_value[:, 1:] = rotate(k), v
        return [rotate(q).to(q.dtype), cache_key[:, 1:], cache_value[:, 1:]]

    tables = [cos[:T], sin[:T]]
    return case(lab, ours, pytorch, [*caches, fused, cos, sin], read=[fused, *tables], written=[fused])


def linear(lab: Lab, T: int) -> Case:
    """The MLP's last product: of one row bound by reading the weights, of 256 by multiplying."""
    config = lab.config
    inputs = [lab.random(T, config.intermediate_size, seed=0)]
    inputs.append(lab.random(config.hidden_size, config.intermediate_size, seed=1))

    def ours(namespace, x, weight):
        return [namespace.linear(x, weight)]

    built = case(lab, ours, lambda x, weight: [F.linear(x, weight)], inputs, read=inputs, written=[])
    return replace(built, work=built.work + Work(flop=2 * T * inputs[1].numel()))


def rotate_memory(lab: Lab) -> Case:
    """Not of the prompt: the refresh of every layer's rotated keys, which the first read after an update pays."""
    config = lab.config
    D = config.head_size
    memory = lab.engine.memory
    cos, sin = config.rope.table(config.memory_rows + 1, D, lab.device)
    inputs = [torch.empty_like(memory.key), memory.key, cos, sin]

    def ours(namespace, rotated, key, cos, sin):
        namespace.rotate_memory_(rotated, key, memory.rank, cos, sin, 1)
        return [rotated]

    def pytorch(rotated, key, cos, sin):
        position = memory.rank.long() + 1
        cos, sin = (torch.cat([table[position]] * 2, dim=-1).unsqueeze(2) for table in (cos, sin))
        first, second = key.chunk(2, dim=-1)
        rotated.copy_(key * cos + torch.cat([-second, first], dim=-1) * sin)
        return [rotated]

    return case(lab, ours, pytorch, inputs, read=[memory.key, memory.rank, cos, sin], written=[memory.key])


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("T", [1, 512], ids="T{}".format)
@pytest.mark.parametrize("op", [add_rms_norm, swiglu, rope_write], ids=lambda op: op.__name__)
def bench_small_op(race, contender, op, T):
    race(op.__name__, {"T": T}, contender, lambda lab: op(lab, T))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("T", [1, 4, 8, 16, 32, 64, 256], ids="T{}".format)
def bench_linear(race, contender, T):
    race("linear", {"T": T}, contender, lambda lab: linear(lab, T))


@pytest.mark.parametrize("contender", CONTENDERS)
def bench_rotate_memory(race, contender):
    race("rotate_memory", {}, contender, rotate_memory)
