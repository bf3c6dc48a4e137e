"""Decompositions of B A through its factors, against those of the matrix."""

import pytest
import torch

from gossamer.linalg import LowRankPair

CASES = [(3, 20, 30), (8, 10, 9), (12, 10, 9), (1, 1, 5), (15, 6, 40)]


def factors(rank: int, inner: int, outer: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rank, inner), (outer, rank))]
    return drawn[0], drawn[1]


@pytest.mark.parametrize(("rank", "inner", "outer"), CASES)
def test_the_decomposition_is_the_matrix(rank: int, inner: int, outer: int):
    lora_A, lora_B = factors(rank, inner, outer)
    left, values, right = LowRankPair(lora_A, lora_B).svd()
    count = min(rank, inner, outer)
    torch.testing.assert_close(values[:count], torch.linalg.svdvals(lora_B @ lora_A)[:count], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(left * values @ right, lora_B @ lora_A, rtol=0, atol=1e-12)
    for basis in (left.T, right):
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-12)
    assert LowRankPair(lora_A, lora_B).norm() == pytest.approx((lora_B @ lora_A).norm().item(), rel=1e-12)


@pytest.mark.parametrize(("rank", "inner", "outer"), CASES)
@pytest.mark.parametrize("kept", [1, 2, 5])
def test_truncation_is_the_nearest(rank: int, inner: int, outer: int, kept: int):
    lora_A, lora_B = factors(rank, inner, outer)
    whole = lora_B @ lora_A
    best = torch.linalg.svdvals(whole)[kept:].norm()
    for short in (LowRankPair(lora_A, lora_B).resized(kept), LowRankPair.nearest(whole, kept)):
        short_A, short_B = short.lora_A, short.lora_B
        assert short_A.shape[0] == short_B.shape[1] <= kept
        assert (short_B @ short_A - whole).norm() <= best * (1 + 1e-6) + 1e-12
        torch.testing.assert_close(short_A.norm(dim=1), short_B.norm(dim=0), rtol=1e-9, atol=1e-9)


def test_stacks_are_decomposed_one_by_one():
    lora_A, lora_B = torch.randn(3, 2, 6), torch.randn(3, 5, 2)
    left, values, right = LowRankPair(lora_A, lora_B).svd()
    torch.testing.assert_close(left * values[:, None] @ right, lora_B @ lora_A)


@pytest.mark.parametrize(("rank", "inner", "outer"), CASES)
def test_operations_on_pairs_are_those_on_their_changes(rank: int, inner: int, outer: int):
    first, second = (LowRankPair(*factors(size, inner, outer), scaling) for size, scaling in ((rank, -0.5), (2, 3.0)))
    whole = torch.linalg.svdvals(first.delta())
    torch.testing.assert_close(first.svd()[1][: len(whole)], whole[:rank], rtol=1e-10, atol=1e-12)
    assert first.norm() == pytest.approx(first.delta().norm().item(), rel=1e-12)
    total = LowRankPair.concatenated([first, second.scaled(2.0)])
    torch.testing.assert_close(total.delta(), first.delta() + 2 * second.delta())
    stacked = LowRankPair.stacked([first, second])
    assert stacked.shape == (2, outer, inner)
    torch.testing.assert_close(stacked.delta(), torch.stack([first.delta(), second.delta()]))
    torch.testing.assert_close(stacked[1].delta(), second.delta())
    x = torch.randn(3, inner, dtype=torch.float64)
    torch.testing.assert_close(first.apply(x), x @ first.delta().T)
