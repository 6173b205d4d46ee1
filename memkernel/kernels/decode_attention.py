"""Attention of few query rows per sequence: a decode step, or a short prompt, of many sequences on few pools.

The memory's bytes are what counts: 2 M G D numbers a pool, to be read once. So all query rows of a (pool, key/value
head), of all its sequences, are packed into tall tiles and multiplied with a part of the memory; the sequences' own
rows are other programs of the same launch; and a second launch merges the parts. The parts are as many as fill the
chip. Programs with the same part of the memory, for all heads and tiles, are neighbours: they read it from the cache,
and whole rows of it from memory.

The launches depend on shapes only. How many own rows there are is read on the device: each part takes its share of
them, so a cache of any capacity is evenly divided, and a part without rows says so by an lse of -inf.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from memkernel.kernels.tiles import Chip, Tile

MOST_ROWS = 64  # query rows of a (sequence, key/value head) up to which packing sequences together pays
OWN_BLOCKS = 8  # least blocks of capacity that are worth a part: caches are seldom full, and an empty part costs too


@triton.jit
def _attend_packed(
    query_ptr, query_stride, key, key_stride, value, value_stride, out_ptr, lse_ptr,
    batch, head, part, split, splits, rows, first_sequence, sequences, start, first_packed, B, T, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of `sequences` sequences' packed query rows against a share of `rows` rows.

    All queries see the first `start` of them, and token t sees t + 1 more where there are more.
    """
    Q: tl.constexpr = H // G
    packed_X = first_packed + tl.arange(0, BLOCK_X)
    is_row_X = packed_X < sequences * T * Q
    b_X, t_X, h_X = locate(packed_X, T, H, G)
    b_X += first_sequence
    h_X += head * Q
    query_XD = load_query(query_ptr, query_stride, b_X, t_X, h_X, is_row_X, D)
    acc_XD, sum_X, max_X = no_keys(BLOCK_X, D)
    first, last = share(rows, split, splits, BLOCK_K)
    acc_XD, sum_X, max_X = attend(
        acc_XD, sum_X, max_X, query_XD, key, key_stride, value, value_stride,
        batch, head, first, last, tl.minimum(start + t_X + 1, rows), start, scale, BLOCK_K, EVEN, False,
    )  # fmt: skip
    row_X = ((part * B + b_X).to(tl.int64) * T + t_X) * H + h_X
    store(out_ptr, lse_ptr, row_X, is_row_X, acc_XD, sum_X, max_X, True)


@triton.jit(do_not_specialize=["B", "T", "M", "S", "P", "memory_tiles", "memory_splits", "own_tiles", "own_splits"])
def decode_kernel(
    query_ptr,  # [B, T, H, D]; strides of the first three, as of all that follow
    query_stride,
    memory_key_ptr,  # [P, M, G, D]
    memory_key_stride,
    memory_value_ptr,
    memory_value_stride,
    key_ptr,  # [B, S, G, D]
    key_stride,
    value_ptr,
    value_stride,
    start_ptr,  # [B] int32
    mean_ptr,  # [memory_splits + own_splits, B, T, H, D] float32, written
    lse_ptr,  # [memory_splits + own_splits, B, T, H] float32, written
    B,
    T,
    M,
    S,
    P,
    memory_tiles,
    memory_splits,
    own_tiles,
    own_splits,
    scale,  # times log2(e)
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_X_OWN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0)
    memory_programs = P * memory_splits * G * memory_tiles
    if program < memory_programs:
        head = program // memory_tiles % G
        split = program // memory_tiles // G % memory_splits
        pool = program // memory_tiles // G // memory_splits
        N = B // P
        _attend_packed(
            query_ptr, query_stride, memory_key_ptr, memory_key_stride, memory_value_ptr, memory_value_stride,
            mean_ptr, lse_ptr, pool, head, split, split, memory_splits, M, pool * N, N, M,
            program % memory_tiles * BLOCK_X, B, T, scale, H, G, D, BLOCK_X, BLOCK_K, EVEN,
        )  # fmt: skip
    else:
        program -= memory_programs
        head = program // own_tiles % G
        split = program // own_tiles // G % own_splits
        b = program // own_tiles // G // own_splits
        start = tl.load(start_ptr + b)
        _attend_packed(
            query_ptr, query_stride, key_ptr, key_stride, value_ptr, value_stride,
            mean_ptr, lse_ptr, b, head, memory_splits + split, split, own_splits, min(start + T, S), b, 1, start,
            program % own_tiles * BLOCK_X_OWN, B, T, scale, H, G, D, BLOCK_X_OWN, BLOCK_K, False,
        )  # fmt: skip


def decode_attention(
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    tile: Tile,
    memory_splits: int,
    own_splits: int,
) -> Tensor:
    """`memory_attention` for any number of query rows; last dimensions contiguous, arguments not checked."""
    B, T, H, D = query.shape
    P, M, G, _ = memory_key.shape
    S, Q = key.shape[1], H // G
    memory_splits = memory_splits if M else 0
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    mean, lse = partials(memory_splits + own_splits, out)
    own_rows = min(tile.rows, max(16, tiles.next_power_of_2(T * Q)))
    memory_tiles, own_tiles = tiles.cdiv(B // P * T * Q, tile.rows), tiles.cdiv(T * Q, own_rows)
    grid = (P * memory_splits * G * memory_tiles + B * own_splits * G * own_tiles,)
    arguments = [x for t in (query, memory_key, memory_value, key, value) for x in (t, t.stride()[:3])]
    decode_kernel[grid](
        *arguments, start, mean, lse, B, T, M, S, P, memory_tiles, memory_splits, own_tiles, own_splits,
        D**-0.5 * LOG2_E, H=H, G=G, D=D, BLOCK_X=tile.rows, BLOCK_X_OWN=own_rows, BLOCK_K=tile.keys,
        EVEN=M % tile.keys == 0, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    combine(mean, lse, out)
    return out


def plan_decode(query: Tensor, memory_key: Tensor, key: Tensor, chip: Chip) -> tuple[Tile, int, int]:
    """The tile and the parts of memory and of own rows that `decode_attention` takes for these shapes."""
    B, T, H, D = query.shape
    P, M, G, _ = memory_key.shape
    rows = T * (H // G)
    packed = B // P * rows
    tile = tiles.tile(chip.family, query.itemsize, D, min(128, max(16, tiles.next_power_of_2(packed))))
    slots = chip.processors * tile.programs
    blocks, own_blocks = tiles.cdiv(M, tile.keys), tiles.cdiv(key.shape[1], tile.keys * OWN_BLOCKS)
    least, own_least = (tiles.least_splits(rows, query.itemsize) for rows in (M, key.shape[1]))
    memory_splits = tiles.split_count(P * G * tiles.cdiv(packed, tile.rows), blocks, slots, least)
    return tile, memory_splits, tiles.split_count(B * G, own_blocks, slots, own_least)
