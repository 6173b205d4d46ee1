"""Calls of the ops but attention that between them launch every kernel configuration shipped, for compile_kernels: at
the shapes of Llama-3-8B and Llama-2-7B, and at ragged ones."""

import torch

from memkernel import kernels


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(dtype, rows, E):
    return lambda: kernels.rms_norm(empty(rows, E, dtype=dtype), empty(E, dtype=dtype), 1e-5)


def add_norm(dtype, rows, E):
    x, weight = empty(rows, E, dtype=dtype), empty(E, dtype=dtype)
    return lambda: kernels.add_rms_norm_(x, x, weight, 1e-5)


def swiglu(dtype, rows, F):
    return lambda: kernels.swiglu(empty(rows, 2 * F, dtype=dtype))


def rope(dtype, B, T, Tq, H, G, D, S=1024):
    def case():
        qkv, cache = empty(B, T, H + 2 * G, D, dtype=dtype), empty(B, S, G, D, dtype=dtype)
        query, key, value = qkv.split([H, G, G], dim=2)
        table = empty(16384, D // 2, dtype=torch.float32)
        start = empty(B, dtype=torch.int32)
        kernels.rope_write_(cache, cache, query[:, T - Tq :], key, value, table, table, start, 12800)

    return case


def rotate(dtype, L, M, G, D):
    def case():
        key, table = empty(L, M, G, D, dtype=dtype), empty(16384, D // 2, dtype=torch.float32)
        kernels.rotate_memory_(key, key, empty(L, M, dtype=torch.int32), table, table, 1)

    return case


def draw(L, M, W, shared=False):
    return lambda: kernels.draw_ranks(empty(2, dtype=torch.int64), L, M, W, shared)


def write(dtype, L, M, W, *shapes):
    def case():
        pools, rows = ([empty(L, n, *shape, dtype=dtype) for shape in shapes] for n in (M, W))
        kernels.memory_write_(pools, empty(L, M, dtype=torch.int32), rows, empty(L, W, dtype=torch.int32))

    return case


CASES = {
    "draw 256 of 12800": draw(32, 12800, 256),
    "draw 256 of 7680, shared": draw(32, 7680, 256, shared=True),
    "draw 3 of 2^31": draw(3, 2**31, 3),
    "draw 1 of 2": draw(1, 2, 1),
    "write of single bytes": write(torch.bool, 1, 1, 1, (1,)),
    "write of ranks alone": write(torch.int16, 3, 40, 7),
    "write of 4 pools, ragged": write(torch.int16, 3, 12801, 7, (), (3,), (5, 3), (4096,)),
} | {
    f"{name} {str(dtype)[6:]}": case(dtype, *sizes)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for name, case, *sizes in [
        ("norm 4096", norm, 512, 4096),
        ("norm 16384", norm, 3, 16384),
        ("norm 100", norm, 1, 100),
        ("add norm 4096", add_norm, 1, 4096),
        ("add norm 16383", add_norm, 3, 16383),
        ("swiglu 14336", swiglu, 1, 14336),
        ("swiglu 101", swiglu, 3, 101),
        ("rope 8B decode", rope, 32, 1, 1, 32, 8, 128),
        ("rope 7B prefill", rope, 1, 512, 512, 32, 32, 128),
        ("rope last queries", rope, 1, 769, 512, 32, 8, 64),
        ("rope ragged", rope, 3, 5, 5, 6, 2, 20),
        ("rotate 8B", rotate, 32, 12800, 8, 128),
        ("rotate 7B", rotate, 32, 7680, 32, 128),
        ("rotate ragged", rotate, 3, 12801, 3, 20),
        ("write 8B", write, 32, 12800, 256, (8, 128), (8, 128)),
        ("write 8B with hidden", write, 32, 12800, 256, (8, 128), (8, 128), (4096,)),
    ]
}
