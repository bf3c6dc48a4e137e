"""The one door to the memory-bound parts: norms, gated activations and rotary positions.

Eager torch on a CPU, and wherever Triton is missing or does not take a dtype or a size; Triton's kernels on CUDA.
GOSSAMER_KERNELS=eager leaves Triton out everywhere, =triton takes it for a CPU's tensors too (Triton's interpreter,
TRITON_INTERPRET=1), =auto is the default. Every function equals its eager twin to rounding.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false
# (torch gives no types for what autograd functions and its linear algebra return)

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import UsageError

CHOICES = ("auto", "eager", "triton")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "silu": (nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda slope, x: torch.ops.aten.gelu_backward(slope, x, approximate="tanh"),
    ),
    "gelu": (nn.functional.gelu, torch.ops.aten.gelu_backward),
}
"""Name in a config -> the activation, and `(slope, x) -> slope * act'(x)`."""


def choice() -> str:
    """What GOSSAMER_KERNELS says. Raises `UsageError` for a word that is not in `CHOICES`."""
    said = os.environ.get("GOSSAMER_KERNELS", "auto")
    if said not in CHOICES:
        raise UsageError("GOSSAMER_KERNELS names no kernels", got=said, expected=", ".join(CHOICES))
    return said


def described() -> str:
    """Which kernels a model on CUDA gets here, in words."""
    if choice() == "eager":
        return "eager (GOSSAMER_KERNELS)"
    return "triton on CUDA" if _triton() is not None else "eager: triton is not installed"


@functools.cache
def _triton() -> Any:
    """The module of kernels, or None where Triton is not installed or does not load."""
    try:
        return importlib.import_module("gossamer.kernels.triton_kernels")
    except (ImportError, OSError, RuntimeError):
        return None


def triton_takes(x: Tensor) -> bool:
    """Whether tensors like this one go to Triton."""
    chosen = choice()
    return chosen != "eager" and (x.is_cuda or chosen == "triton") and x.dtype in _FLOATS and _triton() is not None


def _kernels(x: Tensor, *others: Tensor) -> Any:
    """The kernels, if they take these tensors."""
    if not triton_takes(x):
        return None
    found, tensors = _triton(), (x, *others)
    if not 0 < x.shape[-1] <= found.WIDEST:
        return None
    fits = all(
        one.device == x.device and one.dtype == x.dtype and one.stride(-1) == 1 and one.shape[-1] == x.shape[-1]
        for one in tensors
    )
    return found if fits else None


def rms_inverse(x: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` of (N, D): (N, 1), at least float32."""
    if x.dim() == 2 and (kernels := _kernels(x)):
        return kernels.rms_inverse(x, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


def rms_forward(x: Tensor, inverse: Tensor, weight: Tensor, offset: bool) -> Tensor:
    """`weight * x * inverse` of (N, D), in x's dtype; with `offset` `(1 + weight)`, cast last."""
    if x.dim() == 2 and (kernels := _kernels(x, weight)):
        return kernels.rms_forward(x, inverse, weight, offset)
    unit = x * inverse  # in the wider dtype
    if offset:
        return unit.mul_(1.0 + weight.to(unit.dtype)).to(x.dtype)
    return unit.to(x.dtype).mul_(weight)


def rms_backward(slope: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, offset: bool) -> Tensor:
    """`d x` from `d normed`: `inverse * (g - unit * mean(g * unit))`, with g the slope times the weight."""
    if x.dim() == 2 and (kernels := _kernels(x, slope, weight)):
        return kernels.rms_backward(slope, x, inverse, weight, offset)
    factor = weight.to(inverse.dtype)
    wide = slope * (1.0 + factor if offset else factor)
    unit = x * inverse
    along = torch.linalg.vecdot(wide, unit).div_(x.shape[-1]).unsqueeze(-1)
    return wide.addcmul_(unit, along, value=-1.0).mul_(inverse).to(x.dtype)


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """`act(gate) * up` of (N, D)."""
    if gate.dim() == 2 and (kernels := _kernels(gate, up)):
        return kernels.gated(activation, gate, up)
    return ACTIVATIONS[activation][0](gate).mul_(up)


def gated_slopes(activation: str, slope: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes of gate and up, `slope * up * act'(gate)` and `slope * act(gate)`, of (N, D); uses `slope` up."""
    if gate.dim() == 2 and (kernels := _kernels(gate, up, slope)):
        return kernels.gated_slopes(activation, slope, gate, up)
    act, act_backward = ACTIVATIONS[activation]
    for_up = act(gate).mul_(slope)
    return act_backward(slope.mul_(up), gate), for_up


def turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """`x cos + sign * (b, -a) sin` of x = (a, b), (..., d); cos and sin broadcast against it."""
    if x.dim() <= 4 and x.shape[-1] % 2 == 0 and (kernels := _kernels(x, cos, sin)):
        return kernels.turned(x, cos, sin, sign)
    out, half = x * cos, x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=-sign)
    return out
