"""The ops as Triton kernels, under the names and signatures of `memkernel.reference`: for CUDA devices, or for CPUs in
Triton's interpreter (TRITON_INTERPRET=1 before the first import of triton), which is slow and meant for tests.

Arguments are checked as by the reference. float64 and layouts that a kernel does not cover are the reference's.
"""

import torch.nn.functional as F
from torch import Tensor

from memkernel import _check
from memkernel.kernels.memory_attention import memory_attention
from memkernel.kernels.memory_write import draw_ranks, memory_write_
from memkernel.kernels.norm_rope import add_rms_norm_, rms_norm, rope_write_, rotate_memory_, swiglu

__all__ = [
    "add_rms_norm_",
    "draw_ranks",
    "linear",
    "memory_attention",
    "memory_write_",
    "rms_norm",
    "rope_write_",
    "rotate_memory_",
    "swiglu",
]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `memkernel.reference.linear`: cuBLAS, which no kernel here would beat."""
    _check.linear(x, weight)
    return F.linear(x, weight)
