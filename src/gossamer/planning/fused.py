"""The fused parts of a decoder layer as single operations: what each keeps, and what its backward holds at its fullest.

One counts the rows' hidden states and inner activations that are alive at once in `kernels.linears`; factors, their
gradients and what is as small as they are count as nothing but what is kept of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.planning.operations import WIDE, fresh, like
from gossamer.planning.tape import Tape, Value

ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
"""Those of `kernels.linears`."""


def normed_linears(
    tape: Tape, x: Value, rows: int, outputs: Sequence[int], down: int, factors: Sequence[Value], buffer: int
) -> list[Value]:
    """Products of a normed input with their terms: keeps x, A x of all terms, and a number a row.

    Args:
        outputs: numbers of each product. down: of A x. buffer: bytes of a weight while it is rebuilt.
    """
    outs = [fresh(size, x.width) for size in outputs]
    wide = x.elements * WIDE
    norm = x.size + wide * (x.width < WIDE)  # the normed rows, and a wider copy on the way
    made = [(x, x.size), *((factor, factor.size) for factor in factors)]
    backward = max(x.size + buffer, 2 * wide)  # the normed rows; then the norm's own: slope and unit, both wide
    tape.record(
        outs, made, [x, fresh(down, x.width), fresh(rows, WIDE)], scratch=backward, forward=max(norm, x.size + buffer)
    )
    return outs


def rotate(tape: Tape, x: Value, angles: Value) -> Value:
    """Rotary positions in place of four products and two sums."""
    out = like(x)
    tape.record(out, [(x, x.size)], [angles])
    return out


def gated_mlp(
    tape: Tape, x: Value, rows: int, inner: int, downs: Sequence[int], factors: Sequence[Value], buffer: int
) -> Value:
    """`x + down(act(gate) * up)` of a normed input: keeps x, gate, up, A x of all terms, and a number a row.

    Args:
        inner: numbers of gate, and of up. downs: of A x, before and after.
    """
    out, wide, act = like(x), x.elements * WIDE, inner * x.width
    gate, up = fresh(inner, x.width), fresh(inner, x.width)
    saves = [x, gate, up, fresh(rows, WIDE), *(fresh(size, x.width) for size in downs)]
    made = [(x, x.size), *((factor, factor.size) for factor in factors)]
    products = 2 * act + buffer - x.size  # act(gate) * up, and the slope that comes through down
    slopes = 3 * act - x.size  # of gate and up, and that one
    before = 2 * act + x.size + buffer  # both, and the normed rows
    norm = 2 * wide  # slope and unit
    tape.record(out, made, saves, scratch=max(products, slopes, before, norm), forward=act + buffer)
    return out
