"""The contracts of the ops, checked by every implementation: errors that name the argument, what was expected and what
came. One function per op, of the op's name and with its arguments."""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless `tensor` has this shape (-1 matches any extent), dtype and device."""
    fits = tensor.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != dtype or tensor.device != device:
        came = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name}: expected {list(shape)} {dtype} on {device}, got {came}")


def expect_at_least_0(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")


def expect_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected one of {[str(dtype) for dtype in DTYPES]}, got {tensor.dtype}")


def expect_last(name: str, tensor: Tensor, even: bool = False) -> None:
    if tensor.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, got []")
    if even and tensor.shape[-1] % 2:
        raise ValueError(f"{name}: expected an even last dimension (two halves), got {list(tensor.shape)}")


def _is_real(tensor: Tensor) -> bool:
    """Not one that stands for others while a graph is traced."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def expect_distinct(name: str, tensor: Tensor) -> None:
    """Raise ValueError if elements of a tensor that is to be written share memory by a stride of 0."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    if _is_real(tensor) and tensor.numel() and any(stride == 0 and size > 1 for size, stride in dims):
        raise ValueError(f"{name}: expected elements that share no memory, got strides {list(tensor.stride())}")


def expect_below(name: str, tensor: Tensor, limit: Callable[[], int]) -> None:
    """Raise ValueError unless 0 <= value < limit for all integers. Not checked on devices that the host would have to
    wait for, nor where there are no values: in traces and under torch.func's transforms. There `limit` is not asked
    for either, so that a graph is not bound to the sizes that it is computed from."""
    if tensor.device.type != "cpu" or not _is_real(tensor) or not tensor.numel():
        return
    try:
        least, most = map(int, tensor.aminmax())
    except RuntimeError:
        return
    if least < 0 or most >= limit():
        raise ValueError(f"{name}: expected values from 0 to {limit() - 1}, got {least if least < 0 else most}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    expect_float("x", x)
    expect_last("x", x)
    expect("weight", weight, x.shape[-1:], x.dtype, x.device)


def add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    expect_float("residual", residual)
    expect_last("residual", residual)
    expect_distinct("residual", residual)
    expect("x", x, residual.shape, residual.dtype, residual.device)
    expect("weight", weight, residual.shape[-1:], residual.dtype, residual.device)


def swiglu(gate_up: Tensor) -> None:
    expect_float("gate_up", gate_up)
    expect_last("gate_up", gate_up, even=True)


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
) -> None:
    B, S, G, D = cache_key.shape
    T, Tq, H = key.shape[1], query.shape[1], query.shape[2]
    dtype, device = cache_key.dtype, cache_key.device
    expect_float("cache_key", cache_key)
    expect_last("cache_key", cache_key, even=True)
    expect("cache_value", cache_value, (B, S, G, D), dtype, device)
    expect("query", query, (B, min(Tq, T), H, D), dtype, device)
    expect("key", key, (B, min(T, S), G, D), dtype, device)
    expect("value", value, (B, T, G, D), dtype, device)
    expect("cos", cos, (-1, D // 2), torch.float32, device)
    expect("sin", sin, cos.shape, torch.float32, device)
    expect("start", start, (B,), torch.int32, device)
    expect_at_least_0("offset", offset)
    expect_distinct("cache_key", cache_key)
    expect_distinct("cache_value", cache_value)
    expect_below("start", start, lambda: min(S, max(0, len(cos) - offset)) - T + 1)


def rotate_memory_(rotated: Tensor, key: Tensor, rank: Tensor, cos: Tensor, sin: Tensor, offset: int) -> None:
    expect_float("rotated", rotated)
    expect_last("rotated", rotated, even=True)
    expect("key", key, rotated.shape, rotated.dtype, rotated.device)
    expect("rank", rank, rotated.shape[:-2], torch.int32, rotated.device)
    expect("cos", cos, (-1, rotated.shape[-1] // 2), torch.float32, rotated.device)
    expect("sin", sin, cos.shape, torch.float32, rotated.device)
    expect_at_least_0("offset", offset)
    expect_distinct("rotated", rotated)
    expect_below("rank", rank, lambda: max(0, len(cos) - offset))


def memory_attention(
    query: Tensor, memory_key: Tensor, memory_value: Tensor, key: Tensor, value: Tensor, start: Tensor
) -> None:
    B, T, H, D = query.shape
    P, M, G, _ = memory_key.shape
    S = key.shape[1]
    if P == 0 or G == 0 or B % P or H % G:
        raise ValueError(f"query: expected a batch divisible by {P} pools and heads by {G}, got {list(query.shape)}")
    dtype, device = query.dtype, query.device
    expect_float("query", query)
    expect("memory_key", memory_key, (P, M, G, D), dtype, device)
    expect("memory_value", memory_value, (P, M, G, D), dtype, device)
    expect("key", key, (B, max(S, T), G, D), dtype, device)
    expect("value", value, (B, S, G, D), dtype, device)
    expect("start", start, (B,), torch.int32, device)
    expect_below("start", start, lambda: S - T + 1)


def draw_ranks(state: Tensor, layers: int, rows: int, count: int, shared: bool) -> None:
    expect("state", state, (2,), torch.int64, state.device)
    expect_at_least_0("layers", layers)
    if not 0 <= count <= rows or rows > 1 << 31:
        raise ValueError(f"count: expected 0 to {rows} of {rows} rows, got {count}")


def memory_write_(pools: list[Tensor], rank: Tensor, rows: list[Tensor], dropped: Tensor) -> None:
    (L, M), W = rank.shape, dropped.shape[1]
    expect("rank", rank, (L, M), torch.int32, rank.device)
    expect("dropped", dropped, (L, min(W, M)), torch.int32, rank.device)
    pools_and_rows(pools, rows, rank, W)
    expect_below("rank", rank, lambda: M)
    expect_below("dropped", dropped, lambda: M)


def pools_and_rows(pools: list[Tensor], rows: list[Tensor], rank: Tensor, W: int) -> None:
    L, M = rank.shape
    if len(pools) != len(rows):
        raise ValueError(f"rows: expected one tensor for each of {len(pools)} pools, got {len(rows)}")
    for i, (pool, new) in enumerate(zip(pools, rows, strict=True)):
        expect(f"pools[{i}]", pool, (L, M, *pool.shape[2:]), pool.dtype, rank.device)
        expect(f"rows[{i}]", new, (L, W, *pool.shape[2:]), pool.dtype, rank.device)
        expect_distinct(f"pools[{i}]", pool)
    expect_distinct("rank", rank)


def linear(x: Tensor, weight: Tensor) -> None:
    expect_float("x", x)
    expect_last("x", x)
    expect("weight", weight, (-1, x.shape[-1]), x.dtype, x.device)
