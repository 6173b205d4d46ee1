"""Every op in plain PyTorch: the specification, the oracle of the tests, and the path where no kernel is registered.

The functions have the names and signatures of the registered ops (`memkernel.ops`); any device, any of float64,
float32, bfloat16 and float16, computed in float64 for float64 and in float32 otherwise. A name that ends in `_` writes
to the arguments that its docstring says are written; all other ops are pure and differentiable.

Dimension key, used in all of memkernel: B batch, T text tokens, M memory rows of a layer, P pools, W rows written by an
update, L layers, E hidden size, H query heads, G key/value heads, D head size, F MLP size, V vocabulary, S rows of a
sequence cache. A local tensor's name ends in its dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernel import _check

MASK_32 = 0xFFFFFFFF
FEISTEL_ROUNDS = 12


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight.

    Args: x [..., E]; weight [E], dtype of x. Returns [..., E], dtype of x.
    """
    _check.rms_norm(x, weight, eps)
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype) * weight).contiguous()


def add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place; returns rms_norm(residual, weight, eps).

    Args: residual [..., E], written; x [..., E]; weight [E]; one dtype. Returns [..., E].
    """
    _check.add_rms_norm_(residual, x, weight, eps)
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the halves of the fused gate-up product.

    Args: gate_up [..., 2F], gate first. Returns [..., F], same dtype.
    """
    _check.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up).contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of x [..., D] by cos, sin [..., D/2]: Llama's layout of RoPE."""
    first, second = _wide(x).chunk(2, dim=-1)
    cos, sin = cos.to(first.dtype), sin.to(first.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_write_(
    cache_key: Tensor,
    cache_value: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    offset: int,
) -> Tensor:
    """Append T rows to each sequence's cache, keys rotated, and return the queries rotated.

    Row t of sequence b goes to cache row start[b] + t and has position offset + start[b] + t. The queries belong to the
    last Tq <= T of these rows.

    Args:
        cache_key, cache_value: [B, S, G, D], written; start[b] + T <= S, checked on the CPU only.
        query: [B, Tq, H, D]. key, value: [B, T, G, D]. One dtype for all five; the last two dimensions contiguous.
        cos, sin: [positions, D/2] float32, at least offset + max(start) + T positions.
        start: [B] int32, rows already in each sequence's cache.
        offset: position of cache row 0.
    Returns: [B, Tq, H, D] contiguous, dtype of query.
    """
    _check.rope_write_(cache_key, cache_value, query, key, value, cos, sin, start, offset)
    (B, T), Tq = key.shape[:2], query.shape[1]
    row_BT = start.long()[:, None] + torch.arange(T, device=key.device)
    cos_BT1D, sin_BT1D = cos[row_BT + offset].unsqueeze(2), sin[row_BT + offset].unsqueeze(2)
    sequence_B1 = torch.arange(B, device=key.device)[:, None]
    cache_key[sequence_B1, row_BT] = _rotate(key, cos_BT1D, sin_BT1D)
    cache_value[sequence_B1, row_BT] = value
    return _rotate(query, cos_BT1D[:, T - Tq :], sin_BT1D[:, T - Tq :]).contiguous()


def rotate_memory_(rotated: Tensor, key: Tensor, rank: Tensor, cos: Tensor, sin: Tensor, offset: int) -> None:
    """rotated[s] = key[s] rotated to position offset + rank[s]: the pool as a reader's queries see it.

    Keys are kept un-rotated because each update moves nearly every row; a rotated copy is refreshed from them, never
    from itself, so that no rounding accumulates.

    Args:
        rotated: [..., M, G, D], written. key: same shape and dtype. rank: [..., M] int32.
        cos, sin: [positions, D/2] float32, at least offset + M positions.
    """
    _check.rotate_memory_(rotated, key, rank, cos, sin, offset)
    position = rank.long() + offset
    rotated.copy_(_rotate(key, cos[position].unsqueeze(-2), sin[position].unsqueeze(-2)))


def _unseen(start: Tensor, length: int, rows: int) -> Tensor:
    """[B, 1, T, S]: own row s lies after query t of sequence b, which stands at row start[b] + t."""
    query_row_BT = start[:, None] + torch.arange(length, device=start.device)
    return (torch.arange(rows, device=start.device) > query_row_BT[..., None]).unsqueeze(1)


def memory_attention(
    query: Tensor, memory_key: Tensor, memory_value: Tensor, key: Tensor, value: Tensor, start: Tensor
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over a memory that every query sees and the sequence's own rows up to itself.

    Query t of sequence b sees all M rows of pool b // (B / P) and rows 0..start[b] + t of its own cache. Query head h
    reads key/value head h // (H / G). The memory's rows may lie in any order: softmax does not depend on it.

    Args:
        query: [B, T, H, D], rotated.
        memory_key, memory_value: [P, M, G, D], keys rotated, M >= 0; pool p serves B / P consecutive sequences.
        key, value: [B, S, G, D], keys rotated; rows after start[b] + t are not seen but must be finite.
        start: [B] int32, own rows before the first query; start[b] + T <= S, checked on the CPU only.
    Returns: [B, T, H, D] contiguous, dtype of query.
    """
    _check.memory_attention(query, memory_key, memory_value, key, value, start)
    B, T, H, D = query.shape
    P, M, G, _ = memory_key.shape
    S = key.shape[1]
    if query.numel() == 0:
        return query.clone(memory_format=torch.contiguous_format)
    # One tall product per (pool, key/value head); its rows are the queries of all sequences and heads that share it.
    N, R = B // P, T * H // G
    query_BGRD = _wide(query).unflatten(2, (G, H // G)).permute(0, 2, 1, 3, 4).reshape(B, G, R, D) * D**-0.5
    query_PGXD = query_BGRD.unflatten(0, (P, N)).transpose(1, 2).reshape(P, G, N * R, D)
    to_memory_PGXM = query_PGXD @ _wide(memory_key).permute(0, 2, 3, 1)
    to_memory_BGRM = to_memory_PGXM.unflatten(2, (N, R)).transpose(1, 2).reshape(B, G, R, M)
    to_own_BGRS = query_BGRD @ _wide(key).permute(0, 2, 3, 1)
    to_own_BGRS = to_own_BGRS.masked_fill(_unseen(start, T, S).repeat_interleave(H // G, dim=2), -torch.inf)
    logits = torch.cat([to_memory_BGRM, to_own_BGRS], dim=-1)
    of_memory_BGRM, of_own_BGRS = logits.softmax(-1).split([M, S], dim=-1)

    of_memory_PGXM = of_memory_BGRM.unflatten(0, (P, N)).transpose(1, 2).reshape(P, G, N * R, M)
    out_PGXD = of_memory_PGXM @ _wide(memory_value).transpose(1, 2)
    out_BGRD = out_PGXD.unflatten(2, (N, R)).transpose(1, 2).reshape(B, G, R, D)
    out_BGRD = out_BGRD + of_own_BGRS @ _wide(value).transpose(1, 2)
    out_BTHD = out_BGRD.unflatten(2, (T, H // G)).transpose(1, 2).reshape(B, T, H, D)
    return out_BTHD.to(query.dtype).contiguous()


def _mix(x: Tensor) -> Tensor:
    """A bijective hash of 32-bit words, held in int64: two multiply-xorshift rounds (constants of MurmurHash3)."""
    x = x ^ (x >> 16)  # a new tensor; from here in place, several times faster for a vocabulary of words
    x.mul_(0x85EBCA6B).bitwise_and_(MASK_32)
    x ^= x >> 13
    x.mul_(0xC2B2AE35).bitwise_and_(MASK_32)
    x ^= x >> 16
    return x


def draw_ranks(state: Tensor, layers: int, rows: int, count: int, shared: bool) -> Tensor:
    """Which `count` of `rows` ranks each layer drops: distinct, a pure function of (seed, step, layer), on any device.

    A keyed Feistel permutation of [0, 2^b), 2^b the power of two at or above `rows`, applied to 0..count-1 and again
    to whatever lands outside [0, rows) (cycle walking): O(count), no sort, no random state. A word of b bits is split
    into a high half of b // 2 bits and a low half; a round maps (high, low) to (low, high xor mix(low xor round_key)),
    the halves swapping sizes. All arithmetic is modulo 2^32. With a finite key not every subset can occur; marginals
    and pairs are tested to be uniform.

    Args:
        state: [2] int64, (seed, step). shared: one draw for all layers (that of layer 0).
    Returns: [layers, count] int32, in the order drawn, on state's device.
    """
    _check.draw_ranks(state, layers, rows, count, shared)
    words = torch.stack([state[0], state[0] >> 32, state[1], state[1] >> 32]) & MASK_32
    layer_L1 = torch.arange(1 if shared else layers, device=state.device)[:, None]
    seed_L1 = _mix(layer_L1 + 0x9E3779B9 & MASK_32)
    for word in words:
        seed_L1 = _mix(seed_L1 ^ word)
    bits = max(2, (rows - 1).bit_length())
    high_bits, low_bits = bits // 2, bits - bits // 2
    round_keys = [_mix((seed_L1 + 0x9E3779B9 * (i + 1)) & MASK_32) for i in range(FEISTEL_ROUNDS)]

    def permute(x: Tensor) -> Tensor:
        high, low, sizes = x >> low_bits, x & ((1 << low_bits) - 1), (high_bits, low_bits)
        for round_key_L1 in round_keys:
            high, low = low, (high ^ _mix(low ^ round_key_L1)) & ((1 << sizes[0]) - 1)
            sizes = sizes[::-1]
        return (high << sizes[1]) | low

    drawn_LW = permute(torch.arange(count, device=state.device).expand(len(layer_L1), count))
    while (outside := drawn_LW >= rows).any():
        drawn_LW = torch.where(outside, permute(drawn_LW), drawn_LW)
    return drawn_LW.expand(layers, count).to(torch.int32).contiguous()


def memory_write_(pools: list[Tensor], rank: Tensor, rows: list[Tensor], dropped: Tensor) -> None:
    """Forget the rows at the ranks `dropped`, put new rows into their slots, and close the ranks, in place.

    New row j of layer l takes the slot that held rank dropped[l, j] and gets rank M - W + j, the youngest being M - 1;
    every survivor's rank falls by the number of dropped ranks below it. O(W) rows of data and O(M) integers: the pools
    are not copied, moved or read.

    Args:
        pools: tensors [L, M, ...] (keys, values, ...), written. rows: as many tensors [L, W, ...], same dtypes.
        rank: [L, M] int32, a permutation of 0..M-1 per layer, written.
        dropped: [L, W] int32, distinct ranks per layer, which is not checked.
    """
    _check.memory_write_(pools, rank, rows, dropped)
    L, M = rank.shape
    W = dropped.shape[1]
    layer_L1 = torch.arange(L, device=rank.device)[:, None]
    dropped_LW, rank_LM = dropped.long(), rank.long()
    slot_of_rank_LM = torch.empty_like(rank_LM).scatter_(1, rank_LM, torch.arange(M, device=rank.device).expand(L, M))
    slot_LW = slot_of_rank_LM.gather(1, dropped_LW)
    is_dropped_LM = torch.zeros_like(rank).scatter_(1, dropped_LW, 1)
    closed_LM = rank - is_dropped_LM.cumsum(1, dtype=torch.int32).gather(1, rank_LM)
    closed_LM.scatter_(1, slot_LW, torch.arange(M - W, M, dtype=torch.int32, device=rank.device).expand(L, W))
    for pool, new in zip(pools, rows, strict=True):
        pool[layer_L1, slot_LW] = new
    rank.copy_(closed_LM)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T.

    Args: x [..., in]; weight [out, in], dtype of x. Returns [..., out], dtype of x.
    """
    _check.linear(x, weight)
    return F.linear(x, weight)
