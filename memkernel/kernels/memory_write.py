"""The random-drop write on the device: draw, close the ranks, write the rows. Three launches for all layers, no sync.

Bytes at the 8B shape (L 32, W 256, G D 1024, bfloat16, K and V): 33.6 MB of rows read and as many written, about 16 us
at 4.3 TB/s; ranks and their scratch, 4 passes over L M integers, 6.6 MB that stay in the second-level cache. The rest
is three launches and their latencies.

No program of a launch reads what another one writes, and nothing here is of a pool's size: the scratch is [L, M] int32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernel import _check, reference
from memkernel.kernels import tiles

FEISTEL_ROUNDS = tl.constexpr(reference.FEISTEL_ROUNDS)
DRAW_BLOCK = 32  # one warp: lanes wait for each other's cycle walks, so the fewer the better
RANK_BLOCK = 1024
DROPPED_BLOCK = 256
SLOT_BLOCK = 128  # at the 8B shape 2.6 of them take new rows, and there are 3200 programs
WORD_BLOCK = 512  # words of a row: a 2 KB key in one step of 128 threads, 16 bytes each
POOLS = 3  # of a launch: keys, values, hidden states


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
    dropped_ptr,  # [L, W] int32
    closed_ptr,  # [L, M] int32, written: the new rank of each old rank
    M,
    W,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A program closes BLOCK_M ranks of a layer: of the dropped it counts those below its own, and marks its own."""
    first, layer = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64)
    dropped_ptr += layer * W
    closed_ptr += layer * M
    below = 0
    is_dropped_M = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        dropped_W = tl.load(dropped_ptr + w, mask=w < W, other=M)
        below += tl.sum((dropped_W < first).to(tl.int32), axis=0)
        is_mine_W = (dropped_W >= first) & (dropped_W < first + BLOCK_M) & (w < W)
        is_dropped_M += tl.histogram(dropped_W - first, BLOCK_M, mask=is_mine_W)
        tl.store(closed_ptr + dropped_W, M - W + w, mask=is_mine_W)
    rank_M = first + tl.arange(0, BLOCK_M)
    closed_M = rank_M - below - tl.cumsum(is_dropped_M, axis=0)
    tl.store(closed_ptr + rank_M, closed_M, mask=(rank_M < M) & (is_dropped_M == 0))


@triton.jit
def write_rows_kernel(
    rank_ptr,  # [L, M] int32, read and written
    rank_stride_L,
    closed_ptr,  # [L, M] int32; None: `rank` is closed already
    pool_ptrs,  # a tuple of [L, M, row], written
    row_ptrs,  # a tuple of [L, W, row]
    strides,  # of each pool, in words: (pool's L, pool's M, rows' L, rows' W)
    lengths,  # of each pool's row, in words
    M,
    W,
    WORD_BYTES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program gives BLOCK_M slots of a layer their new ranks, and those of dropped rows their new rows, one after the
    other. Rows are copied as words: the elements' type does not matter."""
    word_type: tl.constexpr = tl.int32 if WORD_BYTES == 4 else tl.int16 if WORD_BYTES == 2 else tl.int8
    layer = tl.program_id(1).to(tl.int64)
    slot_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank_ptrs = rank_ptr + layer * rank_stride_L + slot_M
    rank_M = tl.load(rank_ptrs, mask=slot_M < M, other=0)
    if closed_ptr is not None:
        rank_M = tl.load(closed_ptr + layer * M + rank_M, mask=slot_M < M, other=0)
    is_new_M = (rank_M >= M - W) & (slot_M < M)
    slot = tl.min(tl.where(is_new_M, slot_M, M), axis=0)
    if closed_ptr is not None:  # after a reduction, so that every thread has read the old rank
        tl.store(rank_ptrs, rank_M, mask=slot_M < M)
    while slot < M:
        w = tl.sum(tl.where(slot_M == slot, rank_M, 0), axis=0) - (M - W)
        for i in tl.static_range(len(pool_ptrs)):
            pool_L, pool_M, rows_L, rows_W = strides[i]
            to_ptr = pool_ptrs[i].to(tl.pointer_type(word_type)) + layer * pool_L + slot.to(tl.int64) * pool_M
            from_ptr = row_ptrs[i].to(tl.pointer_type(word_type)) + layer * rows_L + w.to(tl.int64) * rows_W
            for start in range(0, lengths[i], BLOCK):
                word = start + tl.arange(0, BLOCK)
                tl.store(to_ptr + word, tl.load(from_ptr + word, mask=word < lengths[i]), mask=word < lengths[i])
        slot = tl.min(tl.where(is_new_M & (slot_M > slot), slot_M, M), axis=0)


def draw_ranks(state: Tensor, layers: int, rows: int, count: int, shared: bool) -> Tensor:
    """See `memkernel.reference.draw_ranks`; seed and step are read on the device, as a captured graph needs."""
    _check.draw_ranks(state, layers, rows, count, shared)
    drawn = torch.empty(layers, count, dtype=torch.int32, device=state.device)
    if drawn.numel():
        bits = max(2, (rows - 1).bit_length())
        grid = (tiles.cdiv(count, DRAW_BLOCK), layers)
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
    closed = rank.new_empty(L, M)
    grid = (tiles.cdiv(M, RANK_BLOCK), L)
    close_ranks_kernel[grid](dropped.contiguous(), closed, M, W, RANK_BLOCK, DROPPED_BLOCK, num_warps=4)
    pairs = [(pool, _packed_rows(new)) for pool, new in zip(pools, rows, strict=True) if pool.numel()]
    _write_rows(rank, closed, pairs[:POOLS], W)
    for i in range(POOLS, len(pairs), POOLS):
        _write_rows(rank, None, pairs[i : i + POOLS], W)


def _packed_rows(rows: Tensor) -> Tensor:
    return rows if rows[0, 0].is_contiguous() else rows.contiguous()


def _write_rows(rank: Tensor, closed: Tensor | None, pairs: list[tuple[Tensor, Tensor]], W: int) -> None:
    """One launch for the given pools and their new rows. A word is the largest power of two, up to 4 bytes, that
    divides every address; the compiler makes 16-byte vectors of four."""
    (L, M), addresses, strides, lengths = rank.shape, 4, [], []
    for pool, new in pairs:
        size = pool.element_size()
        strides.append([stride * size for stride in (*pool.stride()[:2], *new.stride()[:2])])
        lengths.append(pool[0, 0].numel() * size)
        for number in (pool.data_ptr(), new.data_ptr(), lengths[-1], *strides[-1]):
            addresses |= number
    word = addresses & -addresses
    write_rows_kernel[(tiles.cdiv(M, SLOT_BLOCK), L)](
        rank,
        rank.stride(0),
        closed,
        tuple(pool for pool, _ in pairs),
        tuple(new for _, new in pairs),
        tuple(tuple(stride // word for stride in of_pool) for of_pool in strides),
        tuple(length // word for length in lengths),
        M,
        W,
        word,
        SLOT_BLOCK,
        WORD_BLOCK,
        num_warps=4,
    )
