"""The CUDA C++ kernel, from the extension `memkernel._cuda`: the random-drop write in one launch instead of three.

It is built from csrc/cuda/ where nvcc and a CUDA build of PyTorch are found on installation. The registered ops use the
Triton kernels (`memkernel.kernels`); this one stands beside them to be measured, and is chosen by calling it.
"""

import torch
from torch import Tensor

from memkernel import _check, native, reference

WHY_NOT = None  # why there is no such kernel
try:
    from memkernel import _cuda  # noqa: F401 - it registers the kernel
except ImportError as error:
    WHY_NOT = native.why_not("_cuda", error, "it needs nvcc and a CUDA build of PyTorch")


def draw_and_write_(pools: list[Tensor], rank: Tensor, rows: list[Tensor], state: Tensor, shared: bool) -> None:
    """`memory_write_` of the ranks that `draw_ranks` draws, bit for bit.

    More than three pools, rows that are not contiguous, and draws beyond a block's shared memory (far above 2% of
    131,072 rows) are the reference's.

    Args: as those two ops have them, at least one pool; all on one CUDA device. Written: pools, rank.
    Raises: ValueError for wrong arguments, RuntimeError without the extension.
    """
    if WHY_NOT:
        raise RuntimeError(f"draw_and_write_: {WHY_NOT}")
    if not pools or rank.device.type != "cuda":
        raise ValueError(f"pools: expected at least one, on a CUDA device, got {len(pools)} on {rank.device}")
    (L, M), W = rank.shape, rows[0].shape[1] if rows else 0
    _check.expect("rank", rank, (L, M), torch.int32, rank.device)
    _check.expect("state", state, (2,), torch.int64, rank.device)
    _check.draw_ranks(state, L, M, W, shared)
    _check.pools_and_rows(pools, rows, rank, W)
    if not torch.ops.memkernel_cuda.draw_and_write_(pools, rank, rows, state, shared):
        reference.memory_write_(pools, rank, rows, reference.draw_ranks(state, L, M, W, shared))
