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
def locate(row_X, T, H: tl.constexpr, G: tl.constexpr):
    """Query rows of a key/value head are packed as (sequence, token, head of the group): which (b, t, h) are they?

    The head is counted within its group, the sequence from the first one packed.
    """
    Q: tl.constexpr = H // G
    token_X = row_X // Q
    return token_X // T, token_X % T, row_X % Q


@triton.jit
def load_query(query_ptr, stride, b_X, t_X, h_X, is_row_X, D: tl.constexpr):
    """[X, D] of query [B, T, H, D]; zeros where there is no row."""
    offset_X = b_X.to(tl.int64) * stride[0] + t_X.to(tl.int64) * stride[1] + h_X * stride[2]
    return tl.load(query_ptr + offset_X[:, None] + tl.arange(0, D)[None, :], mask=is_row_X[:, None], other=0.0)


@triton.jit
def no_keys(BLOCK_X: tl.constexpr, D: tl.constexpr):
    """The weighted sum of values, the sum of weights and the largest score before any key."""
    return tl.zeros([BLOCK_X, D], tl.float32), tl.zeros([BLOCK_X], tl.float32), tl.full([BLOCK_X], LOWEST, tl.float32)


@triton.jit
def load_rows(
    rows,
    stride,
    batch,
    head,
    first,
    last,
    BLOCK_K: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BLOCK_K, D] from row `first` of keys or values [batch, row, head, D]. MASKED: from `last` on it may be any."""
    if TMA:  # a descriptor of [batch, head, row, D], which gives zeros beyond its rows
        return rows.load([batch, head, first, 0]).reshape(BLOCK_K, D)
    else:
        block = rows + tl.cast(batch, tl.int64) * stride[0] + tl.cast(first, tl.int64) * stride[1] + head * stride[2]
        row_K = tl.arange(0, BLOCK_K)
        block_KD = block + (row_K[:, None] * stride[1] + tl.arange(0, D)[None, :])
        if MASKED:
            return tl.load(block_KD, mask=(first + row_K < last)[:, None], other=0.0)
        else:
            return tl.load(block_KD)


@triton.jit
def attend_block(
    acc_XD, sum_X, max_X, query_XD, key, key_stride, value, value_stride,
    batch, head, first, last, seen_X, scale, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK_K keys. With MASKED, query row x sees the keys before seen_X[x]."""
    D: tl.constexpr = query_XD.shape[1]
    key_KD = load_rows(key, key_stride, batch, head, first, last, BLOCK_K, D, MASKED, TMA)
    score_XK = tl.dot(query_XD, key_KD.T, input_precision="ieee")
    if MASKED:
        score_XK = tl.where((first + tl.arange(0, BLOCK_K))[None, :] < seen_X[:, None], score_XK, -float("inf"))
    new_max_X = tl.maximum(max_X, tl.max(score_XK, 1) * scale)
    weight_XK = tl.exp2(tl.fma(score_XK, scale, -new_max_X[:, None]))
    decay_X = tl.exp2(max_X - new_max_X)
    value_KD = load_rows(value, value_stride, batch, head, first, last, BLOCK_K, D, MASKED, TMA)
    acc_XD = tl.dot(weight_XK.to(value_KD.dtype), value_KD, acc_XD * decay_X[:, None], input_precision="ieee")
    return acc_XD, sum_X * decay_X + tl.sum(weight_XK, 1), new_max_X


@triton.jit
def attend(
    acc_XD, sum_X, max_X, query_XD, key, key_stride, value, value_stride,
    batch, head, first, last, seen_X, seen_by_all, scale,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys first..last-1 in blocks, `first` at the start of one. Whole blocks that all query rows see take no mask;
    with EVEN there are no others."""
    whole = max(first, min(last, seen_by_all) // BLOCK_K * BLOCK_K)
    for block in range(first, whole, BLOCK_K):
        acc_XD, sum_X, max_X = attend_block(
            acc_XD, sum_X, max_X, query_XD, key, key_stride, value, value_stride,
            batch, head, block, last, seen_X, scale, BLOCK_K, False, TMA,
        )  # fmt: skip
    if not EVEN:
        for block in range(whole, last, BLOCK_K):
            acc_XD, sum_X, max_X = attend_block(
                acc_XD, sum_X, max_X, query_XD, key, key_stride, value, value_stride,
                batch, head, block, last, seen_X, scale, BLOCK_K, True, TMA,
            )  # fmt: skip
    return acc_XD, sum_X, max_X


@triton.jit
def share(rows, split, splits, BLOCK_K: tl.constexpr):
    """The rows of one of `splits` equal parts of `rows` rows, in blocks of BLOCK_K: first, last (excluded)."""
    blocks = tl.cdiv(rows, BLOCK_K)
    return blocks * split // splits * BLOCK_K, min(rows, blocks * (split + 1) // splits * BLOCK_K)


@triton.jit
def store(out_ptr, lse_ptr, row_X, is_row_X, acc_XD, sum_X, max_X, PARTIAL: tl.constexpr):
    """Weighted means to out [rows, D]; with PARTIAL their lse to [rows] too: -inf, and no mean, without keys."""
    D: tl.constexpr = acc_XD.shape[1]
    if PARTIAL:
        has_keys_X = sum_X != 0  # NaN stays
        sum_X = tl.where(has_keys_X, sum_X, 1.0)
        tl.store(lse_ptr + row_X, tl.where(has_keys_X, max_X + tl.log2(sum_X), -float("inf")), mask=is_row_X)
        is_row_X = is_row_X & has_keys_X
    mean_XD = acc_XD / sum_X[:, None]
    out_XD = out_ptr + row_X[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_XD, mean_XD.to(out_ptr.dtype.element_ty), mask=is_row_X[:, None])


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
