"""Which device and dtype to compute with."""

import torch

from memkernel import native
from memkernel._check import DTYPES


def find_device(device: str | torch.device) -> torch.device:
    """The device of this name, CUDA ones with their index. Raises ValueError if there is none."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {device!r}") from None
    available = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= available:
        raise ValueError(f"device: expected 'cpu' or an available 'cuda', got {str(device)!r}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device if device.type == "cuda" else torch.device("cpu")


def choose(device: str | torch.device, dtype: str | torch.dtype) -> tuple[torch.device, torch.dtype, str]:
    """Resolve "auto"; the third value says what it became and why, and is empty if nothing was left to choose."""
    automatic = "auto" in (device, dtype)
    device = find_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    chosen, why = dtype, "as asked"
    if dtype == "auto":
        on_gpu = device.type == "cuda"
        native = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_bfloat16()
        chosen = torch.bfloat16 if native else torch.float32
        why = "multiplied natively here" if native else "no bfloat16 instructions here"
    elif isinstance(dtype, str):
        chosen = getattr(torch, dtype, None)
    if chosen not in DTYPES:
        raise ValueError(
            f"dtype: expected 'auto' or one of {[str(d).removeprefix('torch.') for d in DTYPES]}, got {dtype!r}"
        )
    said = f"device {device}, {str(chosen).removeprefix('torch.')} ({why})" if automatic else ""
    return device, chosen, said


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware: AVX-512 BF16, AMX, or Arm's BF16."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell, but our kernels
    return "avx512_bf16" in native.isas() or any(capabilities.get(x) for x in ("avx512_bf16", "amx_bf16", "bf16"))
