"""The memory-bound parts as Triton kernels, each in one pass; `elementwise` is the door to them, and knows when.

A program handles one row, a piece of one, or several short ones; arithmetic is float32, rounded where the eager path
rounds. Every tensor here has unit stride along its last dimension; rows may lie anywhere.
"""

# pyright: basic
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (Triton's language is compiled from the syntax tree: its values have no types in Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384
"""Elements of a row that one program holds at once."""
_PIECE = 1024


def rms_inverse(x: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` of each row of (N, D), (N, 1) float32."""
    rows, width = x.shape
    out = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        _rms_inverse[(rows,)](x, out, x.stride(0), width, eps, BLOCK=triton.next_power_of_2(width))
    return out


def rms_forward(x: Tensor, inverse: Tensor, weight: Tensor, offset: bool) -> Tensor:
    """`x * inverse * weight`, with `offset` `1 + weight`, of (N, D)."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        _rms_forward[(rows,)](x, inverse, weight, out, x.stride(0), width, OFFSET=offset, BLOCK=block)
    return out


def rms_backward(slope: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, offset: bool) -> Tensor:
    """`inverse * (g - unit * mean(g * unit))`, g the slope times the weight, of (N, D)."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        block, strides = triton.next_power_of_2(width), (slope.stride(0), x.stride(0))
        _rms_backward[(rows,)](slope, x, inverse, weight, out, *strides, width, OFFSET=offset, BLOCK=block)
    return out


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """`act(gate) * up` of (N, D)."""
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    if rows:
        grid = (rows, triton.cdiv(width, _PIECE))
        _gated[grid](gate, up, out, gate.stride(0), up.stride(0), width, ACT=activation, BLOCK=_PIECE)
    return out


def gated_slopes(activation: str, slope: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`slope * up * act'(gate)` and `slope * act(gate)` of (N, D)."""
    rows, width = gate.shape
    for_gate, for_up = (torch.empty(rows, width, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if rows:
        grid, strides = (rows, triton.cdiv(width, _PIECE)), (slope.stride(0), gate.stride(0), up.stride(0))
        _gated_slopes[grid](slope, gate, up, for_gate, for_up, *strides, width, ACT=activation, BLOCK=_PIECE)
    return for_gate, for_up


def turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """`x cos + sign * (b, -a) sin` of x = (a, b), at most four dimensions; cos and sin broadcast against it."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        four, width = (1,) * (4 - x.dim()) + tuple(x.shape), x.shape[-1]
        whole = [one.expand(x.shape).view(four) for one in (cos, sin)]
        laid = x.view(four)
        strides = [stride for one in (laid, *whole) for stride in one.stride()[:3]]
        count, block = four[0] * four[1] * four[2], triton.next_power_of_2(width // 2)
        rows = max(1, _PIECE // block)
        grid, sizes = (triton.cdiv(count, rows),), (count, four[1], four[2], width // 2)
        _turned[grid](laid, *whole, out, *strides, *sizes, SIGN=sign, ROWS=rows, BLOCK=block)
    return out


@triton.jit
def _rms_inverse(x, out, stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + row, 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps))


@triton.jit
def _rms_forward(x, inverse, weight, out, stride, width, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + at, mask=at < width, other=0.0)
    factor = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    unit = value.to(tl.float32) * tl.load(inverse + row)
    if OFFSET:
        normed = unit * (1.0 + factor)
    else:
        normed = unit.to(value.dtype).to(tl.float32) * factor
    tl.store(out + row * width + at, normed.to(value.dtype), mask=at < width)


@triton.jit
def _rms_backward(
    slope, x, inverse, weight, out, slope_stride, stride, width, OFFSET: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + at, mask=at < width, other=0.0)
    wide = tl.load(slope + row * slope_stride + at, mask=at < width, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    if OFFSET:
        factor = 1.0 + factor
    wide = wide * factor
    scale = tl.load(inverse + row)
    unit = value.to(tl.float32) * scale
    along = tl.sum(wide * unit, 0) / width
    tl.store(out + row * width + at, ((wide - unit * along) * scale).to(value.dtype), mask=at < width)


@triton.jit
def _act(x, ACT: tl.constexpr):
    """The activation and its derivative, float32."""
    if ACT == "silu":
        gone = 1.0 / (1.0 + tl.exp(-x))
        value = x * gone
        slope = gone * (1.0 + x * (1.0 - gone))
    elif ACT == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        bend = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0  # tanh
        value = 0.5 * x * (1.0 + bend)
        slope = 0.5 * (1.0 + bend) + 0.5 * x * (1.0 - bend * bend) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def _gated(gate, up, out, gate_stride, up_stride, width, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    opened = tl.load(gate + row * gate_stride + at, mask=at < width, other=0.0)
    raised = tl.load(up + row * up_stride + at, mask=at < width, other=0.0).to(tl.float32)
    bent, _ = _act(opened.to(tl.float32), ACT)
    product = bent.to(opened.dtype).to(tl.float32) * raised
    tl.store(out + row * width + at, product.to(opened.dtype), mask=at < width)


@triton.jit
def _gated_slopes(
    slope,
    gate,
    up,
    for_gate,
    for_up,
    slope_stride,
    gate_stride,
    up_stride,
    width,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    opened = tl.load(gate + row * gate_stride + at, mask=at < width, other=0.0)
    raised = tl.load(up + row * up_stride + at, mask=at < width, other=0.0).to(tl.float32)
    outer = tl.load(slope + row * slope_stride + at, mask=at < width, other=0.0).to(tl.float32)
    bent, steep = _act(opened.to(tl.float32), ACT)
    tl.store(for_gate + row * width + at, (outer * raised * steep).to(opened.dtype), mask=at < width)
    tl.store(for_up + row * width + at, (outer * bent).to(opened.dtype), mask=at < width)


@triton.jit
def _turned(
    x,
    cos,
    sin,
    out,
    x0,
    x1,
    x2,
    cos0,
    cos1,
    cos2,
    sin0,
    sin1,
    sin2,
    count,
    second,
    third,
    half,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    a, b, c = row // (second * third), row // third % second, row % third
    low = tl.arange(0, BLOCK)[None, :]
    inside = (row < count) & (low < half)
    from_x, from_cos = x + a * x0 + b * x1 + c * x2 + low, cos + a * cos0 + b * cos1 + c * cos2 + low
    from_sin, to = sin + a * sin0 + b * sin1 + c * sin2 + low, out + row * 2 * half + low
    first = tl.load(from_x, mask=inside, other=0.0)
    other = tl.load(from_x + half, mask=inside, other=0.0)
    left, right = first.to(tl.float32), other.to(tl.float32)
    upper = left * tl.load(from_cos, mask=inside, other=0.0).to(tl.float32)
    lower = right * tl.load(from_cos + half, mask=inside, other=0.0).to(tl.float32)
    upper += SIGN * right * tl.load(from_sin, mask=inside, other=0.0).to(tl.float32)
    lower -= SIGN * left * tl.load(from_sin + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, upper.to(first.dtype), mask=inside)
    tl.store(to + half, lower.to(first.dtype), mask=inside)
