"""The one argument checker: errors that name the argument, what was expected and what came."""

import torch
from torch import Tensor


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless `tensor` has this shape (-1 matches any extent), dtype and device."""
    fits = tensor.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != dtype or tensor.device != device:
        came = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name}: expected {list(shape)} {dtype} on {device}, got {came}")
