"""`linear` for few rows against PyTorch's own product and the machine's read bandwidth, weights cold.

    python -m benchmarks.cpu_linear [--dtype float32] [--isa avx2] [--threads 1] [--rows 1 4] [--seconds 1]

Each call takes another weight matrix of a set larger than the caches. The three are timed in turn and the best of each
is reported, so that other load on the machine, which comes and goes, meets all of them alike.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from memkernel import native, ops

SHAPES = [(2048, 8192), (8192, 2048), (2048, 3072), (32000, 2048)]  # [out, in]
COLD_BYTES = 150_000_000
PROBE_BYTES = 1 << 25


def best_seconds(calls: dict[str, Callable[[int], object]], seconds: float) -> dict[str, float]:
    """The shortest run of each call, which gets the number of the round; run in turn for so many seconds."""
    best, end, i = dict.fromkeys(calls, float("inf")), time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        for name, call in calls.items():
            begin = time.perf_counter()
            call(i)
            best[name] = min(best[name], time.perf_counter() - begin)
        i += 1
    return best


def compare(out: int, size: int, rows: int, dtype: torch.dtype, probes: torch.Tensor, seconds: float) -> str:
    bytes_each = out * size * dtype.itemsize
    weights = [torch.randn(out, size).to(dtype) for _ in range(max(2, COLD_BYTES // bytes_each))]
    x = torch.randn(rows, size).to(dtype)
    calls = {
        "ours": lambda i: ops.linear(x, weights[i % len(weights)]),
        "torch": lambda i: F.linear(x, weights[(i + 1) % len(weights)]),
        "read": lambda i: probes[i % len(probes)].sum(),
    }
    best = best_seconds(calls, seconds)
    ours, read = bytes_each / best["ours"] / 1e9, PROBE_BYTES / best["read"] / 1e9
    return f"{ours:5.1f} of {read:5.1f} = {ours / read:4.0%}  x{best['torch'] / best['ours']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--isa", default=native.isa())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    native.set_isa(args.isa)
    dtype = getattr(torch, args.dtype)
    probes = torch.ones(COLD_BYTES // PROBE_BYTES + 1, PROBE_BYTES // 4)
    print(
        f"{args.dtype}, {args.isa}, {args.threads} threads; GB/s of weights, of the probe's read bandwidth, x PyTorch"
    )
    for out, size in SHAPES:
        for rows in args.rows:
            print(f"{out}x{size} rows {rows:2}: {compare(out, size, rows, dtype, probes, args.seconds)}", flush=True)


if __name__ == "__main__":
    main()
