"""The small ops around the matrix products: norms, SwiGLU, RoPE into the caches, the memory's rotated copy.

All are bound by memory: each reads its inputs and writes its outputs once (at the 8B shape, per token in bfloat16:
add_rms_norm_ 32 KB, swiglu 86 KB, rope_write_ 24 KB; rotate_memory_ reads and writes the keys, 0.84 GB each way for a
whole memory). Arithmetic is float32. A row of a tensor is its last dimension (or the last two, its heads), contiguous;
rows may be strided.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernel import _check, reference
from memkernel.kernels import tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_NORM = 16384  # elements of a row that a program holds in registers
SWIGLU_BLOCK = 1024
ROPE_HEADS = 8  # of a program: with D 128, 64 threads with a 16-byte vector of bfloat16 for each half
ROTATE_PAIRS = 2048  # of a program: 128 threads with two such vectors for each half


@triton.jit
def rms_norm_kernel(
    residual_ptr,  # [N, E], read and written: += x, and what is normed; None: x is normed
    x_ptr,  # [N, E]
    weight_ptr,  # [E]
    out_ptr,  # [N, E] contiguous, written
    residual_stride_N,
    x_stride_N,
    E,
    eps,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_E)
    inside = column < E
    x_E = tl.load(x_ptr + row * x_stride_N + column, mask=inside, other=0.0)
    dtype: tl.constexpr = x_E.dtype
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row * residual_stride_N + column
        residual_E = tl.load(residual_ptrs, mask=inside, other=0.0)
        x_E = (residual_E.to(tl.float32) + x_E.to(tl.float32)).to(dtype)  # what is stored is what is normed
        tl.store(residual_ptrs, x_E, mask=inside)
    wide_E = x_E.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide_E * wide_E, axis=0) / E + eps)
    normed_E = (wide_E * scale).to(dtype).to(tl.float32)
    weight_E = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * E + column, (normed_E * weight_E).to(dtype), mask=inside)


@triton.jit
def swiglu_kernel(
    gate_up_ptr,  # [N, 2 F]
    out_ptr,  # [N, F] contiguous, written
    stride_N,
    F,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate_ptrs = gate_up_ptr + row * stride_N + column
    gate_F = tl.load(gate_ptrs, mask=column < F, other=0.0).to(tl.float32)
    up_F = tl.load(gate_ptrs + F, mask=column < F, other=0.0).to(tl.float32)
    out_F = gate_F / (1.0 + tl.exp(-gate_F)) * up_F
    tl.store(out_ptr + row * F + column, out_F.to(out_ptr.dtype.element_ty), mask=column < F)


@triton.jit
def _rotate(to_ptrs, from_ptrs, cos, sin, mask, D: tl.constexpr):
    """Turn the pairs (i, i + D/2) at `from_ptrs` and store them at `to_ptrs`, pointers to the first of each pair."""
    first = tl.load(from_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(from_ptrs + D // 2, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = to_ptrs.dtype.element_ty
    tl.store(to_ptrs, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(to_ptrs + D // 2, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["T", "Tq", "offset"])  # they vary, and a kernel for each kind would be no faster
def rope_write_kernel(
    cache_key_ptr,  # [B, S, G, D], written
    cache_value_ptr,  # [B, S, G, D], written
    query_ptr,  # [B, Tq, H, D]
    key_ptr,  # [B, T, G, D]
    value_ptr,  # [B, T, G, D]
    cos_ptr,  # [positions, D/2] float32
    sin_ptr,  # [positions, D/2] float32
    start_ptr,  # [B] int32
    out_ptr,  # [B, Tq, H, D] contiguous, written
    strides,  # (B, row) of each: cache_key, cache_value, query, key, value
    start_stride,
    T,
    Tq,
    offset,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads of a program, of the queries or of the keys and values
    BLOCK_D: tl.constexpr,  # at least D/2
):
    """Grid (T, B, blocks of query heads, then of key/value heads): each program stands at one position."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    row = tl.load(start_ptr + b * start_stride) + t
    pair_D = tl.arange(0, BLOCK_D)
    position = (row + offset).to(tl.int64) * (D // 2)
    cos_1D = tl.load(cos_ptr + position + pair_D, mask=pair_D < D // 2, other=0.0)[None, :]
    sin_1D = tl.load(sin_ptr + position + pair_D, mask=pair_D < D // 2, other=0.0)[None, :]
    block = tl.program_id(2)
    if block < query_blocks:
        if t >= T - Tq:
            query_t = (t - (T - Tq)).to(tl.int64)
            head_H = block * BLOCK_H + tl.arange(0, BLOCK_H)
            at_HD = head_H[:, None] * D + pair_D[None, :]
            mask_HD = (head_H[:, None] < H) & (pair_D[None, :] < D // 2)
            from_ptrs = query_ptr + b * strides[2][0] + query_t * strides[2][1] + at_HD
            _rotate(out_ptr + (b * Tq + query_t) * H * D + at_HD, from_ptrs, cos_1D, sin_1D, mask_HD, D)
    else:
        head_G = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        at_GD = head_G[:, None] * D + pair_D[None, :]
        mask_GD = (head_G[:, None] < G) & (pair_D[None, :] < D // 2)
        to_ptrs = cache_key_ptr + b * strides[0][0] + row.to(tl.int64) * strides[0][1] + at_GD
        from_ptrs = key_ptr + b * strides[3][0] + t.to(tl.int64) * strides[3][1] + at_GD
        _rotate(to_ptrs, from_ptrs, cos_1D, sin_1D, mask_GD, D)
        to_ptrs = cache_value_ptr + b * strides[1][0] + row.to(tl.int64) * strides[1][1] + at_GD
        from_ptrs = value_ptr + b * strides[4][0] + t.to(tl.int64) * strides[4][1] + at_GD
        tl.store(to_ptrs, tl.load(from_ptrs, mask=mask_GD), mask=mask_GD)
        tl.store(to_ptrs + D // 2, tl.load(from_ptrs + D // 2, mask=mask_GD), mask=mask_GD)


@triton.jit(do_not_specialize=["N", "offset"])
def rotate_memory_kernel(
    rotated_ptr,  # [N, G, D], written; N = L M
    key_ptr,  # [N, G, D]
    rank_ptr,  # [N] int32
    cos_ptr,  # [positions, D/2] float32
    sin_ptr,  # [positions, D/2] float32
    rotated_stride_N,
    key_stride_N,
    N,
    offset,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least D/2
):
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head_G, pair_D = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    position_N = tl.load(rank_ptr + row_N, mask=row_N < N, other=0) + offset
    at_ND = position_N.to(tl.int64)[:, None] * (D // 2) + pair_D[None, :]
    mask_ND = (row_N[:, None] < N) & (pair_D[None, :] < D // 2)
    cos_N1D = tl.load(cos_ptr + at_ND, mask=mask_ND, other=0.0)[:, None, :]
    sin_N1D = tl.load(sin_ptr + at_ND, mask=mask_ND, other=0.0)[:, None, :]
    at_GD = head_G[:, None] * D + pair_D[None, :]
    mask_NGD = (head_G[None, :, None] < G) & mask_ND[:, None, :]
    row_N = row_N.to(tl.int64)
    to_ptrs = rotated_ptr + (row_N * rotated_stride_N)[:, None, None] + at_GD[None, :, :]
    from_ptrs = key_ptr + (row_N * key_stride_N)[:, None, None] + at_GD[None, :, :]
    _rotate(to_ptrs, from_ptrs, cos_N1D, sin_N1D, mask_NGD, D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `memkernel.reference.rms_norm`. Rows of up to 16384 elements, else the reference's; likewise below."""
    _check.rms_norm(x, weight, eps)
    if x.dtype not in DTYPES or x.shape[-1] > MAX_NORM:
        return reference.rms_norm(x, weight, eps)
    return _norm(None, x, weight, eps)


def add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `memkernel.reference.add_rms_norm_`."""
    _check.add_rms_norm_(residual, x, weight, eps)
    if x.dtype not in DTYPES or x.shape[-1] > MAX_NORM or _rows(residual, 1) is None:
        return reference.add_rms_norm_(residual, x, weight, eps)
    return _norm(residual, x, weight, eps)


def _norm(residual: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        x_NE, residual_NE = _rows_or_copy(x, 1), None if residual is None else _rows(residual, 1)
        N, E = x_NE.shape
        block = tiles.next_power_of_2(E)
        rms_norm_kernel[(N,)](
            residual_NE,
            x_NE,
            weight.contiguous(),
            out,
            0 if residual is None else residual_NE.stride(0),
            x_NE.stride(0),
            E,
            eps,
            block,
            num_warps=min(16, max(1, block // 512)),
        )
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """See `memkernel.reference.swiglu`."""
    _check.swiglu(gate_up)
    if gate_up.dtype not in DTYPES:
        return reference.swiglu(gate_up)
    F = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], F, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        rows = _rows_or_copy(gate_up, 1)
        swiglu_kernel[(len(rows), tiles.cdiv(F, SWIGLU_BLOCK))](rows, out, rows.stride(0), F, SWIGLU_BLOCK, num_warps=4)
    return out


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
    """See `memkernel.reference.rope_write_`; `start` is read on the device."""
    _check.rope_write_(cache_key, cache_value, query, key, value, cos, sin, start, offset)
    (B, T, G, D), (Tq, H) = key.shape, query.shape[1:3]
    if key.dtype not in DTYPES or not (_has_packed_heads(cache_key) and _has_packed_heads(cache_value)):
        return reference.rope_write_(cache_key, cache_value, query, key, value, cos, sin, start, offset)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if key.numel():
        read = [t if _has_packed_heads(t) else t.contiguous() for t in (query, key, value)]
        strides = tuple(t.stride()[:2] for t in (cache_key, cache_value, *read))
        grid = (T, B, tiles.cdiv(H, ROPE_HEADS) + tiles.cdiv(G, ROPE_HEADS))
        tables, block = (cos.contiguous(), sin.contiguous()), tiles.next_power_of_2(D // 2)
        rope_write_kernel[grid](
            cache_key,
            cache_value,
            *read,
            *tables,
            start,
            out,
            strides,
            start.stride(0),
            T,
            Tq,
            offset,
            H,
            G,
            D,
            ROPE_HEADS,
            block,
            num_warps=2,
        )
    return out


def rotate_memory_(rotated: Tensor, key: Tensor, rank: Tensor, cos: Tensor, sin: Tensor, offset: int) -> None:
    """See `memkernel.reference.rotate_memory_`; one launch for all layers."""
    _check.rotate_memory_(rotated, key, rank, cos, sin, offset)
    if not rotated.numel():
        return None
    G, D = rotated.shape[-2:]
    rotated_NX = _rows(rotated, 2)
    if key.dtype not in DTYPES or rotated_NX is None:
        return reference.rotate_memory_(rotated, key, rank, cos, sin, offset)
    key_NX, N = _rows_or_copy(key, 2), len(rotated_NX)
    heads, pairs = tiles.next_power_of_2(G), tiles.next_power_of_2(D // 2)
    block = max(1, ROTATE_PAIRS // (heads * pairs))
    rotate_memory_kernel[(tiles.cdiv(N, block),)](
        rotated_NX,
        key_NX,
        rank.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        rotated_NX.stride(0),
        key_NX.stride(0),
        N,
        offset,
        G,
        D,
        block,
        heads,
        pairs,
        num_warps=4,
    )


def _rows(x: Tensor, dims: int) -> Tensor | None:
    """x as [N, row], a row being the last `dims` dimensions and contiguous: a view, or None where there is none."""
    row = math.prod(x.shape[-dims:])
    if not x.numel():
        return x.new_empty(0, row)
    try:
        rows = x.view(-1, row)
    except RuntimeError:
        return None
    return rows if row == 1 or rows.stride(1) == 1 else None


def _rows_or_copy(x: Tensor, dims: int) -> Tensor:
    rows = _rows(x, dims)
    return rows if rows is not None else _rows(x.contiguous(), dims)


def _has_packed_heads(x: Tensor) -> bool:
    """Whether the last two dimensions lie contiguously."""
    heads, size = x.shape[-2:]
    return (size == 1 or x.stride(-1) == 1) and (heads == 1 or x.stride(-2) == size)
