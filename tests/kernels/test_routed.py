"""Another adapter in every row: all ways equal the plain loop, for any ranks, mixes and runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.kernels.routed import Routed, reference
from gossamer.kernels.routing import LinearChange, Routing, Stack
from gossamer.linalg import LowRankPair

OUTS, INNER = (6, 4, 5), 7
WAYS = ("segmented", "concatenated", "gathered")
weights = st.sampled_from([1.0, 1.0, 0.5, -2.0])
mixes = st.lists(st.tuples(st.integers(0, 4), weights), max_size=3, unique_by=lambda one: one[0]).map(tuple)
runs = st.lists(st.tuples(mixes, st.integers(1, 4)), min_size=1, max_size=9)


def drawn_change(draw: torch.Generator, out: int, plain: bool) -> LinearChange | None:
    """Factors of rank 0 to 3, and, unless plain, any of what else a change may have."""
    rank = int(torch.randint(0, 4, (), generator=draw))

    def some(*shape: int) -> torch.Tensor | None:
        return torch.randn(shape, generator=draw) if not plain and torch.rand((), generator=draw) < 0.3 else None

    factors = (torch.randn(rank, INNER, generator=draw), torch.randn(out, rank, generator=draw)) if rank else None
    return LinearChange(factors and LowRankPair(*factors), some(out), some(out), None, some(out, INNER), some(out))


def stacks(seed: int, plain: bool = True) -> dict[int, Stack]:
    """Five adapters of ranks 0 to 3 beside three maps, in float64; the last two are more than sums unless plain."""
    draw = torch.Generator().manual_seed(seed)
    like = torch.zeros(1, INNER, dtype=torch.float64)
    return {
        number: Stack.of([drawn_change(draw, out, plain or number < 3) for out in OUTS], OUTS, like)
        for number in range(5)
    }


def maps(draw: torch.Generator, outs: tuple[int, ...] = OUTS) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    dtype = torch.float64
    return [
        (
            torch.randn(out, INNER, generator=draw, dtype=dtype),
            torch.randn(out, generator=draw, dtype=dtype) if odd else None,
        )
        for odd, out in enumerate(outs)
    ]


def routed(x: torch.Tensor, there: list, stacked: dict[int, Stack], routing: Routing, way: str | None) -> list:
    one = Routed(stacked, routing, way)
    given = one.before(x)
    outs = [torch.nn.functional.linear(given, weight, bias) for weight, bias in there]
    one.after(x, outs)
    return outs


@settings(max_examples=60, deadline=None)
@given(runs, st.integers(0, 99))
def test_every_way_equals_the_plain_loop(drawn: list, seed: int) -> None:
    routing = Routing(tuple(mix for mix, _ in drawn), tuple(length for _, length in drawn))
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(routing.rows, INNER, generator=draw, dtype=torch.float64)
    there, stacked = maps(draw), stacks(seed)
    expected = reference(x, there, stacked, routing)
    for way in WAYS if routing.runs else ("none",):
        for got, right in zip(routed(x, there, stacked, routing, way), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 4)), min_size=1, max_size=9), st.integers(0, 99))
def test_gains_shifts_and_whole_weights_are_each_rows_own(drawn: list, seed: int) -> None:
    mixed = [(((number, 1.0),) if number >= 0 else (), length) for number, length in drawn]
    routing = Routing(tuple(mix for mix, _ in mixed), tuple(length for _, length in mixed))
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(routing.rows, INNER, generator=draw, dtype=torch.float64)
    there, stacked = maps(draw), stacks(seed, plain=False)
    expected = reference(x, there, stacked, routing)
    for way in (*WAYS, None):
        for got, right in zip(routed(x, there, stacked, routing, way), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [1, 5, 64, 65])
def test_one_mix_for_all_rows_is_one_product_for_all_maps(length: int) -> None:
    """Where the outputs are columns of one tensor; the same as where they are not."""
    draw, stacked = torch.Generator().manual_seed(2), stacks(2)
    routing = Routing((((0, 1.0), (1, -0.5)),), (length,))
    there, x = maps(draw), torch.randn(length, INNER, generator=draw, dtype=torch.float64)
    whole = torch.cat([torch.nn.functional.linear(x, weight, bias) for weight, bias in there], 1)
    one = Routed(stacked, routing)
    assert (one.of_all is not None) == (length <= 64)
    one.after(x, whole.split(OUTS, 1), whole)
    for got, right in zip(whole.split(OUTS, 1), reference(x, there, stacked, routing), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_are_scaled_for_the_rows_that_ask_for_it(way: str) -> None:
    draw = torch.Generator().manual_seed(3)
    like = torch.zeros(1, INNER, dtype=torch.float64)
    scaled = LinearChange(given=torch.randn(INNER, generator=draw))
    pair = LowRankPair(torch.randn(2, INNER, generator=draw), torch.randn(OUTS[0], 2, generator=draw))
    stacked = {0: Stack.of([scaled], OUTS[:1], like), 1: Stack.of([LinearChange(pair)], OUTS[:1], like)}
    routing = Routing((((0, 1.0),), (), ((1, 1.0),)), (2, 1, 2))
    x, there = torch.randn(5, INNER, generator=draw, dtype=torch.float64), maps(draw, OUTS[:1])
    right = reference(x, there, stacked, routing)
    torch.testing.assert_close(routed(x, there, stacked, routing, way)[0], right[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["segmented", "gathered"])
def test_a_row_of_the_base_is_untouched_to_the_bit_even_by_nan(way: str) -> None:
    stacked = stacks(1)
    stacked[0].lora_A.fill_(torch.nan)
    routing = Routing((((0, 1.0),), (), ((1, 1.0),)), (1, 1, 1))
    x, there = torch.randn(3, INNER, dtype=torch.float64), maps(torch.Generator().manual_seed(0))
    outs, alone = routed(x, there, stacked, routing, way), routed(x, there, {}, Routing(((),), (3,)), None)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(outs, alone, strict=True))
    assert all(one[2].isfinite().all() for one in outs)


@pytest.mark.parametrize(
    ("lengths", "distinct", "way"),
    [((1,) * 8, 8, "gathered"), ((1,) * 32, 32, "gathered"), ((1,) * 32, 4, "concatenated"),
     ((64,) * 8, 8, "segmented"), ((1,) * 32, 1, "segmented"), ((16,) * 32, 32, "concatenated")],
)  # fmt: skip
def test_the_way_follows_the_rows(lengths: tuple[int, ...], distinct: int, way: str) -> None:
    assert Routing(tuple(((row % distinct, 1.0),) for row in range(len(lengths))), lengths).way == way
    assert Routing(((),) * len(lengths), lengths).way == "none"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 4), min_size=1, max_size=9), min_size=2, max_size=6), st.integers(0, 99))
def test_what_was_gathered_before_is_used_again(batches: list[list[int]], seed: int) -> None:
    """Rows come, go and change their adapters from batch to batch, as if each were the first."""
    draw = torch.Generator().manual_seed(seed)
    there, stacked, before = maps(draw), stacks(seed), None
    for numbers in batches:
        routing = Routing(tuple(((number, 1.0),) if number >= 0 else () for number in numbers), (1,) * len(numbers))
        x = torch.randn(routing.rows, INNER, generator=draw, dtype=torch.float64)
        if not routing.runs:
            continue
        before = Routed({number: stacked[number] for number in {*numbers} - {-1}}, routing, "gathered", before)
        outs = [torch.nn.functional.linear(x, weight, bias) for weight, bias in there]
        before.after(x, outs)
        for got, right in zip(outs, reference(x, there, stacked, routing), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("way", "length"), [("segmented", 3), ("segmented", 70), ("concatenated", 3), ("gathered", 1)])
def test_beside_sixteen_bits_a_cpu_adds_in_float32(way: str, length: int, dtype: torch.dtype) -> None:
    """Terms of few rows are rounded once, with the sum; those of long runs as the maps' own outputs are."""
    draw = torch.Generator().manual_seed(0)
    like = torch.zeros(1, INNER, dtype=dtype)
    changes = {number: [drawn_change(draw, out, number < 2) for out in OUTS] for number in range(3)}
    narrow = {number: Stack.of(each, OUTS, like) for number, each in changes.items()}
    assert all(
        one.dtype == torch.float32
        for stack in narrow.values()
        for pair in stack.pairs
        for one in (pair.lora_A, pair.lora_B)
    )
    assert all(one.dtype == dtype for stack in narrow.values() for rest in stack.rest for one in rest.tensors())
    x = torch.randn(3 * length, INNER, generator=draw).to(dtype)
    there = [(weight.to(dtype), None) for weight, _ in maps(draw)]
    routing = Routing((((0, 1.0),), ((1, 0.5), (0, 1.0)), ((2, 1.0),)), (length,) * 3)
    outs = routed(x, there, narrow, routing, way)
    wide = {number: Stack.of(each, OUTS, like.double()) for number, each in changes.items()}
    exact = reference(x.double(), [(weight.double(), None) for weight, _ in there], wide, routing)
    slack = 16 * torch.finfo(dtype).eps
    for got, right in zip(outs, exact, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), right, rtol=slack, atol=slack)
