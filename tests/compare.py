"""How results are compared: relative error against numbers, and error against fp64 no worse than plain PyTorch's."""

import torch
from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of `want`."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, expected {list(want.shape)}"
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_no_worse(name: str, out: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0) -> None:
    """The error of `out` against fp64 is at most `factor` times that of `plain`, plain PyTorch in out's dtype.

    On the maximum and on the root mean square; the floor is two float32 ulps whatever the dtype, the noise of a float32
    accumulator: a floor of the size of a bfloat16 ulp would hide one wrong key among thousands.
    """
    assert out.shape == exact.shape and out.dtype == plain.dtype, name
    assert torch.equal(out.isfinite(), exact.isfinite()), f"{name}: non-finite values in other places"
    ours, yard = (out.double() - exact).abs(), (plain.double() - exact).abs()
    floor = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    for stat, a, b in (
        ("max", ours.max(), yard.max()),
        ("rms", ours.square().mean().sqrt(), yard.square().mean().sqrt()),
    ):
        assert a <= factor * b + floor, f"{name}: {stat} error {a:.2e}, plain PyTorch {b:.2e}"
