"""What the attention kernels share: one tile of query rows against a range of keys, and the merging of split ranges.

Softmax is taken online and in base 2: for each query row the largest score so far, the sum of the weights
2^(score - largest) and their weighted sum of values are kept, and rescaled when a larger score comes. So a row's keys
may be cut anywhere: parts of a row (their weighted mean and the base-2 logarithm of their sum of weights, `lse`) merge
into the whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-3e38)  # the largest score of no keys: with -inf, the weight of an unseen key would be NaN


@triton.jit
def locate(row_M, T, H: tl.constexpr, G: tl.constexpr):
    """Query rows of a key/value head are packed as (sequence, token, head of the group): which (b, t, h) are they?

    The head is counted within its group, the sequence from the first one packed.
    """
    Q: tl.constexpr = H // G
    token_M = row_M // Q
    return token_M // T, token_M % T, row_M % Q


@triton.jit
def load_query(query_ptr, stride, b_M, t_M, h_M, is_row_M, D: tl.constexpr):
    """[M, D] of query [B, T, H, D]; zeros where there is no row."""
    offset_M = b_M.to(tl.int64) * stride[0] + t_M.to(tl.int64) * stride[1] + h_M * stride[2]
    return tl.load(query_ptr + offset_M[:, None] + tl.arange(0, D)[None, :], mask=is_row_M[:, None], other=0.0)


@triton.jit
def no_keys(M: tl.constexpr, D: tl.constexpr):
    """The weighted sum of values, the sum of weights and the largest score before any key."""
    return tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32), tl.full([M], LOWEST, tl.float32)


@triton.jit
def load_rows(
    rows, stride, batch, head, first, last, N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr
):
    """Rows first..first+N-1 of keys or values [batch, row, head, D]; with MASKED, anything finite from `last` on."""
    if TMA:  # a descriptor of [batch, head, row, D], which gives zeros beyond its rows
        return rows.load([batch, head, first, 0]).reshape(N, D)
    else:
        block = rows + tl.cast(batch, tl.int64) * stride[0] + tl.cast(first, tl.int64) * stride[1] + head * stride[2]
        row_N = tl.arange(0, N)
        block_ND = block + (row_N[:, None] * stride[1] + tl.arange(0, D)[None, :])
        if MASKED:
            return tl.load(block_ND, mask=(first + row_N < last)[:, None], other=0.0)
        else:
            return tl.load(block_ND)


@triton.jit
def attend_block(
    acc_MD, sum_M, max_M, query_MD, key, key_stride, value, value_stride,
    batch, head, first, last, seen_M, scale, N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One block of N keys. With MASKED, query row m sees the keys before seen_M[m]."""
    D: tl.constexpr = query_MD.shape[1]
    key_ND = load_rows(key, key_stride, batch, head, first, last, N, D, MASKED, TMA)
    score_MN = tl.dot(query_MD, key_ND.T, input_precision="ieee")
    if MASKED:
        score_MN = tl.where((first + tl.arange(0, N))[None, :] < seen_M[:, None], score_MN, -float("inf"))
    new_max_M = tl.maximum(max_M, tl.max(score_MN, 1) * scale)
    weight_MN = tl.exp2(tl.fma(score_MN, scale, -new_max_M[:, None]))
    decay_M = tl.exp2(max_M - new_max_M)
    value_ND = load_rows(value, value_stride, batch, head, first, last, N, D, MASKED, TMA)
    acc_MD = tl.dot(weight_MN.to(value_ND.dtype), value_ND, acc_MD * decay_M[:, None], input_precision="ieee")
    return acc_MD, sum_M * decay_M + tl.sum(weight_MN, 1), new_max_M


@triton.jit
def attend(
    acc_MD, sum_M, max_M, query_MD, key, key_stride, value, value_stride,
    batch, head, first, last, seen_M, seen_by_all, scale,
    N: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys first..last-1, `first` a multiple of N: whole blocks that all query rows see without a mask, others with.

    EVEN: all blocks are such.
    """
    whole = max(first, min(last, seen_by_all) // N * N)
    for block in range(first, whole, N):
        acc_MD, sum_M, max_M = attend_block(
            acc_MD, sum_M, max_M, query_MD, key, key_stride, value, value_stride,
            batch, head, block, last, seen_M, scale, N, False, TMA,
        )  # fmt: skip
    if not EVEN:
        for block in range(whole, last, N):
            acc_MD, sum_M, max_M = attend_block(
                acc_MD, sum_M, max_M, query_MD, key, key_stride, value, value_stride,
                batch, head, block, last, seen_M, scale, N, True, TMA,
            )  # fmt: skip
    return acc_MD, sum_M, max_M


@triton.jit
def share(rows, split, splits, N: tl.constexpr):
    """The rows of one of `splits` equal parts of `rows` rows, in blocks of N: first, last (excluded)."""
    blocks = tl.cdiv(rows, N)
    return blocks * split // splits * N, min(rows, blocks * (split + 1) // splits * N)


@triton.jit
def store(out_ptr, lse_ptr, row_M, is_row_M, acc_MD, sum_M, max_M, PARTIAL: tl.constexpr):
    """Weighted means to out [rows, D]; with PARTIAL their lse to [rows] too: -inf, and no mean, without keys."""
    D: tl.constexpr = acc_MD.shape[1]
    if PARTIAL:
        has_keys_M = sum_M > 0
        sum_M = tl.where(has_keys_M, sum_M, 1.0)
        tl.store(lse_ptr + row_M, tl.where(has_keys_M, max_M + tl.log2(sum_M), -float("inf")), mask=is_row_M)
        is_row_M = is_row_M & has_keys_M
    mean_MD = acc_MD / sum_M[:, None]
    out_MD = out_ptr + row_M[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_MD, mean_MD.to(out_ptr.dtype.element_ty), mask=is_row_M[:, None])


@triton.jit(do_not_specialize=["rows", "parts"])
def combine_kernel(
    partial_ptr,  # [parts, rows, D] float32: weighted means, uninitialised where lse is -inf
    lse_ptr,  # [parts, rows] float32
    out_ptr,  # [rows, D], written
    rows,
    parts,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column_D = tl.arange(0, D)
    acc_D = tl.zeros([D], tl.float32)
    total = 0.0
    largest = -float("inf")
    for first in range(0, parts, BLOCK):
        part_S = first + tl.arange(0, BLOCK)
        at_S = part_S.to(tl.int64) * rows + row
        lse_S = tl.load(lse_ptr + at_S, mask=part_S < parts, other=-float("inf"))
        new_largest = tl.maximum(largest, tl.max(lse_S, 0))
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weight_S = tl.exp2(lse_S - shift)
        decay = tl.exp2(largest - shift)
        mean_SD = tl.load(
            partial_ptr + at_S[:, None] * D + column_D[None, :], mask=lse_S[:, None] > -float("inf"), other=0.0
        )
        acc_D = acc_D * decay + tl.sum(weight_S[:, None] * mean_SD, 0)
        total = total * decay + tl.sum(weight_S, 0)
        largest = new_largest
    tl.store(out_ptr + row * D + column_D, (acc_D / total).to(out_ptr.dtype.element_ty))


def partials(parts: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised weighted means [parts, *like.shape] and lse [parts, *like.shape[:-1]], float32."""
    mean = torch.empty(parts, *like.shape, dtype=torch.float32, device=like.device)
    return mean, torch.empty(mean.shape[:-1], dtype=torch.float32, device=like.device)


def combine(partial: Tensor, lse: Tensor, out: Tensor) -> None:
    """Merge the parts of every row of `out`, contiguous, into it."""
    rows = lse[0].numel()
    combine_kernel[(rows,)](partial, lse, out, rows, len(lse), D=out.shape[-1], BLOCK=16, num_warps=4)
