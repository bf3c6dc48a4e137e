"""The product B A, looked at without forming it."""

import pytest
import torch

from gossamer import linalg


@pytest.mark.parametrize(("rank", "inner", "outer"), [(1, 5, 7), (4, 30, 9), (8, 8, 40), (6, 4, 50)])
def test_singular_values_are_those_of_the_whole_matrix(rank: int, inner: int, outer: int):
    generator = torch.Generator().manual_seed(rank)
    lora_A = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(outer, rank, generator=generator, dtype=torch.float64)
    whole = torch.linalg.svdvals(-0.5 * lora_B @ lora_A)
    found = linalg.singular_values(lora_A, lora_B, -0.5)
    count = min(len(whole), len(found))
    torch.testing.assert_close(found[:count], whole[:count], rtol=1e-10, atol=1e-12)
