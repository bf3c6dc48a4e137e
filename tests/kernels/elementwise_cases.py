"""What both the interpreter's and the GPU's tests of the Triton kernels assert: each equals eager torch in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels import elementwise

SIZES = [(0, 8), (1, 1), (3, 7), (5, 64), (2, 1031)]
DTYPES = [torch.float32, torch.bfloat16]


def close(found: Tensor, exact: Tensor) -> None:
    """Within a few roundings of the dtype."""
    loose = 3e-2 if found.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(found.double(), exact, rtol=loose, atol=loose)


def rows(size: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    """Rows that lie apart, as a slice of something wider leaves them."""
    return torch.randn(size[0], size[1] + 3, device=device, dtype=dtype)[:, : size[1]]


def check_norm(size: tuple[int, int], dtype: torch.dtype, offset: bool, device: str = "cpu") -> None:
    torch.manual_seed(0)
    x, slope, weight = rows(size, dtype, device), rows(size, dtype, device), rows((1, size[1]), dtype, device)[0]
    kernels = elementwise._kernels(x, slope, weight)
    assert kernels is not None
    exact = x.double().requires_grad_()
    factor = 1 + weight.double() if offset else weight.double()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * factor
    (wanted,) = torch.autograd.grad(normed, exact, slope.double())
    inverse = elementwise.rms_inverse(x, 1e-5)
    close(elementwise.rms_forward(x, inverse, weight, offset), normed.detach())
    close(elementwise.rms_backward(slope, x, inverse, weight, offset), wanted)


def check_gated(size: tuple[int, int], dtype: torch.dtype, activation: str, device: str = "cpu") -> None:
    torch.manual_seed(0)
    gate, up, slope = (rows(size, dtype, device) for _ in range(3))
    assert elementwise._kernels(gate, up) is not None
    wide = [one.double().requires_grad_() for one in (gate, up)]
    product = elementwise.ACTIVATIONS[activation][0](wide[0]) * wide[1]
    wanted = torch.autograd.grad(product, wide, slope.double())
    close(elementwise.gated(activation, gate, up), product.detach())
    for found, exact in zip(elementwise.gated_slopes(activation, slope.clone(), gate, up), wanted, strict=True):
        close(found, exact)


def check_rotary(size: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    torch.manual_seed(0)
    x = torch.randn(*size[:-1], size[-1] + 2, dtype=dtype, device=device)[..., : size[-1]]
    cos, sin = (torch.randn(size[-3], 1, size[-1], dtype=dtype, device=device) for _ in range(2))
    assert elementwise._kernels(x, cos, sin) is not None
    first, second = x.double().chunk(2, -1)
    for sign in (-1, 1):
        half_turned = torch.cat([sign * second, -sign * first], -1)
        close(elementwise.turned(x, cos, sin, sign), x.double() * cos.double() + half_turned * sin.double())
