"""The product B A, looked at without forming it."""

import pytest
import torch

from gossamer import linalg


def decaying(outer: int, inner: int, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values 1, 0.8, 0.64, ..."""
    generator = torch.Generator().manual_seed(seed)
    count = min(outer, inner)
    left = torch.linalg.qr(torch.randn(outer, count, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(inner, count, generator=generator, dtype=torch.float64)).Q
    return left * 0.8 ** torch.arange(count, dtype=torch.float64) @ right.T


@pytest.mark.parametrize(("outer", "inner", "rank"), [(40, 30, 4), (30, 40, 1), (6, 50, 6), (50, 5, 9)])
def test_the_randomised_svd_is_the_svd(outer: int, inner: int, rank: int):
    matrix = decaying(outer, inner)
    left, values, right = linalg.randomised_svd(matrix, rank, torch.Generator().manual_seed(0))
    rank = min(rank, outer, inner)
    torch.testing.assert_close(values, 0.8 ** torch.arange(rank, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix @ right.T, left * values, rtol=0, atol=1e-7)
    for basis in (left.T, right):
        torch.testing.assert_close(basis @ basis.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


def test_more_iterations_are_closer():
    matrix = decaying(60, 50)
    best = (0.8 ** torch.arange(3, 50, dtype=torch.float64)).norm()
    excess = []
    for iterations in (0, 1, 4):
        left, values, right = linalg.randomised_svd(matrix, 3, torch.Generator().manual_seed(0), iterations, 2)
        excess.append((matrix - left * values @ right).norm() - best)
    assert excess[0] > 10 * excess[1] > 100 * excess[2] >= -1e-12


def test_the_randomised_svd_draws_from_its_generator_alone_and_in_float32_at_least():
    matrix = decaying(30, 20).bfloat16()
    before = torch.random.get_rng_state()
    one = linalg.randomised_svd(matrix, 3, torch.Generator().manual_seed(5), 0)
    same = linalg.randomised_svd(matrix, 3, torch.Generator().manual_seed(5), 0)
    other = linalg.randomised_svd(matrix, 3, torch.Generator().manual_seed(6), 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(part.dtype == torch.float32 for part in one)
    assert all(torch.equal(*pair) for pair in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
