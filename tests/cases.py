"""Cases of the ops that every implementation runs: arguments, which of them are written, and how they are varied."""

import torch

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
    "linear-one-row-ragged": linear(1, 2085, 259),
    "linear-long": linear(2, 8192, 64),
    "linear-two-rows": linear(2, 1027, 195),
    "linear-rows": linear(7, 515, 66),
    "linear-no-rows": linear(0, 64, 5),
    "linear-three-rows": linear(3, 1025, 99),
    "linear-few-rows-long": linear(4, 2080, 101),
    "linear-five-rows": linear(5, 2048, 50),
    "linear-six-rows": linear(6, 1029, 195),
    "linear-rows-long": linear(8, 2049, 98),
    "linear-eight-rows": linear(8, 1025, 289),
    "linear-groups-ragged": linear(9, 1025, 49),
    "linear-groups": linear(13, 1100, 51),
    "linear-two-groups": linear(16, 1056, 145),
    "linear-many-groups": linear(24, 1030, 66),
    "linear-panel": linear(31, 1030, 66),
    "linear-panel-odd": linear(25, 1029, 51),
    "linear-short-panel": linear(33, 66, 390),
    "linear-two-panels": linear(65, 514, 403),
    "linear-panels": linear(130, 2076, 437),
    "linear-many-panels": linear(256, 1026, 384),
    "linear-one-word": linear(40, 2, 390),
    "linear-odd": linear(40, 1027, 390),
    "linear-few-outs": linear(70, 65, 34),
    "linear-too-many-rows": linear(257, 66, 390),
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
    "attention-two-rows": attention(2, 1, 1, 2, 2, 64, 66, 5, [0, 4]),
    "attention-three-rows": attention(1, 1, 3, 2, 2, 128, 130, 9, [6]),
    "attention-five-rows": attention(1, 1, 5, 2, 2, 128, 65, 70, [60]),
    "attention-seven-rows": attention(1, 1, 7, 2, 2, 128, 130, 9, [0]),
    "attention-eight-rows": attention(4, 2, 2, 4, 2, 64, 70, 9, [0, 3, 7, 2]),
    "attention-eleven-rows": attention(11, 1, 1, 2, 2, 64, 131, 20, [19, 0, 7, 5, 3, 12, 0, 1, 18, 2, 9]),
    "attention-twelve-rows": attention(1, 1, 3, 8, 2, 64, 150, 9, [5]),
    "attention-thirteen-rows": attention(1, 1, 13, 2, 2, 64, 70, 20, [3]),
    "attention-few-tokens": attention(4, 2, 3, 2, 2, 64, 37, 9, [0, 1, 2, 6]),
    "attention-no-memory": attention(1, 1, 9, 4, 4, 32, 0, 9, [0]),
    "attention-one-row": attention(2, 1, 1, 2, 2, 16, 1, 4, [0, 3]),
    "attention-prefill": attention(1, 1, 65, 4, 2, 64, 257, 70, [5]),
    "attention-ragged-batch": attention(3, 1, 5, 6, 2, 20, 40, 20, [1, 15, 6]),
    "attention-two-pools": attention(4, 2, 3, 6, 2, 16, 11, 9, [0, 1, 2, 6]),
    "attention-8-on-one": attention(8, 1, 1, 8, 2, 128, 513, 6, [0, 1, 2, 3, 4, 5, 0, 1]),
    "attention-three-heads": attention(1, 1, 1, 9, 3, 64, 150, 9, [5]),
    "attention-eight-heads": attention(1, 1, 1, 32, 8, 64, 333, 20, [11]),
    "attention-64-heads": attention(1, 1, 1, 64, 64, 128, 37, 6, [3]),
    "attention-head-blocks": attention(1, 1, 1, 384, 64, 64, 37, 6, [3]),
    "attention-12801": attention(1, 1, 2, 4, 1, 64, 12801, 5, [3]),
    "attention-12801-few": attention(1, 1, 1, 4, 1, 64, 12801, 5, [3]),
    "write": write(3, 40, 7, (2, 16), (5,)),
    "write-nothing": write(2, 12, 0, (4,)),
    "write-no-memory": write(2, 0, 0, (4,)),
    "write-all": write(2, 12, 12, (4,)),
    "write-12801": write(2, 12801, 256, (1, 3)),
}

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


def embedded(t, dim=None):
    """A buffer of sentinels and a view of it that equals `t`, with sentinels before and after in dimension `dim`; by
    default the first, or the second of caches and pools."""
    dim = (0 if t.ndim < 4 else 1) if dim is None else dim
    shape = list(t.shape)
    shape[dim] += 2
    whole = torch.full(shape, SENTINEL, dtype=t.dtype, device=t.device)
    view = whole.narrow(dim, 1, t.shape[dim])
    view.copy_(t)
    return whole, view
