"""Fused products: their gradients are right, and they equal the plain way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from gossamer.kernels.linears import ACTIVATIONS, Norm, Term, gated_mlp, linears, normed_linears
from gossamer.linalg import LowRankPair

DOUBLE = torch.float64


class Map:
    """A frozen linear map."""

    def __init__(self, outer: int, inner: int, bias: bool = False, dtype: torch.dtype = DOUBLE) -> None:
        self.weight = torch.randn(outer, inner, dtype=dtype)
        self.own_bias = torch.randn(outer, dtype=dtype) if bias else None

    def affine(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.own_bias


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def factors(outer: int, inner: int, rank: int = 2, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in ((rank, inner), (outer, rank))]


def by_hand(x: Tensor, maps: Sequence[Map], terms: Sequence[Sequence[Term]]) -> list[Tensor]:
    """`LowRankPair.apply` beside each map, rows by rows."""
    outs = []
    for one, beside in zip(maps, terms, strict=True):
        out = nn.functional.linear(x, *one.affine())
        for pair, (start, stop) in beside:
            part = pair.apply(x[start:stop])
            out = out + nn.functional.pad(part, (0, 0, start, len(x) - start - len(part)))
        outs.append(out)
    return outs


def normed(x: Tensor, norm: Norm) -> Tensor:
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    return unit * (1 + norm.weight if norm.offset else norm.weight)


MAPS = [(6, 8, True), (4, 8, False), (4, 8, False)]


def term(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Term:
    return Term(LowRankPair(lora_A, lora_B, scaling))


def three_terms(flat: Sequence[Tensor]) -> list[list[Term]]:
    """One term, none, and two for different rows and of different ranks."""
    return [
        [term(flat[0], flat[1], 0.5)],
        [],
        [Term(LowRankPair(flat[2], flat[3], 2.0), (0, 2)), Term(LowRankPair(flat[4], flat[5], 1.5), (2, None))],
    ]


def flat_factors(dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    return [*factors(6, 8, dtype=dtype), *factors(4, 8, 1, dtype=dtype), *factors(4, 8, 3, dtype=dtype)]


def test_products_of_one_input_equal_the_reference_and_their_gradients_are_right() -> None:
    x, maps, flat = torch.randn(5, 8, dtype=DOUBLE, requires_grad=True), [Map(*size) for size in MAPS], flat_factors()
    torch.testing.assert_close(linears(x, maps, three_terms(flat)), tuple(by_hand(x, maps, three_terms(flat))))
    assert torch.autograd.gradcheck(lambda x, *flat: linears(x, maps, three_terms(flat)), (x, *flat))


@pytest.mark.parametrize("offset", [False, True])
def test_a_norm_before_the_products(offset: bool) -> None:
    x, maps, flat = torch.randn(5, 8, dtype=DOUBLE, requires_grad=True), [Map(*size) for size in MAPS], flat_factors()
    norm = Norm(torch.rand(8, dtype=DOUBLE) + 0.5, 1e-5, offset)
    expected = tuple(by_hand(normed(x, norm), maps, three_terms(flat)))
    torch.testing.assert_close(normed_linears(x, norm, maps, three_terms(flat)), expected)
    assert torch.autograd.gradcheck(lambda x, *flat: normed_linears(x, norm, maps, three_terms(flat)), (x, *flat))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("offset", [False, True])
def test_a_gated_mlp(activation: str, offset: bool) -> None:
    x, maps = torch.randn(1, 5, 6, dtype=DOUBLE, requires_grad=True), [Map(8, 6), Map(8, 6, True), Map(6, 8)]
    flat = [*factors(8, 6), *factors(8, 6, 3), *factors(6, 8)]
    norm = Norm(torch.rand(6, dtype=DOUBLE), 1e-5, offset)

    def terms(flat: Sequence[Tensor]) -> list[list[Term]]:
        return [[term(flat[0], flat[1], 0.5)], [term(flat[2], flat[3], 2.0)], [term(flat[4], flat[5], 0.7)]]

    gate, up = by_hand(normed(x[0], norm), maps[:2], terms(flat)[:2])
    act, _ = ACTIVATIONS[activation]
    (down,) = by_hand(act(gate) * up, maps[2:], terms(flat)[2:])
    torch.testing.assert_close(gated_mlp(x, norm, activation, maps, terms(flat))[0], x[0] + down)
    assert torch.autograd.gradcheck(lambda x, *flat: gated_mlp(x, norm, activation, maps, terms(flat)), (x, *flat))
    some = [[], [term(*flat[2:4], 2.0)], []]
    assert torch.autograd.gradcheck(lambda x, *_: gated_mlp(x, norm, activation, maps, some), (x, *flat[2:4]))


def test_no_gradient_is_made_for_an_input_that_wants_none() -> None:
    maps, flat = [Map(*size) for size in MAPS], flat_factors()
    calls = []
    for one in maps:
        one.affine = lambda kept=one.affine: (calls.append(1), kept())[1]
    sum(out.sum() for out in linears(torch.randn(5, 8, dtype=DOUBLE), maps, three_terms(flat))).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(calls) == 3  # the weights were read forwards, and not again
    assert all(one.grad is not None for one in flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_factors_beside_a_narrower_base(dtype: torch.dtype) -> None:
    maps, flat = [Map(*size, dtype=dtype) for size in MAPS], flat_factors(torch.float32)
    x = torch.randn(5, 8).to(dtype).requires_grad_()
    outs = linears(x, maps, three_terms(flat))
    assert {out.dtype for out in outs} == {dtype}
    grads = torch.autograd.grad([out.float().square().sum() for out in outs], [x, *flat])
    assert [grad.dtype for grad in grads] == [dtype, *[torch.float32] * 6]
    wide = [Map(*size) for size in MAPS]
    for one, other in zip(wide, maps, strict=True):
        one.weight, one.own_bias = other.weight.double(), None if other.own_bias is None else other.own_bias.double()
    exact_x, exact = x.detach().double().requires_grad_(), [one.detach().double().requires_grad_() for one in flat]
    expected = by_hand(exact_x, wide, three_terms(exact))
    referee = torch.autograd.grad([out.square().sum() for out in expected], [exact_x, *exact])
    slack = 64 * torch.finfo(dtype).eps
    for got, right in zip([*outs, *grads], [*expected, *referee], strict=True):
        assert (got.double() - right).norm() < slack * right.norm()
