"""Tensors that kernels read at the memory's rate, on CPUs in pages of 2 MB where the system gives them.

With pages of 4 KB, looking up addresses holds reading up, the more so in virtual machines and where memory is fast.
"""

import ctypes
import math
import mmap
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # None where nobody can be asked: elsewhere than on Linux
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def setting() -> str:
    """Who gets huge pages here: "always", "madvise" (who asks, as memkernel does) or "never"; "unknown" if the system
    does not say."""
    chosen = re.search(r"\[(\w+)\]", SETTING.read_text()) if SETTING.is_file() else None
    return chosen[1] if chosen else "unknown"


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.empty. On a CPU, tensors of PAGE bytes and more begin at a multiple of PAGE, and the system is asked
    for huge pages: it gives them as memory is first written to, where it has any and `setting` is not "never"."""
    count, item = math.prod(shape), dtype.itemsize
    if device.type != "cpu" or count * item < PAGE or ADVICE is None:
        return torch.empty(shape, dtype=dtype, device=device)
    room = torch.empty(count + PAGE // item, dtype=dtype, device=device)
    begin = -room.data_ptr() % PAGE // item
    numbers = room[begin : begin + count]
    address, whole_pages = numbers.data_ptr(), numbers.nbytes // mmap.PAGESIZE * mmap.PAGESIZE
    # Memory that the allocator gives a second time has its pages already: they go. Neither call's result matters, since
    # an advice that is not taken leaves ordinary memory.
    madvise = ctypes.CDLL(None).madvise
    for advice in (ADVICE, mmap.MADV_DONTNEED):
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(whole_pages), advice)
    return numbers.view(shape)


def copy(x: Tensor, device: torch.device) -> Tensor:
    """`x` once more, contiguous, on `device`."""
    return empty(x.shape, x.dtype, device).copy_(x)
