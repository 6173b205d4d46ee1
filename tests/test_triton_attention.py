"""Attention over memory in Triton: both kernels, whole and split, on the same inputs against the reference in float64.

On a CUDA device for real, elsewhere in Triton's interpreter (see tests/test_triton.py). Every argument is a view into
a buffer of NaN, so that a read outside of it shows; own rows that no query sees hold large finite numbers; and the own
row of each query outweighs all others, so that a limit off by one shows too.
"""

import numpy as np
import pytest
import torch

from memkernel import reference
from tests.cases import CASES, attention, cast
from tests.compare import assert_no_worse

triton = pytest.importorskip("triton", reason="needs Triton")
from memkernel.kernels import tiles  # noqa: E402 - these import triton
from memkernel.kernels.decode_attention import decode_attention, plan_decode  # noqa: E402
from memkernel.kernels.memory_attention import memory_attention, plan_prefill, prefill_attention  # noqa: E402
from memkernel.kernels.tiles import Chip, Tile  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
pytestmark = pytest.mark.skipif(
    not CUDA and triton.__version__ < "3.9" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton before 3.9 fails with numpy 2.4",
)


def prefill(rows, keys, splits, tma=False):
    return lambda *args: prefill_attention(*args, Tile(rows, keys, 4, 2, 1), splits, tma)


def decode(rows, keys, memory_splits, own_splits):
    return lambda *args: decode_attention(*args, Tile(rows, keys, 4, 2, 1), memory_splits, own_splits)


PATHS = {
    "prefill": prefill(32, 32, 1),
    "prefill-descriptors": prefill(64, 32, 1, tma=True),
    "prefill-5-parts": prefill(16, 16, 5),
    "decode": decode(16, 32, 1, 1),
    "decode-4-and-3-parts": decode(64, 16, 4, 3),
}

# B, P, T, H, G, D, M, S, starts. The last token's row is starts + T - 1; what is left of S is not seen.
SHAPES = {
    "one-token": (1, 1, 1, 4, 1, 16, 64, 8, [7]),
    "one-token-in-an-empty-cache": (2, 1, 1, 2, 2, 16, 33, 40, [0, 39]),
    "two-tokens": (1, 1, 2, 4, 2, 64, 128, 2, [0]),
    "15-tokens": (1, 1, 15, 2, 1, 16, 31, 20, [3]),
    "16-tokens-no-memory": (1, 1, 16, 4, 4, 16, 0, 16, [0]),
    "17-tokens-long-past": (1, 1, 17, 2, 2, 32, 1, 150, [120]),
    "63-tokens-no-memory": (1, 1, 63, 2, 1, 16, 0, 70, [2]),
    "64-tokens": (1, 1, 64, 1, 1, 16, 96, 64, [0]),
    "65-tokens": (1, 1, 65, 3, 1, 16, 97, 66, [1]),
    "unequal-on-one": (3, 1, 5, 6, 2, 16, 48, 60, [0, 17, 55]),
    "pools-of-two": (4, 2, 3, 4, 4, 16, 19, 37, [0, 34, 1, 16]),
    "pool-each": (2, 2, 9, 4, 2, 16, 40, 33, [24, 0]),
    "2049-rows": (1, 1, 2, 2, 1, 16, 2049, 5, [3]),
}


def make(B, P, T, H, G, D, M, S, starts, dtype):
    """Arguments, rounded to `dtype`: the reference sees the same numbers."""
    _, args = attention(B, P, T, H, G, D, M, S, starts)()
    query, _, _, key, value, _ = args
    for b, start in enumerate(starts):
        key[b, start : start + T] = 2 * query[b, :, :: H // G]  # its own query's weight is about e^(2 sqrt(D))
        key[b, start + T :], value[b, start + T :] = 1e4, 1e4
    return cast("memory_attention", args, dtype)


def in_nan(t):
    """A view equal to `t`, on the device, into a buffer of NaN with room on all sides, aligned for vector loads."""
    if not t.is_floating_point():
        return t.to(DEVICE)
    whole = torch.full([n + 2 for n in t.shape[:-1]] + [t.shape[-1] + 32], torch.nan, dtype=t.dtype, device=DEVICE)
    view = whole[tuple(slice(1, 1 + n) for n in t.shape[:-1])][..., 16:-16]
    return view.copy_(t)


def assert_right(name, function, args):
    mine = [in_nan(t) for t in args]
    got = function(*mine)
    assert got.is_contiguous() and got.dtype == args[0].dtype and got.device.type == DEVICE
    assert_no_worse(name, got.cpu(), reference.memory_attention(*cast("", args, torch.float64)), plain(args))
    for a, b in zip(mine, args, strict=True):
        assert torch.equal(a.cpu(), b), "an argument was written"


def plain(args):
    return reference.memory_attention(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path(shape, path, dtype):
    assert_right(f"{shape}, {path}", PATHS[path], make(*SHAPES[shape], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", [prefill(16, 128, 3), decode(16, 128, 3, 2)], ids=["prefill", "decode"])
def test_12801_rows_of_which_some_are_loud(path, dtype):
    """Of a memory of thousands one lost or doubled row must show: a few, at the ends, weigh as much as all others."""
    args = make(2, 1, 1, 2, 1, 16, 12801, 3, [2, 0], dtype)
    for row in (0, 6400, 12799, 12800):
        args[1][0, row] = args[0][row % 2, 0, :1] * 2
    assert_right("12801 rows", path, args)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("attention")])
def test_chosen_path_reads_any_strides(name):
    _, args = CASES[name]()
    strided = [t.mT.contiguous().mT if t.ndim > 1 else torch.stack([t, t], 1)[:, 0] for t in args]
    got, want = (memory_attention(*[t.to(DEVICE) for t in given]) for given in (strided, args))
    if args[0].shape[-1] in (16, 32, 64, 128):
        assert torch.equal(got, want)
    if got.numel():
        assert_no_worse(name, got.cpu(), plain(cast("", args, torch.float64)), plain(args))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("i", [1, 2, 3, 4])
def test_nan_is_not_hidden(i, path):
    """A broken row that a query sees must break its output, whichever part it falls into."""
    args = make(2, 2, 3, 2, 1, 16, 40, 20, [0, 17], torch.float32)
    args[i][0, 1] = torch.nan
    got = PATHS[path](*[t.to(DEVICE) for t in args])
    assert torch.equal(got.isnan().cpu(), plain(args).isnan())


@pytest.mark.parametrize("D, dtype", [(20, torch.float32), (256, torch.float16), (64, torch.float64)])
def test_other_head_sizes_and_float64_are_the_references(D, dtype):
    args = [t.to(DEVICE) for t in make(2, 1, 3, 4, 2, D, 9, 8, [0, 4], dtype)]
    assert torch.equal(memory_attention(*args), plain(args))


@pytest.mark.parametrize("B, T", [(0, 3), (2, 0)])
def test_no_queries(B, T):
    args = make(B, 1, T, 4, 2, 16, 9, 8, [1] * B, torch.float32)
    assert memory_attention(*[t.to(DEVICE) for t in args]).shape == (B, T, 4, 16)


def test_the_memorys_order_and_the_caches_capacity_do_not_matter():
    args = make(1, 1, 70, 2, 2, 16, 50, 90, [10], torch.float32)
    order = torch.randperm(50)
    shuffled = [args[0], args[1][:, order], args[2][:, order], args[3][:, :80], args[4][:, :80], args[5]]
    got, want = (memory_attention(*[t.to(DEVICE) for t in given]) for given in (shuffled, args))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def meta(B, T, M, S, dtype=torch.bfloat16, H=32, G=8, D=128):
    rows = [torch.empty(1, M, G, D, dtype=dtype, device="meta")] * 2
    rows += [torch.empty(B, S, G, D, dtype=dtype, device="meta")] * 2
    return torch.empty(B, T, H, D, dtype=dtype, device="meta"), rows


@pytest.mark.parametrize("family", tiles.TILES)
@pytest.mark.parametrize("T, M", [(17, 12800), (64, 12800), (128, 7680), (640, 12801), (512, 0), (2048, 12800)])
def test_prompts_fill_the_chip(family, T, M):
    """Splitting leaves few processors without work, and splits nothing where there are enough tiles."""
    query, rows = meta(1, T, M, T)
    tile, splits, _ = plan_prefill(query, rows, Chip(family, 132))
    programs = triton.cdiv(4 * T, tile.rows) * 8
    blocks = triton.cdiv(M, tile.keys) + triton.cdiv(T, tile.keys)
    waves = triton.cdiv(programs * splits, 132)
    assert 1 <= splits <= blocks
    if M:
        assert programs * splits / (waves * 132) > 0.7
    if programs > 8 * 132:
        assert splits == 1


@pytest.mark.parametrize("B", [1, 8, 32])
def test_decoding_splits_by_shapes_alone_and_reads_a_pool_once(B):
    query, rows = meta(B, 1, 12800, 4096)
    tile, memory_splits, own_splits = plan_decode(query, rows[0], rows[2], Chip("sm_90", 132))
    assert tile.rows >= 4 * B or tile.rows == 128  # one tile of all sequences' rows: each row of memory is loaded once
    assert 8 * memory_splits > 0.8 * 132 * tile.programs
    assert B * own_splits * 8 <= 2 * 132 * tile.programs


def test_float32_adds_few_keys_at_a_time():
    query, rows = meta(1, 1, 12800, 4096, torch.float32, H=1, G=1)
    for chip in (Chip("sm_90", 1), Chip("sm_90", 132)):
        _, memory_splits, own_splits = plan_decode(query, rows[0], rows[2], chip)
        assert memory_splits * tiles.LONGEST_SUM >= 12800 and own_splits * tiles.LONGEST_SUM >= 4096
        assert plan_prefill(query, rows, chip)[1] * tiles.LONGEST_SUM >= 12800 + 4096


# Sizes that only a GPU can bear.


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("B, T, D", [(1, 512, 128), (1, 60, 64), (2, 129, 128), (1, 1, 128), (32, 1, 128), (8, 16, 64)])
def test_8b_size(B, T, D, dtype):
    assert_right("8B", memory_attention, make(B, 1, T, 8, 2, D, 12801, T + 300, [i % 300 for i in range(B)], dtype))


@needs_cuda
def test_offsets_beyond_32_bits():
    args = make(2, 2, 80, 4, 2, 64, 100, 90, [0, 3], torch.bfloat16)
    mine = [t.to(DEVICE) for t in args]
    far = torch.empty(2, 1 << 31, dtype=torch.bfloat16, device=DEVICE)
    for i in (1, 2):
        view = far[:, i << 20 :].as_strided((2, 100, 2, 64), (1 << 31, 128, 64, 1))
        mine[i] = view.copy_(mine[i])
    for T in (80, 1):
        given = [mine[0][:, :T], *mine[1:]]
        want = [args[0][:, :T], *args[1:]]
        assert_no_worse(f"T {T}", memory_attention(*given).cpu(), plain(cast("", want, torch.float64)), plain(want))


@needs_cuda
@pytest.mark.parametrize("T", [1, 70])
def test_a_captured_call_replays_with_other_lengths(T):
    args = [t.to(DEVICE) for t in make(4, 1, T, 8, 2, 128, 1000, 300, [0, 5, 200, 100], torch.bfloat16)]
    memory_attention(*args)  # compiles, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = memory_attention(*args)
    for starts in ([0, 5, 200, 100], [230, 0, 1, 64]):
        args[-1].copy_(torch.tensor(starts))
        graph.replay()
        assert torch.equal(out, memory_attention(*args))


@needs_cuda
@pytest.mark.parametrize("B, T", [(1, 512), (1, 40), (8, 1)])
def test_repeats_bit_for_bit(B, T):
    """A race would show in some of 200 runs."""
    args = [t.to(DEVICE) for t in make(B, 1, T, 32, 8, 128, 12800, T, [0] * B, torch.bfloat16)]
    want = memory_attention(*args)
    assert all(torch.equal(memory_attention(*args), want) for _ in range(200))
