"""The operations that layers are made of, as torch and this library run them.

Every function takes the tape and values, adds what torch would run, and returns the result. What an operation keeps is
the rule of its derivative: a product keeps its factors, a sum nothing, a matrix product with a frozen matrix nothing.
"""

from __future__ import annotations

from gossamer.planning.tape import Storage, Tape, Value

WIDE = 4
"""Bytes of a float32."""


def fresh(elements: int, width: int) -> Value:
    """A result with memory of its own."""
    return Value(elements, width, Storage(elements * width))


def like(x: Value) -> Value:
    """A result of the same shape and type."""
    return fresh(x.elements, x.width)


def cast(tape: Tape, x: Value, width: int) -> Value:
    """`x.to(dtype)`: nothing where it has that type already."""
    if x.width == width:
        return x
    out = fresh(x.elements, width)
    tape.record(out, [(x, x.size)])
    return out


def add(tape: Tape, x: Value, y: Value) -> Value:
    """`x + y`: keeps nothing, hands its gradient to both."""
    out = like(x)
    tape.record(out, [(x, None), (y, None)])
    return out


def scale(tape: Tape, x: Value) -> Value:
    """`x * number`."""
    out = like(x)
    tape.record(out, [(x, x.size)])
    return out


def multiply(tape: Tape, x: Value, y: Value) -> Value:
    """`x * y`, each kept for the other; where y is the smaller one, its gradient is summed after it was made whole."""
    out = like(x)
    summed = x.size - y.size if y.grad else 0
    tape.record(out, [(x, x.size), (y, y.size)], [y if x.grad else None, x if y.grad else None], scratch=summed)
    return out


def unary(tape: Tape, x: Value, *, keeps_result: bool = False) -> Value:
    """An activation that keeps its input (silu, gelu), or its result (relu, tanh)."""
    out = like(x)
    tape.record(out, [(x, x.size)], [out if keeps_result else x])
    return out


def activation(tape: Tape, x: Value, name: str) -> Value:
    """The non-linearity of an MLP, by the name that configs give it."""
    if name != "gelu_new":
        return unary(tape, x, keeps_result=name == "relu")
    cube = like(x)  # 0.5 x (1 + tanh(c (x + 0.044715 x^3))), written out in transformers
    half = scale(tape, x)
    tape.record(cube, [(x, x.size)], [x], scratch=2 * x.size)
    inner = scale(tape, add(tape, x, scale(tape, cube)))
    outer = like(x)
    bent = unary(tape, inner, keeps_result=True)
    tape.record(outer, [(bent, None)])
    return multiply(tape, half, outer)


def matmul(tape: Tape, x: Value, weight: Value, rows: int, outputs: int, buffer: int = 0) -> Value:
    """`x W^T`: keeps x if W is trained, and W if a gradient flows into x; `buffer` bytes exist while it runs."""
    out = fresh(rows * outputs, x.width)
    saves = [x if weight.grad else None, weight if x.grad else None]
    tape.record(out, [(x, x.size), (weight, weight.size)], saves, scratch=buffer, forward=buffer)
    return out


def rms_norm(tape: Tape, x: Value, rows: int, weight: Value, *, offset: bool = False) -> Value:
    """`weight * x / sqrt(mean(x^2))` in float32; with `offset` `(1 + weight)`, and the cast after the product."""
    wide = cast(tape, x, WIDE)
    square, mean, root = like(wide), fresh(rows, WIDE), fresh(rows, WIDE)
    tape.record(square, [(wide, wide.size)], [wide], scratch=2 * wide.size)
    tape.record(mean, [(square, square.size)])
    tape.record(root, [(mean, mean.size)], [root])
    normed = multiply(tape, wide, root)
    if offset:
        return cast(tape, multiply(tape, normed, cast(tape, weight, WIDE)), x.width)
    return multiply(tape, cast(tape, normed, x.width), weight)


def layer_norm(tape: Tape, x: Value, rows: int, weight: Value, bias: Value) -> Value:
    """torch's own: keeps the input, and mean and deviation of each row."""
    out, statistics = like(x), fresh(2 * rows, WIDE)
    tape.record(out, [(x, x.size), (weight, weight.size), (bias, bias.size)], [x, statistics])
    return out


def rotate(tape: Tape, x: Value, angles: Value, share: float = 1.0) -> Value:
    """Rotary positions: `x cos + half_turned(x) sin`, on a share of each head; keeps cos and sin alone."""
    turned = fresh(int(x.elements * share), x.width)
    part = x
    if share < 1:
        part, passed = fresh(turned.elements, x.width), fresh(x.elements - turned.elements, x.width)
        part.storage = passed.storage = x.storage
        tape.record(part, [(x, x.size)])
        tape.record(passed, [(x, x.size)])
    straight = like(part)
    tape.record(straight, [(part, part.size)], [angles])
    first, second = (Value(part.elements // 2, x.width, x.storage) for _ in range(2))
    tape.record(first, [(part, part.size)])
    tape.record(second, [(part, part.size)])
    negative = scale(tape, second)
    tape.record(turned, [(negative, None), (first, None)])
    crossed = like(turned)
    tape.record(crossed, [(turned, turned.size)], [angles])
    out = add(tape, straight, crossed)
    if share < 1:
        whole = like(x)
        tape.record(whole, [(out, None), (passed, None)])
        return whole
    return out


def split(tape: Tape, x: Value, parts: tuple[int, ...]) -> list[Value]:
    """Views of x; their gradients are put together again."""
    outputs = [Value(elements, x.width, x.storage) for elements in parts]
    tape.record(outputs, [(x, x.size)])
    return outputs


def repeat(tape: Tape, x: Value, times: int) -> Value:
    """Each key or value head once for every query head that uses it."""
    if times == 1:
        return x
    out = fresh(x.elements * times, x.width)
    tape.record(out, [(x, x.size)])
    return out


def attention(tape: Tape, q: Value, k: Value, v: Value, lse: int, mask: int, extra: int = 0) -> Value:
    """Fused attention: keeps q, k, v, the result, one float32 for each row and head, and its copy of the mask."""
    out, sums, masked = like(q), fresh(lse, WIDE), fresh(mask, q.width)
    saves = [q, k, v, out, sums, masked if mask else None]
    tape.record(out, [(q, q.size), (k, k.size), (v, v.size)], saves, scratch=extra)
    return out


def dropout(tape: Tape, x: Value) -> Value:
    """Dropout as a GPU runs it: a mask of one byte a number."""
    out, mask = like(x), fresh(x.elements, 1)
    tape.record(out, [(x, x.size)], [mask])
    return out
