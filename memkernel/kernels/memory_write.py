"""The random-drop write on the device: draw, close the ranks, scatter. Three launches for all layers, no sync.

Bytes at the 8B shape (L 32, W 256, G D 1024, bfloat16, K and V): 33.6 MB of rows read and as many written, about 16 us
at 4.3 TB/s; ranks and their scratch, 6 passes over L M integers, 10 MB that stay in the second-level cache. The rest is
latency: the draw depends on nothing, closing the ranks is serial within a layer, the scatter fills the device.

Nothing here is of a pool's size: the scratch is [L, M] and [L, W] int32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernel import _check, reference

FEISTEL_ROUNDS = tl.constexpr(reference.FEISTEL_ROUNDS)
DRAW_BLOCK = 32  # one warp: lanes wait for each other's cycle walks, so the fewer the better
RANK_BLOCK = 4096
SCATTER_BLOCK = 512  # words of a row: a 2 KB key row in one step of 128 threads, 16 bytes each
SCATTER_POOLS = 3  # keys, values and hidden states go in one launch


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _permute(x, key, HIGH_BITS: tl.constexpr, LOW_BITS: tl.constexpr):
    """The reference's Feistel network, two rounds a step: after both, each half is back in its place."""
    high, low = x >> LOW_BITS, x & ((1 << LOW_BITS) - 1)
    for i in tl.static_range(1, FEISTEL_ROUNDS, 2):
        high = (high ^ _mix(low ^ _mix(key + (0x9E3779B9 * i & 0xFFFFFFFF)))) & ((1 << HIGH_BITS) - 1)
        low = (low ^ _mix(high ^ _mix(key + (0x9E3779B9 * (i + 1) & 0xFFFFFFFF)))) & ((1 << LOW_BITS) - 1)
    return (high << LOW_BITS) | low


@triton.jit
def draw_ranks_kernel(
    state_ptr,  # [2] int64: seed, step
    state_stride,
    drawn_ptr,  # [L, W] int32, written
    W,
    last_rank,  # M - 1
    PER_LAYER: tl.constexpr,  # 1, or 0: every layer has the draw of layer 0
    HIGH_BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    layer = tl.program_id(1)
    seed, step = tl.load(state_ptr), tl.load(state_ptr + state_stride)
    key = _mix((layer * PER_LAYER).to(tl.uint32) + 0x9E3779B9)
    key = _mix(key ^ seed.to(tl.uint32))
    key = _mix(key ^ (seed >> 32).to(tl.uint32))
    key = _mix(key ^ step.to(tl.uint32))
    key = _mix(key ^ (step >> 32).to(tl.uint32))
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    rank_W = _permute(w.to(tl.uint32), key, HIGH_BITS, LOW_BITS)
    walking_W = (rank_W > last_rank) & (w < W)
    while tl.max(walking_W.to(tl.int32), axis=0) > 0:
        rank_W = tl.where(walking_W, _permute(rank_W, key, HIGH_BITS, LOW_BITS), rank_W)
        walking_W = (rank_W > last_rank) & (w < W)
    tl.store(drawn_ptr + layer.to(tl.int64) * W + w, rank_W.to(tl.int32), mask=w < W)


@triton.jit
def close_ranks_kernel(
    rank_ptr,  # [L, M] int32, read and written
    rank_stride_L,
    dropped_ptr,  # [L, W] int32
    closed_ptr,  # [L, M] int32, scratch: the new rank of each old rank
    slot_ptr,  # [L, W] int32, written: the slot that new row w takes
    M,
    W,
    BLOCK: tl.constexpr,
):
    """One program a layer, so that no program reads what another writes. Within it barriers part the passes: a store to
    global memory is seen by the block's other threads after one."""
    layer = tl.program_id(0).to(tl.int64)
    rank_ptr += layer * rank_stride_L
    closed_ptr += layer * M
    dropped_ptr += layer * W
    slot_ptr += layer * W
    offset = tl.arange(0, BLOCK)

    for start in range(0, M, BLOCK):
        tl.store(closed_ptr + start + offset, tl.zeros([BLOCK], tl.int32), mask=start + offset < M)
    tl.debug_barrier()
    for start in range(0, W, BLOCK):
        w = start + offset
        dropped = tl.load(dropped_ptr + w, mask=w < W, other=0)
        tl.store(closed_ptr + dropped, w + 1, mask=w < W)
    tl.debug_barrier()
    survivors = 0
    for start in range(0, M, BLOCK):
        old = start + offset
        mark = tl.load(closed_ptr + old, mask=old < M, other=1)
        survives = (mark == 0).to(tl.int32)
        closed = tl.where(mark == 0, survivors + tl.cumsum(survives, axis=0) - 1, M - W - 1 + mark)
        tl.store(closed_ptr + old, closed, mask=old < M)
        survivors += tl.sum(survives, axis=0)
    tl.debug_barrier()
    for start in range(0, M, BLOCK):
        slot = start + offset
        old = tl.load(rank_ptr + slot, mask=slot < M, other=0)
        closed = tl.load(closed_ptr + old, mask=slot < M, other=0)
        tl.store(rank_ptr + slot, closed, mask=slot < M)
        tl.store(slot_ptr + (closed - (M - W)), slot, mask=(slot < M) & (closed >= M - W))


@triton.jit
def scatter_rows_kernel(
    pool_ptrs,  # a tuple of [L, M, row], written
    row_ptrs,  # a tuple of [L, W, row]
    strides,  # of each pool, in words: (pool's L, pool's M, rows' L, rows' W)
    lengths,  # of each pool's row, in words
    slot_ptr,  # [L, W] int32
    W,
    WORD_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program copies one new row of every pool into its slot, as words: the elements' type does not matter."""
    word_type: tl.constexpr = tl.int32 if WORD_BYTES == 4 else tl.int16 if WORD_BYTES == 2 else tl.int8
    w, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + layer * W + w).to(tl.int64)
    for i in tl.static_range(len(pool_ptrs)):
        pool_L, pool_M, rows_L, rows_W = strides[i]
        to_ptr = pool_ptrs[i].to(tl.pointer_type(word_type)) + layer * pool_L + slot * pool_M
        from_ptr = row_ptrs[i].to(tl.pointer_type(word_type)) + layer * rows_L + w * rows_W
        for start in range(0, lengths[i], BLOCK):
            word = start + tl.arange(0, BLOCK)
            tl.store(to_ptr + word, tl.load(from_ptr + word, mask=word < lengths[i]), mask=word < lengths[i])


def draw_ranks(state: Tensor, layers: int, rows: int, count: int, shared: bool) -> Tensor:
    """See `memkernel.reference.draw_ranks`; seed and step are read on the device, as a captured graph needs."""
    _check.draw_ranks(state, rows, count)
    drawn = torch.empty(layers, count, dtype=torch.int32, device=state.device)
    if drawn.numel():
        bits = max(2, (rows - 1).bit_length())
        grid = (triton.cdiv(count, DRAW_BLOCK), layers)
        draw_ranks_kernel[grid](
            state,
            state.stride(0),
            drawn,
            count,
            rows - 1,
            int(not shared),
            bits // 2,
            bits - bits // 2,
            DRAW_BLOCK,
            num_warps=1,
        )
    return drawn


def memory_write_(pools: list[Tensor], rank: Tensor, rows: list[Tensor], dropped: Tensor) -> None:
    """See `memkernel.reference.memory_write_`. Pools of any dtypes whose rows are contiguous, else the reference's."""
    _check.memory_write_(pools, rank, rows, dropped)
    (L, M), W = rank.shape, dropped.shape[1]
    if not all(pool[0, 0].is_contiguous() for pool in pools if pool.numel()) or (M > 1 and rank.stride(1) != 1):
        return reference.memory_write_(pools, rank, rows, dropped)
    if L == 0 or W == 0:
        return None
    closed, slot = torch.empty_like(rank, memory_format=torch.contiguous_format), rank.new_empty(L, W)
    close_ranks_kernel[(L,)](rank, rank.stride(0), dropped.contiguous(), closed, slot, M, W, RANK_BLOCK, num_warps=16)
    pairs = [(pool, _packed_rows(new)) for pool, new in zip(pools, rows, strict=True) if pool.numel()]
    for i in range(0, len(pairs), SCATTER_POOLS):
        _scatter(pairs[i : i + SCATTER_POOLS], slot)


def _packed_rows(rows: Tensor) -> Tensor:
    return rows if rows[0, 0].is_contiguous() else rows.contiguous()


def _scatter(pairs: list[tuple[Tensor, Tensor]], slot_LW: Tensor) -> None:
    """One launch for the given pools and their new rows. A word is the largest power of two, up to 4 bytes, that
    divides every address; the compiler makes 16-byte vectors of four."""
    addresses, strides, lengths = 0, [], []
    for pool, new in pairs:
        size = pool.element_size()
        strides.append([stride * size for stride in (*pool.stride()[:2], *new.stride()[:2])])
        lengths.append(pool[0, 0].numel() * size)
        for number in (pool.data_ptr(), new.data_ptr(), lengths[-1], *strides[-1]):
            addresses |= number
    word = min(4, addresses & -addresses)
    pools, rows = zip(*pairs, strict=True)
    strides = tuple(tuple(stride // word for stride in of_pool) for of_pool in strides)
    lengths = tuple(length // word for length in lengths)
    L, W = slot_LW.shape
    scatter_rows_kernel[(W, L)](pools, rows, strides, lengths, slot_LW, W, word, SCATTER_BLOCK, num_warps=4)
