"""The public ops, registered once in the `memkernel` torch library under the names and signatures of `reference`.

PyTorch's dispatcher picks the implementation by the tensors' device. The reference is registered for every device; a
kernel registered under a device's own key (CPU: csrc/bindings.cpp; CUDA: `memkernel.kernels`, where there is Triton)
takes precedence there, and hands calls that it does not cover, such as float64, to the reference (C++ finds it under
`memkernel_reference::<name>`). `torch.ops.memkernel.<name>` and the functions here are the same ops: torch.compile
traces them, other serving stacks can embed them. They are for inference: gradients go through `memkernel.reference`.
What an op writes must share memory neither with its other arguments nor, but for strides of 0, which are refused, with
itself: that is not checked.

Argument shapes, dtypes and what is written: see the function of the same name in `memkernel.reference`.
"""

import functools

import torch
from torch import Tensor

from memkernel import _check, native, reference  # noqa: F401 - native registers its kernels

WHY_NO_TRITON = None  # why CUDA devices run the reference
try:
    from memkernel import kernels
except ImportError as error:
    kernels, WHY_NO_TRITON = None, f"Triton cannot be imported: {error}"

# A library unregisters when collected: these must live as long as the module.
LIBRARY = torch.library.Library("memkernel", "DEF")
FALLBACK = torch.library.Library("memkernel_reference", "DEF")


def _register(name: str, fake, writes: tuple[str, ...] = ()):
    """Define memkernel::`name` from the reference's signature; `fake` gives the outputs' shapes and dtypes."""
    function, check = getattr(reference, name), getattr(_check, name)

    def checked_fake(*args):  # it runs for calls with any meta tensor, too
        check(*args)
        return fake(*args)

    for library in (LIBRARY, FALLBACK):
        library.define(name + torch.library.infer_schema(function, mutates_args=writes))
        library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"memkernel::{name}", checked_fake, lib=LIBRARY)
    if kernels:
        LIBRARY.impl(name, _on_its_device(getattr(kernels, name)), "CUDA")
    return getattr(torch.ops.memkernel, name).default


def _on_its_device(function):
    """Triton launches on the current device, which need not be the one where the arguments are."""

    @functools.wraps(function)
    def call(*args):
        device = next(arg for arg in args if isinstance(arg, Tensor)).device
        if device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return call


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


rms_norm = _register("rms_norm", lambda x, weight, eps: _like(x))
add_rms_norm_ = _register("add_rms_norm_", lambda residual, x, weight, eps: _like(residual), writes=("residual",))
swiglu = _register("swiglu", lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2))
rope_write_ = _register(
    "rope_write_",
    lambda cache_key, cache_value, query, key, value, cos, sin, start, offset: _like(query),
    writes=("cache_key", "cache_value"),
)
rotate_memory_ = _register("rotate_memory_", lambda rotated, key, rank, cos, sin, offset: None, writes=("rotated",))
memory_attention = _register(
    "memory_attention", lambda query, memory_key, memory_value, key, value, start: _like(query)
)
draw_ranks = _register(
    "draw_ranks",
    lambda state, layers, rows, count, shared: state.new_empty(layers, count, dtype=torch.int32),
)
memory_write_ = _register("memory_write_", lambda pools, rank, rows, dropped: None, writes=("pools", "rank"))
linear = _register("linear", lambda x, weight: x.new_empty(*x.shape[:-1], len(weight)))
