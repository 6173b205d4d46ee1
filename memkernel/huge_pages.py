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
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # None beside Linux
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def setting() -> str:
    """Who gets huge pages here: "always", "madvise" (who asks, as memkernel does), "never"; "unknown" beside Linux."""
    chosen = re.search(r"\[(\w+)\]", SETTING.read_text()) if SETTING.is_file() else None
    return chosen[1] if chosen else "unknown"


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.empty. On a CPU, tensors of a page and more begin with one, and the system is asked for huge pages,
    which it gives from then on where it has any and `setting` is not "never"."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < PAGE or ADVICE is None:
        return torch.empty(shape, dtype=dtype, device=device)
    room = torch.empty(size + PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % PAGE
    numbers = room[begin : begin + size]
    # What it returns does not matter: an advice that is not taken leaves ordinary pages.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(numbers.data_ptr()), ctypes.c_size_t(size), ADVICE)
    return numbers.view(dtype).view(shape)
