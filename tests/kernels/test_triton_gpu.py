"""Triton's kernels on a real GPU, and a step of training in bfloat16 through them."""

from __future__ import annotations

import pytest
import torch

from gossamer.kernels import elementwise
from gossamer.kernels.linears import Norm, Term, gated_mlp
from gossamer.linalg import LowRankPair
from tests.kernels import elementwise_cases as cases
from tests.kernels import routed_cases
from tests.kernels.test_linears import Map

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("size", [*cases.SIZES, (300, 4096)])
def test_every_kernel_equals_float64(size: tuple[int, int], dtype: torch.dtype) -> None:
    for offset in (False, True):
        cases.check_norm(size, dtype, offset, "cuda")
    for activation in elementwise.ACTIVATIONS:
        cases.check_gated(size, dtype, activation, "cuda")
    cases.check_rotary((5, 3, 64), dtype, "cuda")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_another_adapter_in_every_row_equals_the_plain_loop(dtype: torch.dtype) -> None:
    routed_cases.check(dtype, "cuda")


def test_a_gated_mlp_in_bfloat16_equals_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for said in ("eager", "triton"):
        monkeypatch.setenv("GOSSAMER_KERNELS", said)
        torch.manual_seed(0)
        maps = [Map(*size, dtype=torch.bfloat16) for size in ((128, 64), (128, 64), (64, 128))]
        for one in maps:
            one.weight = (one.weight / 10).cuda()
        flat = [torch.randn(size, device="cuda", requires_grad=True) for size in ((4, 64), (128, 4))]
        x = torch.randn(33, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        norm = Norm(torch.ones(64, device="cuda", dtype=torch.bfloat16), 1e-5)
        out = gated_mlp(x, norm, "silu", maps, [[Term(LowRankPair(flat[0], flat[1], 0.1))], [], []])
        out.float().square().mean().backward()
        results.append([out.detach(), x.grad, *(one.grad for one in flat)])
    for plain, fused in zip(*results, strict=True):
        difference = torch.linalg.vector_norm((plain - fused).float())
        assert difference <= 0.02 * torch.linalg.vector_norm(plain.float())
