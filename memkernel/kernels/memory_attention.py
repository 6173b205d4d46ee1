"""Attention of text over a shared memory and the sequence's own rows, in one pass and without a mask tensor.

4 (M + S) D FLOP a query row, so long prompts are bound by the matrix rate and the kernel by how well it feeds it. A
program takes `Tile.rows` query rows of one (sequence, key/value head): the heads of a group are packed with the tokens,
so keys and values are never expanded. It walks over the memory's rows, which all of its queries see (no mask, and no
test for a tail where M is a multiple of the tile), then over the sequence's own rows, masked in the few blocks at the
diagonal only. Neighbouring programs walk over the same rows at the same time, and share them through the cache.

Where there are fewer tiles than processors, as for short prompts, the keys are split and the parts merged. Few query
rows are left to `decode_attention`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memkernel import _check, reference
from memkernel.kernels import tiles
from memkernel.kernels.attention_tile import (
    LOG2_E,
    attend,
    combine,
    load_query,
    locate,
    no_keys,
    partials,
    share,
    store,
)
from memkernel.kernels.decode_attention import MOST_ROWS, decode_attention, plan_decode
from memkernel.kernels.tiles import Chip, Tile

HEAD_SIZES = (16, 32, 64, 128)


@triton.jit(do_not_specialize=["B", "T", "M", "S", "N", "splits"])
def prefill_kernel(
    query_ptr,  # [B, T, H, D]; strides of the first three, as of all that follow
    query_stride,
    memory_key,  # [P, M, G, D], or with TMA a descriptor of [P, G, M, D]
    memory_key_stride,
    memory_value,
    memory_value_stride,
    key,  # [B, S, G, D], or with TMA a descriptor of [B, G, S, D]
    key_stride,
    value,
    value_stride,
    start_ptr,  # [B] int32
    out_ptr,  # [splits, B, T, H, D], written
    lse_ptr,  # [splits, B, T, H] float32, written if PARTIAL
    B,
    T,
    M,
    S,
    N,  # sequences of a pool
    splits,
    scale,  # times log2(e)
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    Q: tl.constexpr = H // G
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_X  # the last tokens see most: start with them
    head = tl.program_id(1)
    b = tl.program_id(2) % B
    split = tl.program_id(2) // B
    packed_X = first_row + tl.arange(0, BLOCK_X)
    is_row_X = packed_X < T * Q
    _, t_X, h_X = locate(packed_X, T, H, G)
    h_X += head * Q
    b_X = tl.zeros_like(t_X) + b
    query_XD = load_query(query_ptr, query_stride, b_X, t_X, h_X, is_row_X, D)
    acc_XD, sum_X, max_X = no_keys(BLOCK_X, D)

    first, last = share(M, split, splits, BLOCK_K)
    acc_XD, sum_X, max_X = attend(
        acc_XD, sum_X, max_X, query_XD, memory_key, memory_key_stride, memory_value, memory_value_stride,
        b // N, head, first, last, M + tl.zeros_like(t_X), M, scale, BLOCK_K, EVEN, TMA,
    )  # fmt: skip

    start = tl.load(start_ptr + b)
    last_token = min(first_row + BLOCK_X - 1, T * Q - 1) // Q
    first, last = share(min(start + last_token + 1, S), split, splits, BLOCK_K)
    acc_XD, sum_X, max_X = attend(
        acc_XD, sum_X, max_X, query_XD, key, key_stride, value, value_stride,
        b, head, first, last, start + t_X + 1, start + first_row // Q + 1, scale, BLOCK_K, False, TMA,
    )  # fmt: skip

    row_X = ((split * B + b_X).to(tl.int64) * T + t_X) * H + h_X
    store(out_ptr, lse_ptr, row_X, is_row_X, acc_XD, sum_X, max_X, PARTIAL)


def _descriptors_fit(*tensors: Tensor) -> bool:
    """Whether the copy engine can address these: 16-bit numbers, addresses and strides multiples of 16 bytes."""
    return all(
        t.itemsize == 2 and t.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def prefill_attention(
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    tile: Tile,
    splits: int,
    tma: bool,
) -> Tensor:
    """`memory_attention` for T H / G query rows of any number; last dimensions contiguous, arguments not checked."""
    B, T, H, D = query.shape
    P, M, G, _ = memory_key.shape
    S = key.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    written, lse = partials(splits, out) if splits > 1 else (out, None)
    if M == 0:
        memory_key, memory_value = key, value  # not read, but a descriptor needs rows
    sources = [memory_key, memory_value, key, value]
    strides = [t.stride()[:3] for t in sources]
    if tma:
        sources = [TensorDescriptor.from_tensor(t.transpose(1, 2), [1, 1, tile.keys, D]) for t in sources]
    arguments = [x for pair in zip(sources, strides, strict=True) for x in pair]
    grid = (tiles.cdiv(T * (H // G), tile.rows), G, B * splits)
    prefill_kernel[grid](
        query, query.stride()[:3], *arguments, start, written, lse, B, T, M, S, B // P, splits, D**-0.5 * LOG2_E,
        H=H, G=G, D=D, BLOCK_X=tile.rows, BLOCK_K=tile.keys, EVEN=M % tile.keys == 0, TMA=tma, PARTIAL=splits > 1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        combine(written, lse, out)
    return out


def plan_prefill(query: Tensor, rows: list[Tensor], chip: Chip) -> tuple[Tile, int, bool]:
    """The tile, the parts of the keys, and whether the copy engine loads them; `rows` as in `prefill_attention`."""
    B, T, H, D = query.shape
    M, G, S = *rows[0].shape[1:3], rows[2].shape[1]
    tile = tiles.tile(chip.family, query.itemsize, D, "prefill")
    programs = tiles.cdiv(T * (H // G), tile.rows) * G * B
    blocks = tiles.cdiv(M, tile.keys) + tiles.cdiv(S, tile.keys)
    least = tiles.least_splits(M + S, query.itemsize)
    splits = tiles.split_count(programs, blocks, chip.processors * tile.programs, least)
    return tile, splits, chip.family in tiles.HAS_TMA and _descriptors_fit(*rows)


def memory_attention(
    query: Tensor, memory_key: Tensor, memory_value: Tensor, key: Tensor, value: Tensor, start: Tensor
) -> Tensor:
    """See `memkernel.reference.memory_attention`, which serves float64 and other head sizes than HEAD_SIZES.

    Nothing is read back to the host, and what is launched depends on shapes and strides only: calls can be captured in
    a CUDA graph. Repeated calls are equal bit for bit.
    """
    given = (query, memory_key, memory_value, key, value, start)
    _check.memory_attention(*given)
    _, T, H, D = query.shape
    if query.dtype == torch.float64 or D not in HEAD_SIZES or query.numel() == 0:
        return reference.memory_attention(*given)
    query, *rows = (t if t.stride(-1) == 1 else t.contiguous() for t in given[:-1])
    start, chip = start.contiguous(), tiles.chip(query.device)
    with torch.cuda.device_of(query):
        if T * (H // key.shape[2]) <= MOST_ROWS:
            return decode_attention(query, *rows, start, *plan_decode(query, memory_key, key, chip))
        return prefill_attention(query, *rows, start, *plan_prefill(query, rows, chip))
